"""The demo's two figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_order", "plot_training"]

_BLUE, _ORANGE, _GREY, _GREEN = "#2563a8", "#d9772b", "#8a8a8a", "#2f8f4e"


def _pyplot() -> Any:
    """matplotlib without a display."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib: expected it to be installed for the demo's figures: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential mean without a start-up bias."""
    result, mean, norm = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(mean / norm)
    return result


def plot_training(
    path: Path,
    ar: Sequence[dict[str, Any]],
    conversion: Sequence[dict[str, Any]],
    evaluations: Sequence[tuple[int, float]],
    unigram: float,
    scratch: Sequence[tuple[int, float]] = (),
) -> None:
    """Losses of both phases, held-out perplexity, and the block-size schedule.

    Args:
        path: PNG to write.
        ar, conversion: metrics of each step.
        evaluations: (conversion step, block-32 ELBO perplexity on held-out text).
        unigram: perplexity without any context.
        scratch: the same evaluations of a run from random weights.
    """
    plt = _pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    begin = len(ar)
    for metrics, offset, colour, label in ((ar, 0, _BLUE, "next token"), (conversion, begin, _ORANGE, "diffusion (ELBO)")):
        losses = [(m["step"] + offset, m["loss"]) for m in metrics if m.get("loss") is not None]
        steps, values = [s for s, _ in losses], [v for _, v in losses]
        left.plot(steps, values, color=colour, alpha=0.2, linewidth=0.6)
        left.plot(steps, smooth(values), color=colour, label=label)
    left.axvline(begin, color=_GREY, linewidth=0.8, linestyle=":")
    highest = max((m["loss"] for m in ar if m.get("loss") is not None), default=10.0)
    left.set(title="Training loss", xlabel="step", ylabel="nats per token", ylim=(0, 1.3 * highest))
    left.legend(frameon=False)

    middle.plot(*zip(*evaluations, strict=True), color=_ORANGE, marker="o", markersize=3, label="from the AR model")
    if scratch:
        middle.plot(*zip(*scratch, strict=True), color=_GREY, marker="o", markersize=3, label="from random weights")
    middle.axhline(unigram, color=_GREEN, linestyle="--", linewidth=1, label="unigram")
    middle.set(title="Held-out perplexity at block 32", xlabel="conversion step", yscale="log")
    middle.legend(frameon=False)

    sizes = [m["block_size"] for m in conversion]
    names = sorted({s for s in sizes if s != "full"}) + (["full"] if "full" in sizes else [])
    right.step(range(len(sizes)), [names.index(s) for s in sizes], where="post", color=_ORANGE)
    right.set_yticks(range(len(names)), [str(n) for n in names])
    right.set(title="Block size: warm-up, stable, decay", xlabel="conversion step", ylabel="tokens per block")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_order(path: Path, order: Sequence[int], block_length: int, pieces: Sequence[str], first: int) -> None:
    """When each position was unmasked: one row per block, colour and number are the forward within the block.

    Args:
        path: PNG to write.
        order: forward (counted from 1 in its block) at which each generated position was unmasked.
        block_length: positions per block.
        pieces: text of each token.
        first: absolute position of the first one; blocks are counted from position 0.
    """
    plt = _pyplot()
    from matplotlib import colormaps

    rows = (first + len(order) - 1) // block_length - first // block_length + 1
    figure, axes = plt.subplots(figsize=(13, 0.8 + 0.62 * rows), layout="constrained")
    last, colours = max(order), colormaps["viridis"]
    for place, (step, piece) in enumerate(zip(order, pieces, strict=True)):
        row, column = divmod(first % block_length + place, block_length)
        shade = (step - 1) / max(1, last - 1)
        axes.add_patch(plt.Rectangle((column, row), 1, 1, facecolor=colours(shade), edgecolor="white"))
        ink = "black" if shade > 0.6 else "white"
        axes.text(column + 0.5, row + 0.36, str(step), ha="center", va="center", fontsize=8, color=ink)
        shown = piece.strip().replace("\n", "\u21b5").replace("$", r"\$")[:7]
        axes.text(column + 0.5, row + 0.74, shown, ha="center", va="center", fontsize=5, color=ink)
    axes.set(xlim=(0, block_length), ylim=(rows, 0), yticks=[r + 0.5 for r in range(rows)], xlabel="position in the block")
    axes.set_yticklabels([f"block {first // block_length + r}" for r in range(rows)])
    axes.set_title("Forward at which each token was unmasked")
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
