"""The benchmark harness: what it reports, what it refuses to report, and what it makes of result files."""

from __future__ import annotations

import copy
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_generate, bench_train, compare, report
from bench.__main__ import main as bench_command
from bench.attention_baselines import additive
from bench.bench_repeatability import repeated
from bench.ceilings import Ceilings
from bench.checks import as_exact_as, close, equal
from bench.environment import ROOT
from bench.gpu import tables
from bench.gpu.__main__ import main as gpu_main
from bench.harness import Case, Settings, Stopwatch, Variant, interleave, measure, repetitions, statistics
from bench.moe_baselines import grouped_mm_mlp
from bench.runner import read, write
from bench.shapes import mini_routing
from llada_kernels.info import all_ops
from llada_kernels.masks import DiffusionMask
from llada_kernels.ops import Routing

CEILINGS = Ceilings({"read 1": {"value": 1e9, "how": ""}, "gemm float32 1": {"value": 4e9, "how": ""}})


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Clock:
    """Time passes only when a variant says so."""

    now = 0.0
    calls: list[str]

    def __init__(self) -> None:
        self.calls = []

    def __call__(self) -> float:
        return self.now

    def variant(self, name: str, durations: list[float], value: float = 1.0, **kind: Any) -> Variant:
        left = iter(durations)

        def run() -> torch.Tensor:
            self.calls.append(name)
            self.now += next(left, durations[-1])
            return torch.full((2,), value)

        return Variant(name, run, **kind)


def case(variants: list[Variant], **options: Any) -> Case:
    return Case("op", "case", torch.float32, {"n": 2}, variants, equal([torch.ones(2)]), **options)


def test_statistics_are_those_of_numpy():
    numpy = pytest.importorskip("numpy")
    samples = [3.0, 1.0, 10.0, 2.0, 7.0, 7.5]
    got = statistics(samples)
    assert (got.median, got.p10, got.p90) == pytest.approx(tuple(numpy.percentile(samples, [50, 10, 90])))
    assert (got.best, got.reps) == (1.0, 6)
    assert statistics([4.0]).as_dict() == {"median": 4.0, "p10": 4.0, "p90": 4.0, "best": 4.0, "reps": 1}
    with pytest.raises(ValueError, match="at least one"):
        statistics([])


def test_repetitions_fill_the_time_within_bounds():
    settings = Settings(seconds=1.0, min_reps=5, max_reps=300)
    assert [repetitions(s, settings) for s in (1e-6, 0.1, 0.5, 2.0, 12.0)] == [300, 10, 5, 3, 2]
    assert [repetitions(s, settings, least=7) for s in (0.1, 0.5, 12.0)] == [10, 7, 7]
    assert repetitions(12.0, Settings.of(quick=True, threads=1), least=7) == 2


def test_a_call_of_many_seconds_is_not_repeated_and_preparing_is_not_timed():
    clock = Clock()
    minute, long, short = clock.variant("minute", [60.0]), clock.variant("long", [11.0, 13.0]), clock.variant("short", [2.0], role="ours")

    def compile_first() -> None:
        clock.now += 50.0

    prepared = clock.variant("prepared", [4.0], prepare=compile_first)
    rows = measure(case([minute, long, short, prepared]), Settings(seconds=0.0, once=20.0), CEILINGS, Stopwatch(clock))
    assert [(r["seconds"]["reps"], r["seconds"]["median"]) for r in rows] == [(1, 60.0), (2, 13.0), (3, 2.0), (3, 4.0)]
    assert [clock.calls.count(name) for name in ("minute", "long", "short", "prepared")] == [1, 3, 4, 4]
    assert rows[2]["ratios"] == {"minute": 30.0, "long": 6.5, "prepared": 2.0}


@pytest.mark.parametrize("counts", [[3], [1, 1, 1], [2, 20], [5, 300, 7], []])
def test_interleaving_keeps_counts_and_spreads_each_variant(counts):
    order = interleave(counts)
    assert [order.count(i) for i in range(len(counts))] == counts
    for i, n in enumerate(counts):
        places = [place for place, index in enumerate(order) if index == i]
        gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
        assert all(gap <= len(order) / n + len(counts) for gap in gaps)


def test_rows_state_time_rate_ceiling_and_ratios_of_the_same_run():
    clock = Clock()
    ours = clock.variant("native", [0.4, 0.45, 0.2, 0.1, 0.3], role="ours")
    slow = clock.variant("baseline", [0.4])
    other = clock.variant("unmasked", [0.5], value=7.0, role="yardstick", flops=4e8)
    rows = measure(case([ours, slow, other], flops=4e8, bytes=5e7), Settings(seconds=0.0, min_reps=3), CEILINGS, Stopwatch(clock))
    row = rows[0]
    # The first call checks and warms up, the second one estimates how many fit: neither is a sample.
    assert (row["seconds"]["reps"], row["seconds"]["best"]) == (3, pytest.approx(0.1))
    assert row["seconds"]["median"] == pytest.approx(0.2)
    assert [r["status"] for r in rows] == ["ok"] * 3
    assert row["gflops"] == pytest.approx(0.4 / row["seconds"]["median"])
    assert (row["bound"], row["floor_seconds"]) == ("arithmetic", pytest.approx(0.1))
    assert row["percent_of_ceiling"] == pytest.approx(100 * 0.1 / row["seconds"]["median"])
    assert row["ratios"]["baseline"] == pytest.approx(0.4 / row["seconds"]["median"])
    assert row["ratios"]["unmasked"] == pytest.approx(0.5 / row["seconds"]["median"])  # same FLOPs: rates are as times
    assert "ratios" not in rows[1]
    assert clock.calls[-9:] == ["native", "baseline", "unmasked"] * 3


def test_bandwidth_is_the_floor_where_it_takes_longer():
    assert CEILINGS.floor(4e8, 5e8, "float32", 1) == (0.5, "bandwidth")
    assert CEILINGS.floor(4e9, 5e8, "float32", 1) == (1.0, "arithmetic")
    assert CEILINGS.floor(None, 5e8, "float32", 1) == (0.5, "bandwidth")
    assert CEILINGS.floor(4e9, None, "bfloat16", 1) is None, "a ceiling that was not measured is not guessed"


def test_bandwidth_is_what_could_be_read_beside_each_repetition():
    class Flipping(Ceilings):
        """Every other moment twice as fast; the variant, called in between, follows it."""

        moment = 0

        def read_now(self, threads: int, size: float | None) -> float | None:
            assert (threads, size) == (1, 6e8)
            self.moment += 1
            return 1e9 if self.moment % 2 else 2e9

    clock = Clock()
    ours = clock.variant("native", [0.9, 0.8, 0.4, 0.8], role="ours")
    (row,) = measure(case([ours], bytes=6e8), Settings(seconds=0.0, min_reps=3), Flipping(CEILINGS.values), Stopwatch(clock))
    assert row["read_beside"] == 1e9 and row["bound"] == "bandwidth" and row["floor_seconds"] == pytest.approx(0.6)
    assert row["percent_of_ceiling"] == pytest.approx(75)
    # Half of the moments each: 75 % of all four pairs, while the medians (0.6 s at 1.5 GB/s) would say 67 %.
    clock = Clock()
    ours = clock.variant("native", [0.9, 0.8, 0.4, 0.8, 0.4], role="ours")
    (row,) = measure(case([ours], bytes=6e8), Settings(seconds=0.0, min_reps=4), Flipping(CEILINGS.values), Stopwatch(clock))
    assert row["percent_of_ceiling"] == pytest.approx(75) and row["read_beside"] == 1.5e9


def test_reading_beside_a_call_leaves_its_caches_alone():
    ceilings = Ceilings()
    assert ceilings.read_now(1, 1e12) is None, "nothing was measured yet"
    ceilings.measure(1, quick=True)
    assert ceilings.read_now(1, None) is None and ceilings.read_now(1, 1e6) is None
    rate = ceilings.read_now(1, 1e12)
    assert rate is None or rate > 1e8  # None: no compiler


def test_a_variant_with_wrong_values_gets_no_time_and_is_not_called_again():
    clock = Clock()
    wrong = clock.variant("native", [0.1], value=1.0 + 1e-6, role="ours")
    rows = measure(case([wrong, clock.variant("reference", [0.4])], flops=1.0), Settings(), CEILINGS, Stopwatch(clock))
    assert rows[0]["status"] == "failed" and "2 of 2 values differ" in rows[0]["reason"]
    assert not {"seconds", "gflops", "ratios", "percent_of_ceiling"} & set(rows[0])
    assert clock.calls.count("native") == 1
    assert "seconds" in rows[1]


def test_a_baseline_with_wrong_values_is_not_compared_with():
    clock = Clock()
    rows = measure(
        case([clock.variant("native", [0.1], role="ours"), clock.variant("other", [0.4], value=2.0)]),
        Settings(),
        CEILINGS,
        Stopwatch(clock),
    )
    assert rows[0]["ratios"] == {} and rows[1]["status"] == "failed"


def test_errors_and_unsupported_calls_are_rows_too():
    def unsupported() -> None:
        raise ValueError("op: backend 'native' does not support this call: no library")

    def broken() -> None:
        raise RuntimeError("boom")

    rows = measure(case([Variant("native", unsupported, "ours"), Variant("x", broken)]), Settings(), CEILINGS)
    assert [(r["status"], "seconds" in r) for r in rows] == [("unsupported", False), ("not run", False)]
    assert rows[1]["reason"] == "RuntimeError: boom"


def test_checks_find_wrong_values():
    exact, rough = [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.01])]
    check = as_exact_as(exact, rough)
    assert check(torch.tensor([1.0, 2.019])) is None
    assert "error" in (check(torch.tensor([1.0, 2.03])) or "")
    assert "error inf" in (check(torch.tensor([1.0, torch.nan])) or "")
    assert "shape" in (check(torch.ones(3)) or "")
    assert close(exact, 0.1)(torch.tensor([1.1, 2.1])) is None
    assert close(exact, 0.01)(torch.tensor([1.1, 2.1]))
    assert equal(exact)(torch.tensor([1.0, 2.0])) is None
    assert equal(exact)(torch.tensor([1.0, 2.000001]))


def test_repeatability_sees_one_bit_and_one_number_of_threads():
    signs = iter([1.0] * 7 + [-1.0] + [1.0] * 100)
    changing = repeated("sign of zero", torch.float32, lambda: [torch.zeros(3) * next(signs)], threads=1)
    assert changing.check(changing.variants[0].run()) == "1 of 20 calls with 1 threads differ from the first with " + str(
        torch.get_num_threads()
    )
    by_threads = repeated("threads", torch.float32, lambda: [torch.tensor(torch.get_num_threads())], threads=2)
    torch.set_num_threads(2)
    assert "20 of 20 calls with 1 threads differ" in str(by_threads.check(by_threads.variants[0].run()))
    assert torch.get_num_threads() == 2
    steady = repeated("steady", torch.float32, lambda: [torch.tensor([float("nan"), 1.0])], threads=2)
    assert steady.check(steady.variants[0].run()) is None
    ran = measure(steady, Settings(seconds=0.0), CEILINGS)
    assert ran[0]["extra"] == {"bitwise_equal_calls": 40, "threads": [1, 2]}


def test_routing_distributions_differ_as_stated():
    def distinct(kind: str) -> float:
        ids = mini_routing(32 * 40, kind).topk_ids.view(40, -1)
        return sum(len(block.unique()) for block in ids) / 40

    assert distinct("llada-block") == pytest.approx(69.5, abs=3)
    assert distinct("uniform") == pytest.approx(162, abs=4)
    assert distinct("zipf0.5") < distinct("uniform")
    with pytest.raises(ValueError, match="kind"):
        mini_routing(32, "zipf")


@pytest.mark.parametrize(("bench", "first", "result"), [
    (bench_generate, "official loop", ("native", torch.zeros(32, dtype=torch.int64))), (bench_train, "official", (1.0, 1.0)),
])  # fmt: skip
def test_ours_is_not_compared_with_itself_where_the_official_way_fails(bench, first, result):
    made = next(bench.cases(Settings.of(quick=True, threads=1, only="float32")))
    assert made.variants[0].name == first, "it gives what the others are compared with"
    assert "nothing to compare with" in made.check(result)


def test_the_committed_page_is_what_the_committed_results_give():
    root = Path(report.__file__).parent.parent
    machines = {path.stem: read(path) for path in (root / "bench" / "results").glob("*.json")}
    assert (root / "docs" / "performance.md").read_text() == report.markdown(machines), "python -m bench report writes it"


def test_every_op_has_a_bench():
    for op in all_ops():
        assert callable(importlib.import_module(f"bench.bench_{op}").cases), op


def row(median: float, op: str = "rms_norm", variant: str = "native", role: str = "ours", **more: Any) -> dict[str, Any]:
    seconds = {"median": median, "p10": 0.9 * median, "p90": 1.1 * median, "best": 0.9 * median, "reps": 9}
    return {
        "op": op, "case": "8 x 8", "dtype": "float32", "shapes": {}, "variant": variant, "role": role, "threads": 2, "status": "ok",
        "reason": None, "seconds": seconds, "flops": 1e9, "bytes": 1e6, "gflops": 1 / median, "gbytes": 1e-3 / median,
        "bound": "arithmetic", "percent_of_ceiling": 50.0, **more,
    }  # fmt: skip


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    facts = {
        "cpu": "Test CPU", "cpu_level": "avx2", "gpu": None, "threads": 2, "cores": 2, "memory_gib": 4.0, "last_level_cache_mib": 8,
        "platform": "Linux", "commit": "a" * 40, "dirty": False, "date": "2026-01-02 03:04 UTC", "quick": False, "load_at_start": 0.1,
        "llada_kernels": "0.1.0", "torch": "2.13.0", "python": "3.11",
    }  # fmt: skip
    bench = {"about": "About it.", "environment": facts, "ceilings": {"read 2": {"value": 5e10, "how": ""}}, "rows": list(rows)}
    return {"schema": 1, "benches": {"rms_norm": bench}}


BASE = results(row(1e-3, ratios={"reference": 4.0, "F.rms_norm": 0.8}), row(4e-3, variant="reference", role="baseline"),
               row(8e-4, variant="F.rms_norm", role="baseline"))  # fmt: skip


def test_compare_finds_what_became_slower(tmp_path, capsys):
    slower = copy.deepcopy(BASE)
    slower["benches"]["rms_norm"]["rows"][0] = row(1.5e-3, ratios={"reference": 2.7, "F.rms_norm": 0.53})
    slower["benches"]["rms_norm"]["rows"][1]["seconds"]["median"] = 9.0  # a baseline's time is nobody's regression
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(BASE))
    b.write_text(json.dumps(slower))
    assert compare.main([str(a), str(a)]) == 0
    assert compare.main([str(b), str(a)]) == 0, "faster is no regression"
    capsys.readouterr()
    assert compare.main([str(a), str(b)]) == 1
    assert "WORSE rms_norm: 8 x 8, float32, native, 2 threads: 1.000 -> 1.500 ms (1.50x)" in capsys.readouterr().out
    assert compare.main([str(a), str(b), "--threshold", "0.6"]) == 0
    assert compare.main([str(a), str(b), "--relative"]) == 1


def test_compare_needs_more_than_overlapping_spreads():
    (change,) = compare.compare(BASE, results(row(1.15e-3)), threshold=0.1)
    assert change.factor == pytest.approx(1.15) and not change.worse


def test_compare_counts_lost_rows_and_failed_checks():
    failed = row(1e-3, status="failed", reason="output 0: wrong")
    del failed["seconds"]
    assert [c.worse for c in compare.compare(BASE, results(failed))] == [True]
    assert [c.worse for c in compare.compare(BASE, results(row(1e-3, variant="reference", role="baseline")))] == [True]
    assert compare.compare(BASE, {"benches": {}}) == [], "a bench that was not run is not compared"


def test_compare_refuses_other_machines_and_other_files(tmp_path, capsys):
    other = copy.deepcopy(BASE)
    other["benches"]["rms_norm"]["environment"]["cpu"] = "Other CPU"
    a, b, c = (tmp_path / n for n in ("a.json", "b.json", "c.json"))
    a.write_text(json.dumps(BASE))
    b.write_text(json.dumps(other))
    c.write_text("[1]")
    assert compare.main([str(a), str(b)]) == 2
    assert "different machines" in capsys.readouterr().err
    assert compare.main([str(a), str(b), "--relative"]) == 0
    assert compare.main([str(a), str(c)]) == 2
    assert compare.main([str(a), str(tmp_path / "none.json")]) == 2


def test_result_files_keep_the_benches_that_were_not_run(tmp_path):
    path = tmp_path / "results" / "m.json"
    write(path, {"a": {"rows": [1]}, "b": {"rows": [2]}})
    write(path, {"b": {"rows": [3]}})
    assert read(path)["benches"] == {"a": {"rows": [1]}, "b": {"rows": [3]}}
    path.write_text("{")
    with pytest.raises(ValueError, match="not a result file"):
        read(path)


def test_the_report_comes_from_result_files_alone(tmp_path):
    failed = row(1e-3, op="rope", status="failed", reason="output 0: error")
    del failed["seconds"]
    content = copy.deepcopy(BASE)
    content["benches"]["rope"] = {**content["benches"]["rms_norm"], "rows": [failed]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "test-cpu.json").write_text(json.dumps(content))
    written = report.rewrite(tmp_path / "results", tmp_path / "docs")
    page = (tmp_path / "docs" / "performance.md").read_text()
    for text in ("## Test CPU, level avx2, 2 threads", "commit: aaaaaaaaaaaa", "torch 2.13.0", "| read | 2 | 50.0 GB/s |",
                 "**1.00 ms** (900 us - 1.10 ms) | 1000 GFLOP/s | 50 % GEMM | 4.00 ms, 4.00x | 800 us, 0.80x |",
                 "native: failed: output 0: error (8 x 8 float32)"):  # fmt: skip
        assert text in page, text
    losing = page.split("### Where we lose")[1].split("## GPU")[0]
    assert "rms_norm, 8 x 8, float32, native: 0.80x F.rms_norm" in losing and "rope" in losing and "reference" not in losing
    figures = [path for path in written if path.suffix == ".svg"]
    assert "4.00 ms, 4.00x" in page and "(n=1)" not in page
    content["benches"]["rms_norm"]["rows"][1]["seconds"]["reps"] = 1
    assert "4.00 ms (n=1), 4.00x" in report.markdown({"test-cpu": content})
    assert len(figures) == 2 and all(path.name in page for path in figures)
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in report.rewrite(tmp_path / "results", tmp_path / "docs")] == before


def test_quick_run_of_a_bench(tmp_path):
    path = tmp_path / "out.json"
    assert bench_command(["rms_norm", "--quick", "--threads", "1", "--only", "2048 forward float32", "--json", str(path)]) == 0
    (bench,) = read(path)["benches"].values()
    assert {r["case"] for r in bench["rows"]} == {"32 x 2048 forward"} and {r["dtype"] for r in bench["rows"]} == {"float32"}
    assert all(r["status"] == "ok" and r["seconds"]["median"] > 0 for r in bench["rows"])
    assert {"native", "reference", "F.rms_norm"} == {r["variant"] for r in bench["rows"]}
    assert bench["environment"]["commit"] and bench["environment"]["cpu_level"] and bench["ceilings"]["read 1"]["value"] > 0


def test_an_unknown_bench_is_an_error(capsys):
    assert bench_command(["nothing"]) == 2
    assert "unknown bench nothing" in capsys.readouterr().err


def test_the_page_names_the_benches_that_a_machine_has_no_rows_of():
    content = read(ROOT / "bench" / "results" / "amd-epyc-avx512_bf16-2-threads.json")
    content["benches"].pop("train")
    page = report.markdown({"cpu": content})
    assert re.search(r"Not measured on this machine: .*\btrain\b", page)
    assert not re.search(r"Not measured on this machine: .*\bmoe_mlp\b", page)


def test_a_baseline_that_is_not_finite_allows_nothing():
    with pytest.raises(ValueError, match="same_dtype: expected finite values"):
        as_exact_as([torch.ones(2)], [torch.tensor([1.0, torch.nan])])


def test_a_gpu_part_shows_what_was_measured_and_lists_the_rest():
    row = {
        "op": "T1 attention", "case": "16:4, 8192 tokens, forward", "dtype": "bfloat16", "shapes": {}, "variant": "triton", "role": "ours",
        "threads": 1, "device": "cuda", "status": "ok", "reason": None, "gflops": 421000.0, "gbytes": None, "bound": "arithmetic",
        "percent_of_ceiling": 54.0, "seconds": {"median": 1.3e-3, "p10": 1.2e-3, "p90": 1.4e-3, "best": 1.2e-3, "reps": 20}, "ratios": {},
    }  # fmt: skip
    environment = {
        "commit": "0" * 40, "dirty": False, "date": "2026-01-01 00:00 UTC", "quick": False, "threads": 1, "cores": 16, "memory_gib": 128.0,
        "last_level_cache_mib": 64, "load_at_start": 0.0, "cpu": "cpu", "cpu_level": "avx512", "gpu": "Some GPU", "llada_kernels": "0",
        "torch": "2", "python": "3", "platform": "Linux",
    }  # fmt: skip
    ceilings = {"gemm bfloat16 gpu": {"value": 780e12, "how": ""}}
    held = {"name": "no sync", "holds": True, "seen": "100 batches"}
    broken = {"name": "bitwise equal", "holds": False, "seen": "different bits: rope"}
    benches = {
        "gpu T1": {"about": "One document.", "environment": environment, "ceilings": ceilings, "rows": [row]},
        "gpu guards": {"about": "Guards.", "environment": environment, "ceilings": {}, "rows": [], "guards": [held, broken]},
    }
    page = report.markdown({"some-gpu": {"schema": 1, "benches": benches}})
    assert "## Some GPU\n" in page and "| triton | **1.30 ms** (1.20 ms - 1.40 ms) | 421 TFLOP/s | 54 % GEMM |" in page
    assert "| gemm bfloat16 | gpu | 780 TFLOP/s |" in page
    assert "- no sync: holds (100 batches)" in page and "- bitwise equal: DOES NOT HOLD (different bits: rope)" in page
    unmeasured = page[page.index("not measured yet") :]
    assert "| T2 | bench |" in unmeasured and "| E | model |" in unmeasured
    assert "| T1 |" not in unmeasured and "| guards |" not in unmeasured
    assert "| guards | bench |" in report.markdown({})


def test_a_broken_table_takes_no_other_with_it(tmp_path, monkeypatch):
    def broken(settings):
        yield from tables.TABLES["C"].cases(settings)
        raise RuntimeError("no room")

    monkeypatch.setitem(tables.TABLES, "A", tables.Table("Breaks.", broken))
    status = gpu_main(["tables", "A", "C", "--json", str(tmp_path / "out.json"), "--dry-run"])
    benches = read(tmp_path / "out.json")["benches"]
    assert status == 1 and benches["gpu A"]["environment"]["ended"] == "RuntimeError: no room" and benches["gpu A"]["rows"]
    assert "ended" not in benches["gpu C"]["environment"] and benches["gpu C"]["rows"]


def test_baselines_make_what_they_need_where_their_inputs_lie():
    """On the meta device, which like a GPU takes nothing from a CPU."""
    mask = DiffusionMask.block_diffusion([0, 40], 8).to("meta")
    assert additive(mask, torch.bfloat16).device.type == "meta"
    routing = Routing(*(x.to("meta") for x in mini_routing(6, "uniform", experts=8, top_k=2)))
    x, gate_up, down = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((6, 16), (8, 16, 16), (8, 16, 8)))
    assert grouped_mm_mlp(x, routing, gate_up, down).device.type == "meta"
