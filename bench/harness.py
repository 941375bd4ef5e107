"""What a bench is made of, and how a case is measured: values first, then all variants interleaved."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from .ceilings import Ceilings

__all__ = [
    "Case", "Settings", "Statistics", "Stopwatch", "Variant", "backends", "interleave", "measure", "repetitions", "set_floor", "statistics",
]  # fmt: skip

Role = Literal["ours", "baseline", "yardstick"]
#: Share of a run's read bandwidth below which a reading beside a call tells nothing: two threads read a factor of 1.8 more or less from one
#: second to the next (see :class:`Ceilings`), and a factor of 10 was seen after a program had given back its memory.
LEAST_BESIDE = 0.4


@dataclass(frozen=True)
class Settings:
    """How a bench runs.

    Attributes:
        quick: small shapes and few repetitions: that everything works, not how fast it is.
        threads: of torch, for every variant that does not name its own.
        only: a text that the name of a case (``"decode 4096 bfloat16"``) must contain; "" takes all.
        seconds: time for the repetitions of one variant.
        min_reps: fewest repetitions of a variant that takes less than a second.
        max_reps: most repetitions.
        once: a variant whose first, checked call took longer than this many seconds has one sample (n=1): that call, or in a case with
            :attr:`Case.least` another one. Any other first call is no sample: it makes what later ones reuse (an optimizer's state, pages,
            caches), so it would be another kind of call.
        device, dtype: what benches of a GPU make their inputs on and in; the others name their own.
        without: modules of other projects that are not to be tried though they are installed.
        patience: seconds that a baseline may take to prepare and to return from its first call: some compile for minutes.
    """

    quick: bool = False
    threads: int = 1
    only: str = ""
    seconds: float = 0.6
    min_reps: int = 5
    max_reps: int = 300
    once: float = 60.0
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.bfloat16
    without: tuple[str, ...] = ()
    patience: float = math.inf

    @classmethod
    def of(cls, quick: bool, threads: int, only: str = "", seconds: float | None = None) -> Settings:
        """The settings of a full or of a quick run."""
        settings = cls(True, threads, only, 0.05, 2, 20) if quick else cls(False, threads, only)
        return settings if seconds is None else replace(settings, seconds=seconds)

    def wants(self, name: str, dtype: torch.dtype | str = "") -> bool:
        """Whether a case takes part; asked before its inputs are made."""
        return self.only in f"{name} {dtype_name(dtype)}"


@dataclass
class Variant:
    """One way to compute a case.

    Attributes:
        name: ``"native"``, ``"reference"``, or the baseline in words.
        run: one call; what it returns goes to the case's check.
        role: "ours"; "baseline": another way to the same values; "yardstick": other work, compared by its rate and never checked.
        threads: other than those of the settings, or None.
        flops: of a yardstick, which does other work than the case.
        extra: further facts for the row, such as peak memory; asked for once, after timing.
        prepare: what is done once before the first call and is no part of its time, such as compiling.
        before: what is done before every call and is no part of its time: the state that a call finds. On a CPU only.
        capture: on a GPU the call may be timed as a CUDA graph: it has no syncs and its launches outweigh its work.
    """

    name: str
    run: Callable[[], Any]
    role: Role = "baseline"
    threads: int | None = None
    flops: float | None = None
    extra: Callable[[], dict[str, Any]] | None = None
    prepare: Callable[[], Any] | None = None
    before: Callable[[], Any] | None = None
    capture: bool = False


@dataclass
class Case:
    """One problem, its variants, and how to tell right values from wrong ones.

    Attributes:
        op: name of the op, or of what is benched.
        name: which of its cases.
        dtype: of the inputs.
        shapes: what a reader needs to repeat it: sizes, distribution, seeds.
        variants: in the order of the table, ours first.
        check: takes what a variant returned; None, or what is wrong with it. A variant that fails gets no time.
        flops: of the true work; None: no arithmetic worth counting.
        bytes: that must come from or go to memory at least once.
        tokens: new or read ones of a call, for a rate of tokens per second.
        arithmetic: the GEMM ceiling that ``flops`` are compared with: "bfloat16" or "float32".
        least: fewest repetitions in a full run, however long a call takes, of ours and of baselines that are somebody's way (not of the
            reference, nor of one thread): for cases whose times spread.
    """

    op: str
    name: str
    dtype: torch.dtype
    shapes: dict[str, Any]
    variants: list[Variant]
    check: Callable[[Any], str | None]
    flops: float | None = None
    bytes: float | None = None
    tokens: int | None = None
    arithmetic: str = ""
    least: int = 0

    def __post_init__(self) -> None:
        self.arithmetic = self.arithmetic or ("bfloat16" if self.dtype == torch.bfloat16 else "float32")


@dataclass
class Statistics:
    """Seconds per call over the repetitions of a variant."""

    median: float
    p10: float
    p90: float
    best: float
    reps: int

    def as_dict(self) -> dict[str, float | int]:
        """Plain JSON types."""
        return dict(vars(self))


class Stopwatch:
    """Times calls on the host; the devices of other stopwatches run behind it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def settle(self, variant: Variant, first: float) -> float:
        """What a call takes, as far as it is known after its first, checked call of ``first`` seconds."""
        return first

    def calls(self, seconds: float) -> int:
        """How many calls to time as one: the clock itself costs some 50 ns."""
        return max(1, min(1000, int(2e-4 / max(seconds, 1e-9))))

    def __call__(self, variant: Variant, calls: int) -> float:
        """Seconds per call."""
        if variant.before is not None:
            return sum(self._after(variant.before, variant) for _ in range(calls)) / calls
        begin = self.clock()
        for _ in range(calls):
            variant.run()
        return (self.clock() - begin) / calls

    def _after(self, before: Callable[[], Any], variant: Variant) -> float:
        before()
        begin = self.clock()
        variant.run()
        return self.clock() - begin


@dataclass
class _Running:
    variant: Variant
    row: dict[str, Any]
    first: float
    calls: int = 1
    samples: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)


def dtype_name(dtype: torch.dtype | str) -> str:
    """``"bfloat16"`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def statistics(samples: Sequence[float]) -> Statistics:
    """Median and spread; percentiles are interpolated between neighbours.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    ordered = sorted(samples)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Statistics(percentile(0.5), percentile(0.1), percentile(0.9), ordered[0], len(ordered))


def repetitions(seconds: float, settings: Settings, least: int = 0) -> int:
    """How often to time a variant whose call takes ``seconds``: as often as fits the budget, within bounds that let slow ones off, and at
    least ``least`` times in a full run."""
    fewest = settings.min_reps if seconds < 1 else min(3, settings.min_reps) if seconds < 5 else min(2, settings.min_reps)
    fewest = fewest if settings.quick else max(fewest, least)
    return max(fewest, min(settings.max_reps, int(settings.seconds / max(seconds, 1e-9))))


def interleave(counts: Sequence[int]) -> list[int]:
    """An order in which index i comes counts[i] times, each index spread evenly: slow drifts of the machine meet all alike."""
    places = [((k + 0.5) / n, i) for i, n in enumerate(counts) for k in range(n)]
    return [i for _, i in sorted(places)]


def backends(module: Any, call: Callable[[str], Any]) -> list[Variant]:
    """A variant for every backend of an op's module that runs on a CPU (:mod:`bench.gpu` has the others); ``call`` takes the backend's
    name. The reference counts as a baseline."""
    names = [b.name for b in module.BACKENDS if b.name != "triton"]
    return [Variant(n, (lambda name=n: call(name)), "baseline" if n == "reference" else "ours") for n in names]  # type: ignore[misc]


def measure(case: Case, settings: Settings, ceilings: Ceilings, stopwatch: Stopwatch | None = None) -> list[dict[str, Any]]:
    """Check and time the variants of a case; one row per variant, in the case's order.

    A variant whose values are wrong, which raises (at whichever call), or which does not support the case has a row that says so, and no
    time; the others keep theirs.
    """
    stopwatch = Stopwatch() if stopwatch is None else stopwatch
    rows: list[dict[str, Any]] = []
    running: list[_Running] = []
    for variant in case.variants:
        row = _row(case, variant, settings)
        rows.append(row)
        torch.set_num_threads(row["threads"])
        first = _first_call(case, variant, row, stopwatch, settings.patience if variant.role != "ours" else math.inf)
        if first is not None:
            running.append(_Running(variant, row, first, stopwatch.calls(first)))
    # The first call of a fast variant is mostly set-up; one of a slow variant is worth more than another that only estimates.
    counts: list[int] = []
    for state in running:
        if state.first > settings.once:  # a run of all benches has to end
            state.samples += [state.first] * (not case.least)
            counts.append(min(case.least, 1))
        else:
            try:
                estimate = state.first if state.first > 0.5 else _seconds_of_call(state, stopwatch)
            except Exception as error:
                _note(state.row, error)
                estimate = state.first
            competes = state.variant.name != "reference" and state.variant.threads is None
            counts.append(repetitions(estimate * state.calls, settings, case.least if competes else 0))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in interleave(counts):
            state = running[index]
            if state.row["status"] != "ok":
                continue
            read = None if settings.device.type != "cpu" else ceilings.read_now(state.row["threads"], case.bytes)
            try:
                state.samples.append(_seconds_of_call(state, stopwatch))
            except Exception as error:
                _note(state.row, error)
                continue
            if read is not None and state.variant.role != "yardstick":
                state.reads.append(read)
    finally:
        if collecting:
            gc.enable()
        torch.set_num_threads(settings.threads)
    for state in running:
        if state.row["status"] == "ok":
            _finish(state, case, ceilings)
    _ratios(rows)
    return rows


def _row(case: Case, variant: Variant, settings: Settings) -> dict[str, Any]:
    return {
        "op": case.op, "case": case.name, "dtype": dtype_name(case.dtype), "shapes": case.shapes, "variant": variant.name,
        "role": variant.role, "threads": variant.threads or settings.threads, "device": settings.device.type,
        "status": "ok", "reason": None,
    }  # fmt: skip


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread after ``seconds``, between two steps of Python: a compiler that it waits for is left."""
    if seconds == math.inf:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ready within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_call(case: Case, variant: Variant, row: dict[str, Any], stopwatch: Stopwatch, patience: float) -> float | None:
    """Warm up and check; the seconds of a call, or None after noting in the row why there will be no time."""
    try:
        with _within(patience):
            if variant.prepare is not None:
                variant.prepare()
            if variant.before is not None:
                variant.before()
            begin = stopwatch.clock()
            result = variant.run()
            elapsed = stopwatch.clock() - begin
        problem = None if variant.role == "yardstick" else case.check(result)
        if problem is not None:
            row["status"], row["reason"] = "failed", problem
            return None
        del result
        return stopwatch.settle(variant, elapsed)
    except Exception as error:
        _note(row, error)
        return None


def _note(row: dict[str, Any], error: Exception) -> None:
    """A bench goes on without the variant, and its row says why; that a baseline cannot run here is no error of ours."""
    failed = "error" if row["role"] == "ours" else "not run"
    row["status"] = "unsupported" if "does not support this call" in str(error) else failed
    row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _seconds_of_call(state: _Running, stopwatch: Stopwatch) -> float:
    if torch.get_num_threads() != state.row["threads"]:
        torch.set_num_threads(state.row["threads"])
    return stopwatch(state.variant, state.calls)


def _finish(state: _Running, case: Case, ceilings: Ceilings) -> None:
    row, variant, seconds = state.row, state.variant, statistics(state.samples)
    row["seconds"] = seconds.as_dict()
    flops = case.flops if variant.flops is None else variant.flops
    row["flops"], row["bytes"] = flops, case.bytes if variant.role != "yardstick" else None
    row["gflops"] = None if flops is None else flops / seconds.median / 1e9
    row["gbytes"] = None if row["bytes"] is None else row["bytes"] / seconds.median / 1e9
    if state.reads:
        pairs = zip(state.samples[-len(state.reads) :], state.reads, strict=True)
        row["read_beside"] = statistics(state.reads).median
        row["bandwidth_share"] = statistics([row["bytes"] / read / sample for sample, read in pairs]).median
    row["tokens_per_second"] = None if case.tokens is None or variant.role == "yardstick" else case.tokens / seconds.median
    row["arithmetic"] = case.arithmetic
    set_floor(row, ceilings)
    if variant.extra is not None:
        try:
            row["extra"] = variant.extra()
        except Exception as error:  # the time stands
            row["reason"] = f"further facts: {type(error).__name__}: {error}".splitlines()[0][:300]


def set_floor(row: dict[str, Any], ceilings: Ceilings) -> None:
    """Least time and share of the ceiling of a row with a time, by the ceilings known now.

    Where the bandwidth was measured beside each repetition, the share is the median of the repetitions' shares: medians of the time and
    of the bandwidth could be of different moments. A bandwidth beside it far below the run's is not that of the memory but of a disturbed
    reading (pages given back to the system, another program): then the run's counts.
    """
    best, beside = ceilings.get("read", row["threads"]), row.get("read_beside")
    if beside is not None and best is not None and beside < LEAST_BESIDE * best:
        beside = None
    floor = ceilings.floor(row["flops"], row["bytes"], row["arithmetic"], row["threads"], beside)
    for stale in ("floor_seconds", "bound", "percent_of_ceiling"):
        row.pop(stale, None)
    if floor is not None:
        row["floor_seconds"], row["bound"] = floor
        share = floor[0] / row["seconds"]["median"]
        row["percent_of_ceiling"] = 100 * (row["bandwidth_share"] if row["bound"] == "bandwidth" and beside is not None else share)


def _ratios(rows: Iterable[dict[str, Any]]) -> None:
    """For each of our rows: how many times longer each baseline of the same run took (a yardstick: our rate over its rate)."""
    rows = list(rows)
    for row in rows:
        if row["role"] != "ours" or "seconds" not in row:
            continue
        row["ratios"] = {}
        for other in rows:
            if "seconds" not in other or other is row:
                continue
            if other["role"] == "yardstick":
                if row["gflops"] and other["gflops"]:
                    row["ratios"][other["variant"]] = row["gflops"] / other["gflops"]
            else:
                row["ratios"][other["variant"]] = other["seconds"]["median"] / row["seconds"]["median"]
