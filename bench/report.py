"""docs/performance.md and its figures, from result files and nothing else: ``python -m bench report``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from .gpu.others import PACKAGES
from .gpu.tables import GUARDS, TABLES
from .plots import plot
from .runner import read

__all__ = ["bench_names", "losses", "main", "markdown", "rewrite"]

HEAD = """# Performance

Written by `python -m bench report` from the files in `bench/results`; do not edit. `python -m bench` measures this machine (see
`python -m bench --help`).

How to read the tables. *time* is the median of repetitions in which all variants of a row took turns; the 10th and 90th percentile are in
parentheses ("n=1": one call, because it takes longer than 60 s), and the best one where it is below 0.8 of the median. *rate* counts true
work only: visible query-key pairs, rows that exist, positions with weight; bytes that must be read or written at least once. *of the
ceiling* is the least time that this machine needs for that work over the time taken. The least time comes from the read bandwidth and the
matrix-product rate measured in the same run, whichever takes longer (mem: bandwidth, GEMM: arithmetic); work far beyond the caches is
compared with the bandwidth measured beside each repetition, which on a virtual machine may double from one second to the next. A share
above 100 % has a "(!)": that ceiling was measured too low, or the work lay in a cache. The other columns are baselines in the same run:
their time, and how many times longer they took than ours. A variant whose values did not pass the check has no time, nor one that could not
run on that machine; the reason stands below the table. "(rate)" marks a yardstick that does other work: there our rate is divided by its
rate. "error" is the relative error (Frobenius) of quantised experts against the same bf16 weights.
"""

#: CPU levels, best first: what LLADA_KERNELS_CPU takes.
LEVELS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
SCALES = ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "us", 1e6))


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, factor = next((u, f) for least, u, f in SCALES if seconds >= least)
    return f"{number(seconds * factor)} {unit}"


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def rate(giga: float, unit: str) -> str:
    """Three digits, in T from 10,000 G on: what GPUs do."""
    return f"{number(giga / 1e3)} T{unit}" if giga >= 1e4 else f"{number(giga)} G{unit}"


def markdown(machines: dict[str, dict[str, Any]]) -> str:
    """The page for result files given as ``{file stem: content}``."""
    parts = [HEAD]
    for stem, content in sorted(machines.items()):
        parts += [f"## {title(content)}\n", provenance(content), ceilings(content)]
        for figure in ("speedup", "ceiling"):
            parts.append(f"![{figure}](performance-{stem}-{figure}.svg)\n")
        for name, bench in sorted(content["benches"].items()):
            parts += [f"### {name}\n", f"{bench['about']}\n", *guards(bench)]
            if bench["rows"]:
                parts += [table(bench["rows"]), *notes(bench["rows"])]
        parts += ["### Where we lose\n", lost(content)]
    return "\n".join([*parts, levels(machines), *unmeasured(machines)]).rstrip() + "\n"


def levels(machines: dict[str, dict[str, Any]]) -> str:
    """The CPU levels that no result file has, in one line."""
    benches = [entry for content in machines.values() for entry in content["benches"].items()]
    seen = {bench["environment"]["cpu_level"] for name, bench in benches if not name.startswith("gpu ")}
    missing = ", ".join(level for level in LEVELS if level not in seen)
    how = "on a machine that has the level, or a higher one and `LLADA_KERNELS_CPU=LEVEL`, `python -m bench` measures it"
    return f"CPU levels that were never measured: {missing} ({how}).\n" if missing else ""


def unmeasured(machines: dict[str, dict[str, Any]]) -> list[str]:
    """The tables of the GPU part that no result file has, and the command that measures them."""
    measured = {name.removeprefix("gpu ") for content in machines.values() for name in content["benches"]}
    missing = [(name, table.part, table.about) for name, table in (*TABLES.items(), ("guards", GUARDS)) if name not in measured]
    if not missing:
        return []
    head = "`bench/gpu.sh PART FOLDER` on a machine with a GPU writes FOLDER/results.json; in `bench/results` it becomes part of this page."
    beside = (
        "Beside PyTorch's own ways (SDPA with a dense mask, cuDNN, FlexAttention, F.grouped_mm, ...) and the reference, where it fits in "
        f"memory and time, stand those of other projects that are installed there: {', '.join(PACKAGES)}."
    )
    lines = ["| table | part | what it shows |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in missing)]
    return ["## GPU: not measured yet\n", f"{head}\n", f"{beside}\n", "\n".join(lines) + "\n"]


def guards(bench: dict[str, Any]) -> list[str]:
    """What was checked beside values and times."""
    marks = {True: "holds", False: "DOES NOT HOLD", None: "not to be seen on this machine"}
    return [f"- {g['name']}: {marks[g['holds']]} ({g['seen']})" for g in bench.get("guards", [])] + [""] * ("guards" in bench)


def title(content: dict[str, Any]) -> str:
    facts = next(iter(content["benches"].values()))["environment"]
    return str(facts["gpu"]) if facts.get("gpu") else f"{facts['cpu']}, level {facts['cpu_level']}, {facts['threads']} threads"


def provenance(content: dict[str, Any]) -> str:
    """Machine, versions and commits; what differs between benches is listed with their names."""
    lines = []
    environments = {name: bench["environment"] for name, bench in sorted(content["benches"].items())}
    facts = (
        ("commit", lambda e: (e["commit"] or "unknown")[:12] + (" with changes" if e["dirty"] else "")),
        ("date", lambda e: e["date"][:10]),
        (
            "machine",
            lambda e: f"{e['cores']} cores, {e['memory_gib']} GiB, last-level cache {e['last_level_cache_mib']} MiB, {e['platform']}",
        ),
        ("versions", lambda e: f"llada_kernels {e['llada_kernels']}, torch {e['torch']}, Python {e['python']}"),
        ("beside them", lambda e: ", ".join(f"{k} {v}" for k, v in sorted(e.get("others", {}).items()))),
        ("kind of run", lambda e: "QUICK: small shapes, no claims" if e["quick"] else "full"),
    )
    for what, of in facts:
        values: dict[str, list[str]] = {}
        for name, e in environments.items():
            values.setdefault(of(e), []).append(name)
        shown = [v if len(values) == 1 else f"{v} ({', '.join(names)})" for v, names in values.items() if v]
        lines += [f"- {what}: {'; '.join(shown)}"] * bool(shown)
    busy = [name for name, e in environments.items() if e["load_at_start"] > e["cores"] + 0.5]
    if busy:
        lines.append(f"- other programs were running at the start of: {', '.join(busy)}")
    return "\n".join(lines) + "\n"


def ceilings(content: dict[str, Any]) -> str:
    """The measured ceilings: range over the benches, which measure them each for itself."""
    seen: dict[str, list[float]] = {}
    for bench in content["benches"].values():
        for name, entry in bench["ceilings"].items():
            seen.setdefault(name, []).append(entry["value"] / 1e9)
    lines = ["| ceiling | threads | measured |", "|---|---|---|"]
    for name, values in sorted(seen.items()):
        kind, _, threads = name.rpartition(" ")
        low, high = (rate(v, "B/s" if kind == "read" else "FLOP/s") for v in (min(values), max(values)))
        lines.append(f"| {kind} | {threads} | {low if low == high else f'{low} - {high}'} |")
    return "\n".join(lines) + "\n"


def by_case(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case; a file keeps them together and in order."""
    for _, group in groupby(rows, key=lambda r: (r["op"], r["case"], r["dtype"])):
        yield list(group)


def table(rows: list[dict[str, Any]]) -> str:
    """One line per case and variant of ours, one column per baseline."""
    others: list[tuple[str, bool]] = []
    for row in rows:
        if row["role"] != "ours" and (column := (row["variant"], row["role"] == "yardstick")) not in others:
            others.append(column)
    gpu = bool(rows) and rows[0].get("device") == "cuda"
    memory = any("peak_bytes" in row.get("extra", {}) for row in rows)
    head = ["case", "dtype", "variant", "time", "rate", "of the ceiling", *[name + " (rate)" * rate for name, rate in others]]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for case in by_case(rows):
        for row in (r for r in case if r["role"] == "ours"):
            cells = [row["case"], row["dtype"], row["variant"] + ("" if gpu else f", {row['threads']} thr."), *own_cells(row, memory)]
            for name, _ in others:
                other = next((r for r in case if r["variant"] == name), None)
                cells.append("" if other is None else other_cell(row, other, memory))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def own_cells(row: dict[str, Any], memory: bool) -> list[str]:
    if "seconds" not in row:
        return [f"{row['status']}", "", ""]
    s = row["seconds"]
    time = f"**{duration(s['median'])}**" + (once(row) or f" ({duration(s['p10'])} - {duration(s['p90'])}{best(row, ', ')})")
    rates = [rate(row[k], unit) for k, unit in (("gflops", "FLOP/s"), ("gbytes", "B/s")) if row.get(k)]
    # Of two rates the one that the ceiling is about; the other is in the JSON file.
    shown = rates[-1] if row.get("bound") == "bandwidth" else rates[0] if rates else ""
    if row.get("tokens_per_second"):
        shown = ", ".join(filter(None, [f"{number(row['tokens_per_second'])} tokens/s", shown]))
    bound = {"bandwidth": "mem", "arithmetic": "GEMM"}.get(row.get("bound", ""), "")
    percent = ""
    if "percent_of_ceiling" in row:
        percent = f"{row['percent_of_ceiling']:.0f} % {bound}" + " (!)" * (row["percent_of_ceiling"] > 100)
    return [time + peak(row, memory) + facts(row), shown, percent]


def other_cell(row: dict[str, Any], other: dict[str, Any], memory: bool) -> str:
    if "seconds" not in other:
        return str(other["status"])
    shown = best(other, "")
    time = duration(other["seconds"]["median"]) + once(other) + (shown and f" ({shown})")
    ratio = row.get("ratios", {}).get(other["variant"])
    return time + ("" if ratio is None else f", {number(ratio)}x") + peak(other, memory) + facts(other)


def once(row: dict[str, Any]) -> str:
    """What to say of a time that is one sample."""
    return " (n=1)" if row["seconds"]["reps"] == 1 else ""


def best(row: dict[str, Any], before: str) -> str:
    """The best repetition, where it is far from the median."""
    s = row["seconds"]
    return f"{before}best {duration(s['best'])}" if s["best"] < 0.8 * s["median"] else ""


def peak(row: dict[str, Any], memory: bool) -> str:
    size = row.get("extra", {}).get("peak_bytes")
    if not memory or size is None:
        return ""
    units = (1e9, "GB", 2**30, "GiB") if size >= 1e9 else (1e6, "MB", 2**20, "MiB")
    return f", peak {number(size / units[0])} {units[1]} ({number(size / units[2])} {units[3]})"


def facts(row: dict[str, Any]) -> str:
    """What else was found: whether repeated runs agreed, the error of quantised weights, how many tokens a forward accepted."""
    extra, found = row.get("extra", {}), ""
    if "different_runs" in extra:
        found += (
            f", {extra['different_runs']} of {extra['runs']} runs differ" if extra["different_runs"] else f", {extra['runs']} equal runs"
        )
    if "relative_error" in extra:
        found += f", error {100 * extra['relative_error']:.2f} %"
    if "tokens_per_forward" in extra:
        found += f", {extra['tokens_per_forward']} tokens per forward"
    return found


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Why a variant has no time, once per reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "seconds" not in row:
            reasons.setdefault(f"{row['variant']}: {row['status']}: {row['reason']}", []).append(f"{row['case']} {row['dtype']}")
    return [f"- {reason} ({'; '.join(cases)})" for reason, cases in reasons.items()] + [""] * bool(reasons)


def losses(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str, float]]:
    """Our rows that are slower than a checked baseline (or below a yardstick's rate), and rows of ours without a time."""
    found = []
    for row in rows:
        if row["role"] == "ours":
            found += [(row, name, ratio) for name, ratio in row.get("ratios", {}).items() if ratio < 1]
            if row["status"] in ("failed", "error"):
                found.append((row, str(row["reason"]), 0.0))
    return found


def lost(content: dict[str, Any]) -> str:
    lines = []
    for _, bench in sorted(content["benches"].items()):
        for row, name, ratio in sorted(losses(bench["rows"]), key=lambda entry: entry[2]):
            what = f"{row['op']}, {row['case']}, {row['dtype']}, {row['variant']}"
            lines.append(f"- {what}: {f'{number(ratio)}x {name}' if ratio else f'no time: {name}'}")
    lines = lines or ["Nowhere in these tables: every row of ours is at least as fast as every baseline of its run."]
    missing = sorted(set(bench_names()) - set(content["benches"]))
    if missing and not any(name.startswith("gpu ") for name in content["benches"]):
        lines += ["", f"Not measured on this machine: {', '.join(missing)} (`python -m bench NAME`)."]
    return "\n".join(lines) + "\n"


def bench_names() -> list[str]:
    """All benches of CPUs: files bench_<name>.py."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def rewrite(results: Path, docs: Path) -> list[Path]:
    """Write the page and the figures of all result files; what is written."""
    machines = {path.stem: read(path) for path in sorted(results.glob("*.json"))}
    docs.mkdir(parents=True, exist_ok=True)
    for old in docs.glob("performance-*.svg"):
        old.unlink()
    page = docs / "performance.md"
    page.write_text(markdown(machines))
    return [page, *(path for stem, content in machines.items() for path in plot(content, docs, stem))]


def main(argv: list[str], results: Path, docs: Path) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results, help="folder of result files")
    parser.add_argument("--docs", type=Path, default=docs, help="where performance.md goes")
    arguments = parser.parse_args(argv)
    for path in rewrite(arguments.results, arguments.docs):
        print(path)
    return 0
