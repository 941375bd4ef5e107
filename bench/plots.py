"""The figures of docs/performance.md: small SVG files, the same bytes for the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["plot"]


def plot(content: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Two bar charts of our rows: speed over the fastest baseline, and percentage of the ceiling."""
    rows = [row for _, bench in sorted(content["benches"].items()) for row in bench["rows"] if row["role"] == "ours" and "seconds" in row]
    rates = {(r["op"], r["variant"]) for b in content["benches"].values() for r in b["rows"] if r["role"] == "yardstick"}
    speed, ceiling = [], []
    for row in rows:
        label = f"{row['op']}: {row['case']}, {row['dtype']}" + ("" if row["variant"] == "native" else f", {row['variant']}")
        # Our own single thread is no competitor, and a yardstick does other work.
        ratios = [v for k, v in row.get("ratios", {}).items() if not k.startswith("native") and (row["op"], k) not in rates]
        if ratios:
            speed.append((label, min(ratios)))
        if "percent_of_ceiling" in row:
            ceiling.append((label, row["percent_of_ceiling"]))
    written = []
    for name, bars, axis, mark in (
        ("speedup", speed, "times the speed of the fastest baseline in the same run (log scale)", 1.0),
        ("ceiling", ceiling, "% of the ceiling measured in the same run", 100.0),
    ):
        path = folder / f"performance-{stem}-{name}.svg"
        _bars(bars, axis, mark, path, log=name == "speedup")
        written.append(path)
    return written


def _bars(bars: list[tuple[str, float]], axis: str, mark: float, path: Path, log: bool) -> None:
    import matplotlib

    # Fixed ids and no date: the file changes only when a number does. Text stays text, which is small and searchable.
    settings: Any = {"svg.hashsalt": "llada_kernels", "svg.fonttype": "none", "font.size": 8}
    with matplotlib.rc_context(settings):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 0.9 + 0.2 * max(1, len(bars))), layout="constrained")
        axes = figure.subplots()
        places = range(len(bars))
        drawn = axes.barh(places, [value for _, value in bars], color=["#c0504d" if log and v < 1 else "#4f81bd" for _, v in bars])
        axes.set_yticks(places, [label for label, _ in bars])
        axes.invert_yaxis()
        axes.set_xlabel(axis)
        axes.axvline(mark, color="black", linewidth=0.8)
        if log and bars:
            axes.set_xscale("log")
        axes.bar_label(drawn, labels=[f" {value:.3g}" for _, value in bars])
        axes.margins(x=0.1, y=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})
