"""Whether results became worse: ``python -m bench compare A.json B.json``. Exit status 0: no, 1: yes, 2: the files cannot be compared."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runner import read

__all__ = ["Change", "compare", "drift", "main", "missing"]

Key = tuple[str, str, str, str, int]
#: two files are of the same machine if these agree
MACHINE = ("cpu", "cpu_level", "gpu", "cores")


@dataclass(frozen=True)
class Change:
    """One of our rows in both files.

    Attributes:
        key: op, case, dtype, variant, threads.
        factor: time after over time before (``relative``: both in units of the fastest baseline of their run); inf: no time any more.
        worse: slower by more than chance explains (:func:`_absolute`), or without right values.
        note: why, in words.
    """

    key: Key
    factor: float
    worse: bool
    note: str

    def __str__(self) -> str:
        op, case, dtype, variant, threads = self.key
        return f"{'WORSE ' if self.worse else '      '}{op}: {case}, {dtype}, {variant}, {threads} threads: {self.note}"


def ours(content: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """Our rows of a result file."""
    rows = (row for bench in content["benches"].values() for row in bench["rows"] if row["role"] == "ours")
    return {_key(r): r for r in rows}


def _key(row: dict[str, Any]) -> Key:
    return row["op"], row["case"], row["dtype"], row["variant"], row["threads"]


def missing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Benches with rows of ours that ``after`` has not run."""
    ran = after["benches"]
    return sorted(name for name, bench in before["benches"].items() if name not in ran and any(r["role"] == "ours" for r in bench["rows"]))


def compare(
    before: dict[str, Any], after: dict[str, Any], threshold: float = 0.1, relative: bool = False, partial: bool = False
) -> list[Change]:
    """What became of each row of ours that ``before`` has a time for, in the benches that ``after`` has run.

    Args:
        before, after: contents of result files.
        threshold: share by which a time may grow.
        relative: compare ratios to the fastest baseline of the same run, not times: for different machines.
        partial: ``after`` may lack cases, as a run of ``--only`` does.
    """
    new = ours(after)
    changes = []
    for key, a in ours({"benches": {n: bench for n, bench in before["benches"].items() if n in after["benches"]}}).items():
        if "seconds" not in a or (partial and key not in new):
            continue
        b = new.get(key)
        if b is None or "seconds" not in b:
            reason = "row is gone" if b is None else f"{b['status']}: {b['reason']}"
            changes.append(Change(key, float("inf"), True, reason))
            continue
        changes.append(_relative(key, a, b, threshold) if relative else _absolute(key, a, b, threshold))
    return changes


def drift(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, int]:
    """Median of time after over time before of the baselines, which no change of ours made slower, and how many there are."""

    def times(content: dict[str, Any]) -> dict[Key, float]:
        rows = (r for bench in content["benches"].values() for r in bench["rows"] if r["role"] == "baseline" and "seconds" in r)
        return {_key(r): r["seconds"]["median"] for r in rows if r["variant"] != "reference"}

    x, y = times(before), times(after)
    factors = [y[key] / x[key] for key in x if key in y]
    return (statistics.median(factors) if factors else 1.0), len(factors)


def _absolute(key: Key, a: dict[str, Any], b: dict[str, Any], threshold: float) -> Change:
    x, y = a["seconds"], b["seconds"]
    factor = y["median"] / x["median"]
    # Where the spreads overlap, a little more may be chance. Neighbours on the machine make some repetitions slower, never one faster: what
    # the best ones show too is no chance where the medians differ by twice the threshold.
    apart = factor > 1 + threshold and y["p10"] > x["p90"]
    far = factor > 1 + 2 * threshold and y["best"] > (1 + threshold) * x["best"]
    return Change(key, factor, apart or far, f"{x['median'] * 1e3:.3f} -> {y['median'] * 1e3:.3f} ms ({factor:.2f}x)")


def _relative(key: Key, a: dict[str, Any], b: dict[str, Any], threshold: float) -> Change:
    shared = sorted(set(a.get("ratios") or {}) & set(b.get("ratios") or {}))
    if not shared:
        return Change(key, 1.0, False, "no baseline in both files")
    x, y = (min(row["ratios"][name] for name in shared) for row in (a, b))
    return Change(key, x / y, x / y > 1 + threshold, f"{x:.2f}x -> {y:.2f}x the speed of the fastest baseline")


def _different_machines(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    def machines(content: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        return (tuple(b["environment"].get(k) for k in MACHINE) for b in content["benches"].values())

    a, b = set(machines(before)), set(machines(after))
    return None if len(a | b) <= 1 else f"results of different machines: {sorted(map(str, a))} and {sorted(map(str, b))}; use --relative"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="share by which a time may grow (default 0.1)")
    parser.add_argument("--relative", action="store_true", help="compare ratios to the fastest baseline: for different machines")
    parser.add_argument("--partial", action="store_true", help="the second file may lack benches and cases")
    arguments = parser.parse_args(argv)
    try:
        before, after = read(arguments.before), read(arguments.after)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not arguments.relative and (problem := _different_machines(before, after)):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    lacking = [] if arguments.partial else missing(before, after)
    for name in lacking:
        print(f"MISSING {name}: not in {arguments.after} (--partial allows it)")
    changes = compare(before, after, arguments.threshold, arguments.relative, arguments.partial)
    if not changes and not lacking:
        print("error: no row of ours is in both files", file=sys.stderr)
        return 2
    for change in sorted(changes, key=lambda c: -c.factor):
        print(change)
    worse = sum(c.worse for c in changes)
    print(f"{worse} of {len(changes)} rows worse by more than {arguments.threshold:.0%}, {len(lacking)} benches missing")
    if not arguments.relative:
        factor, count = drift(before, after)
        print(
            f"{count} baselines, which are not ours: {factor:.2f}x the time (median); far from 1, the machine was another (see --relative)"
        )
    return int(worse > 0 or bool(lacking))
