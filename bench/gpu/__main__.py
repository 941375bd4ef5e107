"""``python -m bench.gpu``: the parts of bench/gpu.sh that are Python.

    python -m bench.gpu tables [ID ...] --json FILE [--budget S] [--only TEXT] [--without MODULE ...] [--dry-run]   measure tables
    python -m bench.gpu guards --json FILE [--dry-run]                                      syncs, recompilations, bits, graphs
    python -m bench.gpu once [--dry-run]                                                    every op once (for compute-sanitizer)

Without names of tables all but E are measured. Results are added to FILE as they come: what was measured stays when the rest fails.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from ..environment import environment
from ..harness import Settings
from ..runner import measure_cases, read, write
from . import guards, others
from .ceilings import DeviceCeilings
from .operations import operations
from .stopwatch import DeviceStopwatch
from .tables import GUARDS, TABLES

#: Seconds until a baseline has compiled: FlexAttention takes half a minute, and all tables together have five.
PATIENCE = 90.0


def settings_of(arguments: argparse.Namespace) -> Settings:
    """On a GPU bf16; in a dry run on a CPU tiny shapes in fp32, as Triton's interpreter gets bf16 wrong."""
    more: dict[str, Any] = {"without": tuple(arguments.without), "patience": PATIENCE, "once": 10.0}
    if arguments.dry_run:
        return Settings(True, 1, arguments.only, 0.0, 1, 1, device=torch.device("cpu"), dtype=torch.float32, **more)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: expected a GPU, or --dry-run")
    return Settings(False, 1, arguments.only, 0.2, 20, 50, device=torch.device("cuda"), dtype=torch.bfloat16, **more)


def tables(names: list[str], path: Path, budget: float, settings: Settings) -> int:
    """Measure tables one after the other, each in its share of the time that is left; 1 if values of ours were wrong or a table broke."""
    unknown = sorted(set(names) - set(TABLES))
    if unknown:
        raise SystemExit(f"unknown table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    begin = time.monotonic()
    ceilings = DeviceCeilings(settings)
    stopwatch = None if settings.quick else DeviceStopwatch()
    wrong = 0
    chosen = names or [n for n, table in TABLES.items() if table.part == "bench"]
    for number, name in enumerate(chosen):
        share = (budget - (time.monotonic() - begin)) / (len(chosen) - number)  # the first table's baselines alone could take it all
        rows: list[dict[str, Any]] = []
        try:
            ended = measure_cases(TABLES[name].cases(settings), settings, ceilings, rows=rows, stopwatch=stopwatch, seconds=share)[1]
        except Exception as error:  # making a case broke: its table ends here, the others are measured
            traceback.print_exc()
            note, wrong = {"ended": f"{type(error).__name__}: {error}".splitlines()[0][:300]}, wrong + 1
        else:
            note = {} if ended else {"ended": f"after {share:.0f} s: cases that follow were not run"}
        wrong += sum(row["role"] == "ours" and row["status"] in ("failed", "error") for row in rows)
        facts = {**environment(settings.threads, settings.quick), "load_at_end": 0.0, "others": others.versions(rows), **note}
        entry = {"about": TABLES[name].about, "environment": facts, "ceilings": ceilings.values, "rows": rows}
        write(path, {f"gpu {name}": entry})
    return int(bool(wrong))


def guard(path: Path, settings: Settings) -> int:
    """Check the guards and keep what was seen; 1 if one does not hold."""
    count = 2 if settings.quick else 100
    facts = guards.run(settings, count, count)
    for fact in facts:
        print(f"{'-' if fact['holds'] is None else 'ok' if fact['holds'] else 'NOT'}  {fact['name']}: {fact['seen']}")
    held: dict[str, Any] = read(path)["benches"] if path.exists() else {}
    entry = {"about": GUARDS.about, "environment": environment(1, settings.quick), "ceilings": {}, "rows": []}
    write(path, {**held, "gpu guards": {**entry, "guards": facts}})
    return int(any(fact["holds"] is False for fact in facts))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tables", "guards", "once"))
    parser.add_argument("names", nargs="*", metavar="ID", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--budget", type=float, default=420.0, metavar="S", help="seconds after which no new case begins")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    known = ", ".join(others.PACKAGES.values())
    parser.add_argument("--without", action="append", default=[], metavar="MODULE", help=f"do not try this package (of {known})")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: do the scripts work?")
    arguments = parser.parse_args(argv)
    settings = settings_of(arguments)
    if arguments.part == "once":
        for name, call in operations([40, 33], settings).items():
            print(name, flush=True)
            call()
        if settings.device.type == "cuda":
            torch.cuda.synchronize()
        return 0
    if arguments.json is None:
        parser.error("--json: expected a file for the results")
    if arguments.part == "guards":
        return guard(arguments.json, settings)
    return tables(arguments.names, arguments.json, arguments.budget, settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
