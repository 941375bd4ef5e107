"""Block-size plans and learning rates."""

from __future__ import annotations

import json
import math

import pytest

from llada_kernels.training.schedule import LearningRate, Plan, wsd_plan


def test_wsd_plan_of_the_report():
    plan = wsd_plan(4096)
    sizes = [s.block_size for s in plan.stages]
    assert sizes == [1, 4, 32, 64, "full", 2048, 1024, 512, 256, 128, 64, 32]
    assert [round(s.fraction, 6) for s in plan.stages] == [0.05] * 4 + [0.6] + [0.02] * 6 + [0.08]


def test_wsd_plan_gives_the_share_of_sizes_that_do_not_fit_to_the_stable_phase():
    plan = wsd_plan(128)
    assert [s.block_size for s in plan.stages] == [1, 4, 32, 64, "full", 64, 32]
    assert math.isclose(plan.stages[4].fraction, 1 - 0.2 - 0.1)
    assert [s.block_size for s in wsd_plan(8, 8).stages] == [1, 4, "full", 8]


@pytest.mark.parametrize("steps", [1, 7, 100, 12345])
def test_boundaries_cover_every_step_once(steps):
    plan = wsd_plan(1024)
    edges = plan.boundaries(steps)
    assert edges[0] == 0 and edges[-1] == steps and edges == sorted(edges)
    for stage, begin, end in zip(plan.stages, edges, edges[1:], strict=False):
        for step in {begin, end - 1} if end > begin else ():
            assert plan.block_size_at(step, steps) == stage.block_size
    assert plan.block_size_at(steps + 5, steps) == 32


def test_plan_is_data_and_prints():
    plan = wsd_plan(256)
    assert Plan(json.loads(json.dumps(plan.to_list()))) == plan
    text = plan.describe(200)
    assert "block size full" in text and len(text.splitlines()) == 1 + len(plan.stages)


@pytest.mark.parametrize(
    ("stages", "message"),
    [([], "at least one"), ([(0.5, 4)], "sum to 1"), ([(1.0, 0)], "block size"), ([(1.0, "all")], "block size"),
     ([(1.5, 4), (-0.5, 4)], r"plan: expected a number in \[0, 1\]"), ([(1.0, True)], "block size"),
     ([(math.nan, 4)], "plan: expected a number")],
)  # fmt: skip
def test_bad_plans(stages, message):
    with pytest.raises(ValueError, match=message):
        Plan(stages)


@pytest.mark.parametrize("stages", ["wsd", 32, [0.5], None, [(1.0,)]])
def test_what_is_no_plan(stages):
    with pytest.raises(TypeError, match="plan: expected a Plan or "):
        Plan(stages)


def test_a_plan_of_a_plan_is_equal():
    assert Plan(wsd_plan(100)) == wsd_plan(100)
    with pytest.raises(TypeError, match="final_block_size: expected an int, got 8.0"):
        wsd_plan(100, 8.0)


def test_learning_rates():
    constant = LearningRate(1.0, 100, 10, "constant")
    assert constant.at(0) == pytest.approx(0.1) and constant.at(9) == 1.0 and constant.at(99) == 1.0
    cosine = LearningRate(1.0, 110, 10, "cosine", 0.2)
    assert cosine.at(10) == 1.0 and cosine.at(60) == pytest.approx(0.6) and cosine.at(110) == pytest.approx(0.2)
    linear = LearningRate(1.0, 100, 0, "linear")
    assert linear.at(25) == pytest.approx(0.75)
    wsd = LearningRate(1.0, 100, 10, "wsd", 0.0, 0.2)
    assert wsd.at(79) == 1.0 and wsd.at(90) == pytest.approx(0.5) and wsd.at(100) == 0.0
    with pytest.raises(ValueError, match="kind"):
        LearningRate(1.0, 10, 0, "step")
