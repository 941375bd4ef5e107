"""Benchmarks: every speed claim of this project comes from here. ``python -m bench --help``.

A bench is a module ``bench_<name>.py`` with a function ``cases(settings)`` that yields :class:`bench.harness.Case` objects. The harness
checks the values of every variant first, times all variants of a case interleaved in one run, measures the machine's ceilings in
the same run, and writes JSON; ``docs/performance.md`` is made from the JSON files alone.
"""
