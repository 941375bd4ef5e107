"""That the benchmark harness compares like with like: warm calls, best baselines, ceilings that mean something, wrong values found."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from bench import bench_block_attention, bench_generate, bench_lm_head_unmask, bench_moe_mlp, bench_threshold_unmask, compare, report
from bench.ceilings import Ceilings
from bench.harness import Case, Settings, Stopwatch, measure, set_floor, statistics
from bench.official import OfficialModel
from bench.shapes import bench_model

from .test_bench import BASE, CEILINGS, Clock, case, results, row

QUICK = Settings.of(quick=True, threads=1)


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quick_case(bench: Any, text: str) -> Case:
    return next(bench.cases(Settings.of(quick=True, threads=1, only=text)))


def test_no_variant_is_timed_cold_and_another_warm():
    """As of a training step, whose first call makes the optimizer's state."""
    clock = Clock()
    official, ours = clock.variant("official", [27.0, 18.0, 11.0, 13.0]), clock.variant("native", [4.0, 5.0, 3.0, 3.5], role="ours")
    rows = measure(case([official, ours], least=3), Settings(), CEILINGS, Stopwatch(clock))
    assert [(r["seconds"]["reps"], r["seconds"]["median"]) for r in rows] == [(3, pytest.approx(13.0)), (3, pytest.approx(3.5))]
    assert clock.calls == ["official", "native", "official", "native", "official", "native", "official", "native"]


def test_not_even_a_very_slow_first_step_is_compared_with_warm_ones():
    clock = Clock()
    official, ours = clock.variant("official", [90.0, 40.0]), clock.variant("native", [4.0], role="ours")
    rows = measure(case([official, ours], least=3), Settings(once=60.0), CEILINGS, Stopwatch(clock))
    assert [(r["seconds"]["reps"], r["seconds"]["median"]) for r in rows] == [(1, 40.0), (3, 4.0)]


def test_the_state_that_a_call_finds_is_made_before_each_and_not_timed():
    clock = Clock()

    def write() -> None:
        clock.now += 100.0
        clock.calls.append("written")

    variants = [clock.variant("native", [0.5], role="ours", before=write), clock.variant("softmax", [1.0], before=write)]
    rows = measure(case(variants), Settings(), CEILINGS, Stopwatch(clock))
    assert [r["seconds"]["median"] for r in rows] == [pytest.approx(0.5), pytest.approx(1.0)]
    assert clock.calls[::2] == ["written"] * (len(clock.calls) // 2) and "written" not in clock.calls[1::2]


def test_logits_just_written_are_those_of_the_call():
    state = quick_case(bench_threshold_unmask, "logits just written float32")
    for variant in state.variants:
        assert variant.before is not None
        variant.before()
        assert state.check(variant.run()) is None


def test_cases_whose_times_spread_are_repeated_more_often_but_for_the_reference():
    clock = Clock()
    variants = [
        clock.variant("native", [2.0], role="ours"), clock.variant("native, 1 thread", [2.0], role="ours", threads=1),
        clock.variant("reference", [9.0]), clock.variant("F.grouped_mm", [9.0]),
    ]  # fmt: skip
    rows = measure(case(variants, least=7), Settings(), CEILINGS, Stopwatch(clock))
    assert [r["seconds"]["reps"] for r in rows] == [7, 3, 2, 7]


@pytest.mark.parametrize(("beside", "share"), [(9e8, 80.0), (5e8, 80.0), (1e8, 40.0)])
def test_a_disturbed_reading_beside_a_call_sets_no_ceiling(beside, share):
    """0.9 and 0.5 of the run's bandwidth are states of the machine, a tenth is none: there the run's ceiling counts."""
    held = {
        "flops": None, "bytes": 4e8, "arithmetic": "float32", "threads": 1, "read_beside": beside, "bandwidth_share": 0.8,
        "seconds": {"median": 1.0},
    }  # fmt: skip
    set_floor(held, CEILINGS)
    assert held["bound"] == "bandwidth" and held["percent_of_ceiling"] == pytest.approx(share)


class Products(Ceilings):
    """Ceilings whose products have given rates, in the order of measuring."""

    def __init__(self, rates: list[float]) -> None:
        super().__init__({"gemm bfloat16 1": {"value": 400.0, "how": ""}, "gemm bfloat16 2": {"value": 800.0, "how": ""}})
        self.values |= {"gemm float32 1": {"value": 203.0, "how": ""}, "gemm float32 2": {"value": 197.0, "how": ""}}
        self.rates, self.measured = rates, []

    def _gemm(self, dtype: torch.dtype, threads: int, sizes: list[int], seconds: float) -> None:
        self.measured.append((dtype, threads))
        if self.rates:
            self.note(f"gemm {str(dtype).removeprefix('torch.')} {threads}", self.rates.pop(0), "")

    def _read(self, *_: Any) -> None:
        pass


def test_a_ceiling_of_two_threads_below_that_of_one_is_measured_again_or_dropped():
    machine = Products([150.0, 203.0, 410.0, 999.0])
    machine.settle(2)
    assert machine.get("gemm float32", 2) == 410.0 and machine.measured == [(torch.float32, 2)] * 3, "until it is above, and no longer"
    sharing_a_core = Products([150.0] * 30)
    sharing_a_core.settle(2, tries=5)
    assert sharing_a_core.get("gemm float32", 2) is None and len(sharing_a_core.measured) == 5
    assert sharing_a_core.get("gemm bfloat16", 2) == 800.0 and sharing_a_core.get("gemm float32", 1) == 203.0
    few_units = Products([250.0] * 30)
    few_units.settle(2, tries=5)
    assert few_units.get("gemm float32", 2) == 250.0 and len(few_units.measured) == 5, "hardly more than one thread: tried, and kept"
    alone = Products([])
    alone.settle(1)
    assert not alone.measured


def test_products_of_both_dtypes_are_measured_again_between_cases():
    machine = Products([])
    machine.again(2)
    assert machine.measured == [(torch.bfloat16, 2), (torch.float32, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_of_the_official_experts_give_the_same_bits(dtype):
    official = OfficialModel(bench_model(dtype, small=True))
    layer = next(m for m in official.modules() if type(m).__name__ == "MoE")
    called: list[int] = []
    for i, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda *_, i=i: called.append(i))
    ids = torch.randint(0, 100, (1, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = official.train()(ids, None, torch.arange(3))
        assert called == list(range(len(layer.experts)))
        called.clear()
        assert torch.equal(official.eval()(ids, None, torch.arange(3)), trained)
        assert called and len(called) < len(layer.experts), "inference does not call experts that no token chose"


def test_wrong_tokens_fail_in_bf16_too():
    made = quick_case(bench_generate, "bfloat16")
    official, uncached, native = made.variants
    assert made.check(official.run()) is None
    assert made.check(uncached.run()) is None
    way, tokens = native.run()
    assert way == "native" and made.check((way, tokens)) is None
    sevens = torch.full_like(tokens, 7)
    assert "other tokens" in made.check((way, sevens))


def test_a_decoding_that_always_fills_in_the_same_token_fails(monkeypatch):
    made = quick_case(bench_generate, "bfloat16")
    assert made.check(made.variants[0].run()) is None
    decode = bench_generate.generate

    def stuck(*args: Any, **options: Any) -> Any:
        out = decode(*args, **options)
        out[0].fill_(7)
        return out

    monkeypatch.setattr(bench_generate, "generate", stuck)
    result = made.variants[2].run()
    assert bool((result[1] == 7).all())
    assert "are the official choice" in made.check(result)


def test_generation_accepts_by_threshold_and_all_ways_say_how_often():
    rows = measure(quick_case(bench_generate, "float32"), QUICK, CEILINGS)
    assert [r["status"] for r in rows] == ["ok"] * 3
    assert len({r["extra"]["forwards"] for r in rows}) == 1, "in fp32 all take the same way"
    assert all(1.5 <= r["extra"]["tokens_per_forward"] <= 3 for r in rows)


def test_quantised_experts_state_their_error_and_may_not_exceed_it():
    made = quick_case(bench_moe_mlp, "int8")
    ours = made.variants[0]
    right = ours.run()
    assert made.check(right) is None
    assert "allowed 0.012" in made.check(right * 1.012), "1 % of their own and 1.2 % more"
    (shown, *_) = measure(made, QUICK, CEILINGS)
    assert 0.005 < shown["extra"]["relative_error"] < 0.012
    page = report.markdown({"m": results(shown)})
    assert f"error {100 * shown['extra']['relative_error']:.2f} %" in page


def test_flex_attention_stands_beside_packed_documents_and_fp32():
    full = Settings()
    packed = bench_block_attention.packed_forward("packed", [64, 96], torch.bfloat16, full)
    mask = bench_block_attention.DiffusionMask.block_diffusion([0, 64], bench_block_attention.BLOCK)
    single = bench_block_attention.forward("training", mask, torch.float32, full)
    for made in (packed, single):
        flex = [v for v in made.variants if v.name == "FlexAttention"]
        assert len(flex) == 1 and flex[0].prepare is not None and flex[0].role == "baseline"


def test_tokens_drawn_at_temperature_one_are_compared():
    made = quick_case(bench_lm_head_unmask, "temperature 1")
    by_name = {v.name: v for v in made.variants}
    expected = by_name["reference"].run()
    assert made.check(expected) is None and made.check(by_name["F.linear + threshold_unmask"].run()) is None
    assert int((expected.tokens == expected.tokens[0, 0]).sum()) < expected.tokens.numel(), "they differ between positions"
    assert made.check(expected._replace(tokens=expected.tokens.roll(1))) is not None
    assert made.check(expected._replace(confidence=expected.confidence * 1.01)) is not None


def run_of(factor: float, seed: int) -> dict[str, Any]:
    """117 rows whose repetitions spread by 5 % and of which every eighth met a neighbour."""
    noise = random.Random(seed)
    rows = []
    for i in range(117):
        true, reps = factor * 1e-3 * (1 + i), 5 + i % 40
        samples = [true * noise.lognormvariate(0, 0.05) * (1 + (noise.random() < 0.125)) for _ in range(reps)]
        rows.append(row(1.0, op=f"op {i}", seconds=statistics(samples).as_dict()))
    return results(*rows)


def test_compare_sees_a_slowdown_of_all_rows_and_none_between_equal_runs():
    before = run_of(1.0, 1)
    slower = copy.deepcopy(before)
    for held in slower["benches"]["rms_norm"]["rows"]:
        held["seconds"] = {k: v if k == "reps" else 1.3 * v for k, v in held["seconds"].items()}
    assert all(c.worse for c in compare.compare(before, slower)), "the same run, 1.3 times as long"
    assert sum(c.worse for c in compare.compare(before, run_of(1.3, 2))) >= 0.9 * 117, "another run, 1.3 times as long"
    for seed in range(2, 12):
        assert sum(c.worse for c in compare.compare(before, run_of(1.0, seed))) <= 2, seed


def test_compare_reports_missing_benches(tmp_path, capsys):
    whole = copy.deepcopy(BASE)
    whole["benches"]["rope"] = copy.deepcopy(BASE["benches"]["rms_norm"])
    for held in whole["benches"]["rope"]["rows"]:
        held["op"] = "rope"
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    compare_files = lambda *options: compare.main([str(a), str(b), *options])  # noqa: E731
    a.write_text(report_json(whole))
    b.write_text(report_json(BASE))
    assert compare_files() == 1
    assert "MISSING rope" in (shown := capsys.readouterr().out) and "1 benches missing" in shown
    assert compare_files("--partial") == 0
    b.write_text(report_json({**BASE, "benches": {}}))
    assert compare_files() == 1
    assert compare_files("--partial") == 2, "nothing to compare"
    other_case = copy.deepcopy(BASE)
    other_case["benches"]["rms_norm"]["rows"][0]["case"] = "9 x 9"
    assert [c.worse for c in compare.compare(BASE, other_case)] == [True]
    assert compare.compare(BASE, other_case, partial=True) == []


def test_compare_states_how_the_baselines_moved(tmp_path, capsys):
    after = copy.deepcopy(BASE)
    after["benches"]["rms_norm"]["rows"][1]["seconds"]["median"] *= 9  # the reference is ours to change
    after["benches"]["rms_norm"]["rows"][2]["seconds"]["median"] *= 1.5
    assert compare.drift(BASE, after) == (pytest.approx(1.5), 1)
    assert compare.drift(BASE, {"benches": {}}) == (1.0, 0)


def report_json(content: dict[str, Any]) -> str:
    import json

    return json.dumps(content)


def test_the_page_flags_what_is_above_its_ceiling_and_shows_spread():
    seconds = {"median": 2.97, "p10": 1.3, "p90": 3.1, "best": 1.21, "reps": 7}
    ours = row(0.88, percent_of_ceiling=110.0, ratios={"F.rms_norm": 3.375})
    page = report.markdown({"m": results(ours, row(1.0, variant="F.rms_norm", role="baseline", seconds=seconds))})
    assert "| 110 % GEMM (!) | 2.97 s (best 1.21 s), 3.38x |" in page and "(792 ms - 968 ms)" in page
    assert "(!)" not in report.markdown({"m": BASE}).split("## Test CPU")[1]


def test_the_page_gives_peak_memory_in_both_units():
    page = report.markdown(
        {"m": results(row(1.0, extra={"peak_bytes": 12_100_000_000}), row(2.0, op="b", extra={"peak_bytes": 3_000_000}))}
    )
    assert "peak 12.1 GB (11.3 GiB)" in page and "peak 3.00 MB (2.86 MiB)" in page


def test_the_page_lists_the_levels_that_were_never_measured():
    line = "CPU levels that were never measured: amx, avx512_bf16, avx512, portable"
    assert line in report.markdown({"m": BASE}), "of Test CPU, which is avx2"
    gpu = copy.deepcopy(BASE)
    gpu["benches"] = {"gpu T1": gpu["benches"]["rms_norm"]}
    gpu["benches"]["gpu T1"]["environment"]["cpu_level"] = "amx"
    assert line in report.markdown({"m": BASE, "gpu": gpu}), "the host of a GPU measured nothing of its own"
