"""``python -m bench``: run benches, rewrite the report, compare two result files.

    python -m bench [NAME ...] [--quick] [--threads N] [--only TEXT] [--json FILE]   run all benches, or those named
    python -m bench report                                                          docs/performance.md from bench/results
    python -m bench compare A.json B.json [--threshold 0.1] [--relative] [--partial]   1 if ours became slower or is missing

A full run writes bench/results/<machine>.json and then the report; a quick one, or one with --json, writes its file only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import compare, report
from .environment import ROOT, machine_name
from .runner import add_arguments, read, write

RESULTS = ROOT / "bench" / "results"


def run(arguments: argparse.Namespace) -> int:
    """Run the benches, each in a process of its own: a crash or the memory of one does not reach the next."""
    unknown = sorted(set(arguments.names) - set(report.bench_names()))
    if unknown:
        print(f"unknown bench {', '.join(unknown)}; there are {', '.join(report.bench_names())}", file=sys.stderr)
        return 2
    failed, seconds = [], {}
    with tempfile.TemporaryDirectory() as folder:
        collected = Path(folder) / "results.json"
        for name in arguments.names or report.bench_names():
            command = [sys.executable, "-m", f"bench.bench_{name}", "--json", str(collected), "--threads", str(arguments.threads)]
            command += ["--quick"] * arguments.quick + ["--only", arguments.only] * bool(arguments.only)
            command += [] if arguments.seconds is None else ["--seconds", str(arguments.seconds)]
            begin = time.perf_counter()
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(name)
            seconds[name] = time.perf_counter() - begin
        if collected.exists():
            _keep(read(collected)["benches"], arguments)
    print("seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items()) + f"; together {sum(seconds.values()):.0f}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _keep(benches: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    target = arguments.json
    if target is None and not arguments.quick and not arguments.only:
        target = RESULTS / f"{machine_name(next(iter(benches.values()))['environment'])}.json"
    if target is None:
        return
    write(target, benches)
    print(f"wrote {target}")
    if arguments.json is None:
        report.rewrite(RESULTS, ROOT / "docs")


def main(argv: list[str]) -> int:
    if argv[:1] == ["report"]:
        return report.main(argv[1:], RESULTS, ROOT / "docs")
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(report.bench_names())}; none: all")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
