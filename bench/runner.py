"""The command line of a bench module: ``python -m bench.bench_<name> [--quick] [--threads N] [--only TEXT] [--json FILE]``."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .ceilings import Ceilings
from .environment import environment
from .harness import Case, Settings, Stopwatch, measure, set_floor

__all__ = ["SCHEMA", "add_arguments", "main", "measure_cases", "read", "run", "write"]

SCHEMA = 1
Cases = Callable[[Settings], Iterator[Case]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every bench takes."""
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions: does everything work?")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--only", default="", metavar="TEXT", help='cases whose "name dtype" contains this')
    parser.add_argument("--seconds", type=float, metavar="S", help="time for the repetitions of one variant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")


def main(name: str, cases: Cases) -> int:
    """Run one bench from the command line; 1 if the values of one of our variants were wrong."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.bench_{name}", description=sys.modules[cases.__module__].__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    result = run(name, cases, Settings.of(arguments.quick, arguments.threads, arguments.only, arguments.seconds))
    if arguments.json:
        write(arguments.json, {name: result})
    return int(any(row["role"] == "ours" and row["status"] in ("failed", "error") for row in result["rows"]))


def run(name: str, cases: Cases, settings: Settings, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Everything that one bench found: environment, ceilings, rows."""
    begin = time.perf_counter()
    torch.set_num_threads(settings.threads)
    facts = environment(settings.threads, settings.quick)
    ceilings = Ceilings()
    ceilings.measure(settings.threads, settings.quick)
    best = ", ".join(f"{k} threads {v['value'] / 1e9:.0f} G/s" for k, v in sorted(ceilings.values.items()))
    show(f"{name}: ceilings {best}")
    rows, _ = measure_cases(cases(settings), settings, ceilings, show)
    ceilings.settle(settings.threads, settings.quick)
    for row in rows:  # a machine shared with others reaches its best now and then: all rows are held against that
        if "seconds" in row:
            set_floor(row, ceilings)
    return {
        "about": (sys.modules[cases.__module__].__doc__ or "").strip().splitlines()[0],
        "environment": {**facts, "seconds": round(time.perf_counter() - begin, 1), "load_at_end": round(os.getloadavg()[0], 2)},
        "ceilings": ceilings.values,
        "rows": rows,
    }


def measure_cases(
    cases: Iterator[Case],
    settings: Settings,
    ceilings: Ceilings,
    show: Callable[[str], None] = print,
    stopwatch: Stopwatch | None = None,
    seconds: float = float("inf"),
    rows: list[dict[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of all cases, and whether there was time for all: after ``seconds`` no further case begins. They are added to ``rows``, if
    given, as they come."""
    begin = time.perf_counter()
    rows = [] if rows is None else rows
    for case in cases:
        torch.manual_seed(0)
        measured = measure(case, settings, ceilings, stopwatch)
        rows += measured
        show(f"  {case.name} {measured[0]['dtype']}")
        for row in measured:
            show(f"    {describe(row)}")
        del case
        _return_memory()
        ceilings.again(settings.threads, settings.quick)
        if time.perf_counter() - begin > seconds:
            return rows, next(cases, None) is None
    return rows, True


def describe(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    name = f"{row['variant']} ({row['threads']} threads)"
    if "seconds" not in row:
        return f"{name:<42} {row['status']}: {row['reason']}"
    seconds = row["seconds"]
    text = f"{name:<42} {seconds['median'] * 1e3:10.3f} ms ({seconds['p10'] * 1e3:.3f}-{seconds['p90'] * 1e3:.3f}, n={seconds['reps']})"
    if row.get("gflops"):
        text += f" {row['gflops']:8.1f} GFLOP/s"
    if row.get("gbytes"):
        text += f" {row['gbytes']:6.1f} GB/s"
    if row.get("tokens_per_second"):
        text += f" {row['tokens_per_second']:8.2f} tokens/s"
    if "percent_of_ceiling" in row:
        text += f" {row['percent_of_ceiling']:5.1f} % of {row['bound']}" + " (above what was measured)" * (row["percent_of_ceiling"] > 100)
        if row["bound"] == "bandwidth" and "read_beside" in row:
            text += f" ({row['read_beside'] / 1e9:.1f} GB/s beside it)"
    if row.get("extra"):
        text += " " + ", ".join(f"{k} {v}" for k, v in row["extra"].items())
    if row.get("ratios"):
        text += " | " + ", ".join(f"{ratio:.2f}x {other}" for other, ratio in row["ratios"].items())
    return text


def write(path: Path, benches: dict[str, Any]) -> None:
    """Put results into a file, in place of those of the same benches that it holds; complete or not at all."""
    held = read(path)["benches"] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"schema": SCHEMA, "benches": {**held, **benches}}, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: the file is none, or of another version of this harness.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a result file: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a result file of schema {SCHEMA}, got {found}")
    return content


def _return_memory() -> None:
    """Give freed memory back to the system between cases: some take several gigabytes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
