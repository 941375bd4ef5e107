"""Benches on a GPU: the tables of the report's GPU part, guards against syncs and recompilation, the mini geometry as a whole.

``bench/gpu.sh`` runs them. On a machine without a GPU the same lines run with tiny shapes, as a check of the scripts (``--dry-run``).
"""
