"""What the demo shows: live bars and panels on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Display"]

_PLAIN_SECONDS = 5.0  # between two lines of progress without a terminal
_FRAME_SECONDS = 0.06  # that each step of an unmasking stays to be seen


def clock(seconds: float) -> str:
    """m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Display:
    """Output of the demo.

    Args:
        console: where to; its ``is_terminal`` decides between live and plain.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.live = self.console.is_terminal

    def heading(self, text: str) -> None:
        """Begin a part."""
        if self.live:
            self.console.rule(f"[bold]{escape(text)}", align="left")
        else:
            self.console.print(f"\n== {text}", markup=False)

    def line(self, text: str) -> None:
        """A line of plain text."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Yields ``update(done, note)``; shows time spent and left."""
        if self.live:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self.console) as bar:
                task = bar.add_task(label, total=total, note="")
                yield lambda done, note: bar.update(task, completed=done, note=note)
            return
        begin = last = time.monotonic()

        def update(done: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PLAIN_SECONDS or done == total:
                last = now
                left = (now - begin) / max(1, done) * (total - done)
                self.line(f"{label}: {done}/{total}  {note}  {clock(now - begin)} elapsed, {clock(left)} left")

        yield update

    @contextmanager
    def unmasking(self, title: str, plain_every: int = 8) -> Iterator[Callable[[str, str, int], None]]:
        """Yields ``show(prompt, text, forward)``, called after each forward; a plain display shows every n-th."""
        if self.live:
            with Live(console=self.console, auto_refresh=False, vertical_overflow="visible") as live:

                def draw(prompt: str, text: str, forward: int) -> None:
                    body = Text.assemble((prompt, "bold"), (text, "cyan"))
                    live.update(Panel(body, title=f"{escape(title)}  forward {forward}", title_align="left"), refresh=True)
                    time.sleep(_FRAME_SECONDS)

                yield draw
            return
        last: tuple[str, str, int] | None = None
        shown = -1

        def show(prompt: str, text: str, forward: int) -> None:
            nonlocal last, shown
            last = (prompt, text, forward)
            if forward == 1 or forward % plain_every == 0:
                shown = forward
                self.line(f"[forward {forward:>3}] {prompt}{text}")

        yield show
        if last is not None and last[2] != shown:
            self.line(f"[forward {last[2]:>3}] {last[0]}{last[1]}")

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Name and value, one row each."""
        if not self.live:
            width = max(len(name) for name, _ in rows)
            self.heading(title)
            for name, value in rows:
                self.line(f"{name:<{width}}  {value}")
            return
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        self.console.print(table)
