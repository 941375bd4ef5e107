"""The official generation runs: tokens exactly, forwards at most the official count, through each backend."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llada_kernels import Model, use_backend
from llada_kernels.generation import generate

GOLDEN = Path(__file__).parents[1] / "golden"
BACKENDS = ["native", "reference"]
#: show faults of the official code; ours has its own tests of them
FAULTS = ("QUIRK_eos_in_prompt_early", "mask_predicted")


@cache
def case(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "case.json").read_text())


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "io.safetensors")


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: Model.from_pretrained(GOLDEN / name) for name in ("generate_v20", "generate_v21", "lladamoe")}


def runs(name: str) -> list[Any]:
    chosen = (run for run in case(name)["runs"] if run.get("kind") != "forward" and run["name"] not in FAULTS)
    return [pytest.param(run, id=run["name"]) for run in chosen]


def run_named(name: str, run: str) -> dict[str, Any]:
    return next(r for r in case(name)["runs"] if r["name"] == run)


def official(name: str, run: dict[str, Any]) -> tuple[Tensor, Tensor]:
    io = tensors(name)
    return io[run["name"] + ".prompt"], io[run["name"] + ".output_tokens"]


class Trace:
    """Compares the block after every step with what the official code fed to its next forward."""

    def __init__(self, name: str, run: dict[str, Any]):
        self.blocks = tensors(name)[run["name"] + ".trace_block_inputs"]
        self.ends = tensors(name)[run["name"] + ".trace_window_end"]
        self.seen = 0

    def __call__(self, row: int, block_start: int, tokens: Tensor) -> None:
        f = self.seen
        self.seen += 1
        assert int(self.ends[f]) == block_start + len(tokens)
        if f + 1 < len(self.ends) and self.ends[f + 1] == self.ends[f]:
            assert torch.equal(self.blocks[f + 1].long(), tokens), f"after forward {f}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", runs("generate_v20"))
def test_llada20(run: dict[str, Any], backend: str, models: dict[str, Model]) -> None:
    model, (prompt, tokens) = models["generate_v20"], official("generate_v20", run)
    trace = Trace("generate_v20", run)
    with use_backend(backend):
        out = generate(model, prompt[None], on_step=trace, seed=0, **run["args"])
    assert out[0].tolist() == tokens.tolist()
    ends_inside = run["args"].get("eos_early_stop") and len(tokens) < run["args"]["gen_length"]
    assert out.num_forwards == run["num_forwards"] or (ends_inside and out.num_forwards < run["num_forwards"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_llada20_eos_in_the_prompt_is_ignored(backend: str, models: dict[str, Model]) -> None:
    """The official code returns a truncated prompt; the sane result is that of a prompt whose EOS id means nothing."""
    model, run = models["generate_v20"], run_named("generate_v20", "QUIRK_eos_in_prompt_early")
    prompt, _ = official("generate_v20", run)
    eos_id = run["args"]["eos_id"]
    assert eos_id in prompt.tolist()
    with use_backend(backend):
        out = generate(model, prompt, **run["args"])
        free = generate(model, prompt, **{**run["args"], "eos_id": -1})
    want = free[0].tolist()
    assert out[0].tolist() == (want[: want.index(eos_id) + 1] if eos_id in want else want)
    assert len(out[0]) and out[0].tolist() != prompt[: len(out[0])].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_llada20_never_writes_a_predicted_mask(backend: str) -> None:
    """The official code leaves mask tokens in the output after 22 forwards; 9 forwards finish every block."""
    model, run = Model.from_pretrained(GOLDEN / "generate_v20"), run_named("generate_v20", "mask_predicted")
    prompt, tokens = official("generate_v20", run)
    mask_id = run["args"]["mask_id"]
    with torch.no_grad():
        model.lm_head_weight[mask_id] = tensors("generate_v20")["mask_predicted.lm_head_mask_row"]
    with use_backend(backend):
        out = generate(model, prompt, **run["args"])
    assert mask_id in tokens.tolist() and mask_id not in out[0].tolist()
    assert len(out[0]) == run["args"]["gen_length"] and out.num_forwards == 9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", runs("generate_v21"))
def test_llada21(run: dict[str, Any], backend: str, models: dict[str, Model]) -> None:
    model, (prompt, tokens) = models["generate_v21"], official("generate_v21", run)
    trace = Trace("generate_v21", run)
    with use_backend(backend):
        out = generate(model, prompt[None], on_step=trace, **run["args"])
    assert out[0].tolist() == tokens.tolist()
    goes_on_after_eos = run["args"]["eos_id"] in tokens.tolist() and not run["args"]["eos_early_stop"]
    assert out.num_forwards == run["num_forwards"] or (goes_on_after_eos and out.num_forwards < run["num_forwards"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", runs("lladamoe"))
def test_lladamoe(run: dict[str, Any], backend: str, models: dict[str, Model]) -> None:
    model, io, args = models["lladamoe"], tensors("lladamoe"), run["args"]
    prompt, output = io[run["name"] + ".prompt"], io[run["name"] + ".output"]
    with use_backend(backend):
        out = generate(
            model, prompt, gen_length=args["gen"], block_length=args["block"], steps=args["steps"], cfg_scale=args["cfg"],
            mask_id=case("lladamoe")["mask_id"], eos_id=-1,
        )  # fmt: skip
    assert [t.tolist() for t in out] == output[:, prompt.shape[1] :].tolist()
    forwards = [out.num_forwards] if isinstance(out.num_forwards, int) else out.num_forwards
    assert forwards == [run["num_forwards"]] * run["batch"]


def test_all_prompts_in_one_batch(models: dict[str, Model]) -> None:
    """The official runs with equal arguments, decoded together: ragged prompts, each row as it was alone."""
    chosen = [run_named("generate_v20", name) for name in ("p5_t0.3_noeos", "p32_t0.3_noeos", "p45_t0.3_noeos")]
    prompts, tokens = zip(*(official("generate_v20", run) for run in chosen), strict=True)
    assert chosen[0]["args"] == chosen[1]["args"] == chosen[2]["args"]
    out = generate(models["generate_v20"], list(prompts), **chosen[0]["args"])
    assert [t.tolist() for t in out] == [t.tolist() for t in tokens]
    assert out.num_forwards == [run["num_forwards"] for run in chosen]
