"""The demo behind ``llada-kernels demo``: everything the package does, on a small scale and without a network."""

from .run import FULL, QUICK, Results, Scale, run_demo

__all__ = ["FULL", "QUICK", "Results", "Scale", "run_demo"]
