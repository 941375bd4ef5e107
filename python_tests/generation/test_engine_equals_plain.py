"""The batched cached engine against the plain loops, and what it must not do: waste forwards, tokens or logits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from llada_kernels import generation
from llada_kernels.generation import Engine, LLaDA20, LLaDA21, StepRecorder, plain

from ..host_reads import host_reads
from .toy import ToyModel, assert_rows_equal_plain, random_case


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_200_random_draws_equal_the_plain_loops(first: int) -> None:
    """Tokens and forwards of every row, greedy and sampled, alone and in a batch."""
    for seed in range(first, first + 25):
        case = random_case(random.Random(seed))
        assert_rows_equal_plain(ToyModel(case["vocab"], seed=case["model_seed"]), case)


def test_the_draws_cover_what_they_should() -> None:
    """Every rule, sampling, guidance, EOS inside the output, edits, prompts of whole blocks: a draw without them proves nothing."""
    seen: dict[str, int] = {}
    for seed in range(200):
        case = random_case(random.Random(seed))
        args, block = case["args"], case["args"]["block_length"]
        marks = [args["decoding"], "batch" if len(case["prompts"]) > 1 else "alone"]
        marks += ["sampled"] * (args["temperature"] > 0) + ["guided"] * (args.get("cfg_scale", 0) > 0)
        marks += ["whole blocks"] * any(len(p) % block == 0 for p in case["prompts"])
        marks += ["editing"] * (args.get("editing_threshold") is not None) + ["queue"] * (case["max_batch"] == 1)
        for mark in marks:
            seen[mark] = seen.get(mark, 0) + 1
    wanted = ["llada2.0", "llada2.1", "low_confidence", "batch", "alone", "sampled", "guided", "whole blocks", "editing", "queue"]
    assert all(seen.get(mark, 0) >= 10 for mark in wanted), seen


@pytest.mark.parametrize("decoding", ["llada2.0", "llada2.1", "low_confidence"])
def test_a_row_does_not_depend_on_its_batch(decoding: str) -> None:
    """Bitwise the same tokens for every order, grouping and place of the prompts, with one seed per row."""
    draw = random.Random(7)
    model = ToyModel(seed=3)
    prompts = [[draw.randrange(46) for _ in range(n)] for n in (1, 5, 8, 17, 24)]
    kwargs: dict[str, Any] = {"decoding": decoding, "block_length": 8, "gen_length": 16, "temperature": 1.0}
    kwargs |= {"threshold": 0.3} if decoding != "low_confidence" else {"steps": 8}
    alone = [generation.generate(model, [p], seed=100 + i, **kwargs) for i, p in enumerate(prompts)]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        for max_batch in (None, 2):
            out = generation.generate(model, [prompts[i] for i in order], seed=[100 + i for i in order], max_batch=max_batch, **kwargs)
            assert [t.tolist() for t in out] == [alone[i][0].tolist() for i in order]
            assert out.num_forwards == [alone[i].num_forwards for i in order]


def test_seeds() -> None:
    model = ToyModel(seed=1)
    kwargs: dict[str, Any] = {"gen_length": 24, "block_length": 8, "temperature": 1.0, "threshold": 0.5}
    run = lambda seed: generation.generate(model, [1, 2, 3], seed=seed, **kwargs)[0].tolist()  # noqa: E731
    assert run(5) == run(5) != run(6)
    torch.manual_seed(11)
    first = run(None)
    assert run(None) != first, "without a seed, calls differ"
    torch.manual_seed(11)
    assert run(None) == first, "torch.manual_seed governs the seed that is drawn"
    same = generation.generate(model, [[1, 2, 3], [1, 2, 3]], seed=5, **kwargs)
    assert same[0].tolist() == same[1].tolist() == run(5)


def test_prefill_and_commit_ride_along() -> None:
    """The forwards of one row process: prompt blocks + first block, then single blocks, then finished block + next."""
    model, prompt = ToyModel(seed=2), list(range(20))
    recorder = StepRecorder(mask_id=47)
    out = generation.generate(model, prompt, gen_length=20, block_length=8, threshold=0.9, eos_id=-1, on_step=recorder)
    assert out.num_forwards == len(model.packed_tokens) == recorder.num_forwards(0)
    order = recorder.order(0, 20, 40)
    assert min(order) == 0 and sorted(set(order)) == list(range(len(set(order))))
    ends = [max(recorder.order(0, a, b)) for a, b in ((20, 24), (24, 32), (32, 40))]
    want = [8] * len(model.packed_tokens)
    want[0], want[ends[0] + 1], want[ends[1] + 1] = 24, 16, 16
    assert model.packed_tokens == want
    assert max(model.logit_rows) <= 8, "the LM head serves the block only, never a prompt or a finished block"
    assert sum(model.logit_rows) < 8 * len(model.logit_rows), "and of it only the masked positions"
    assert model.logit_rows[0] == 4
    model.logit_rows.clear()
    generation.generate(model, prompt, gen_length=20, block_length=8, editing_threshold=0.9, eos_id=-1, max_post_steps=1)
    assert model.logit_rows[0] == 4 and max(model.logit_rows) == 8, "editing reads written tokens too, but no prompt"


def test_rows_leave_early_and_make_room() -> None:
    """A row that is finished is in no further forward, and its slot and pages serve the next."""
    model = ToyModel(seed=2)
    rule = LLaDA20(threshold=0.0).bind(mask_id=47, eos_id=-1, gen_length=64, block_length=8)
    engine = Engine(model, rule, 8, num_slots=2, max_tokens=80)
    pages = engine.cache.num_free_pages
    engine.add(torch.arange(3), gen_length=5)
    engine.add(torch.arange(3), gen_length=61)
    assert engine.num_free_slots == 0
    with pytest.raises(ValueError, match="all 2 slots are taken"):
        engine.add(torch.arange(3), gen_length=5)
    (first,) = engine.step()
    assert first.row == 0 and len(first.tokens) == 5 and first.num_forwards == 1 and engine.num_free_slots == 1
    assert engine.add(torch.arange(11), gen_length=5) == 2
    (third,) = engine.step()
    assert third.row == 2 and model.packed_tokens[-1] == 16 + 16
    assert (
        third.tokens.tolist()
        == plain.llada20(model, torch.arange(11), mask_id=47, eos_id=-1, gen_length=5, block_length=8, threshold=0.0)[0].tolist()
    )
    engine.step()
    assert model.packed_tokens[-1] == 16, "only the row that is left"
    while engine.num_rows:
        last = engine.step()
    assert last[0].row == 1 and len(last[0].tokens) == 61 and engine.cache.num_free_pages == pages
    assert engine.step() == []


@pytest.mark.parametrize("decoding", ["llada2.0", "llada2.1", "speed", "low_confidence"])
def test_a_model_that_always_predicts_the_mask(decoding: str) -> None:
    """Loops are bounded and no mask token is ever written."""
    model = ToyModel(seed=4)
    model.edit_logits = lambda logits: logits.index_fill(-1, torch.tensor([47]), 1e4)
    for temperature in (0.0, 1.0):
        out = generation.generate(
            model, [[1, 2, 3], [4]], decoding=decoding, gen_length=32, block_length=16, eos_id=-1, temperature=temperature, seed=0,
            **({"steps": 32} if decoding == "low_confidence" else {}),
        )  # fmt: skip
        assert all(len(tokens) == 32 and not (tokens == 47).any() for tokens in out)
        assert max(out.num_forwards) <= 3 * (16 + 16)  # type: ignore[arg-type]


def test_editing_that_never_settles_is_bounded() -> None:
    """Logits that favour another token in every forward: each block ends after max_post_steps forwards without masks."""
    model = ToyModel(seed=4)
    model.edit_logits = lambda logits: torch.zeros_like(logits).index_fill(-1, torch.tensor([len(model.packed_tokens) % 2]), 50.0)
    out = generation.generate(model, [1, 2, 3, 4], editing_threshold=0.0, threshold=0.5, max_post_steps=3, gen_length=12, block_length=4)
    assert out.num_forwards == 3 * (1 + 3)
    settled = generation.generate(model, [1, 2, 3, 4], threshold=0.5, decoding="llada2.0", gen_length=12, block_length=4)
    assert settled.num_forwards == 3


def test_a_rule_that_does_not_finish_is_stopped() -> None:
    class Endless(LLaDA20):
        def step(self, logits: Any, tokens: Any, state: Any, index: Any = None) -> Any:
            return tokens, state, torch.zeros(len(tokens), dtype=torch.bool)

    with pytest.raises(RuntimeError, match="within its 4 steps"):
        generation.generate(ToyModel(), [1, 2], gen_length=4, block_length=4, decoding=Endless())


def test_eos_ids_in_the_prompt_are_ignored() -> None:
    model = ToyModel(seed=5)
    prompt = [46, 3, 46, 46, 5]
    for kwargs in ({"eos_early_stop": True}, {"editing_threshold": 0.3}):
        with_eos = generation.generate(model, prompt, gen_length=16, block_length=8, threshold=0.5, **kwargs)  # type: ignore[arg-type]
        without = generation.generate(model, prompt, gen_length=16, block_length=8, threshold=0.5, eos_id=-1, **kwargs)  # type: ignore[arg-type]
        assert len(with_eos[0]) and with_eos[0].tolist() == without[0].tolist()[: len(with_eos[0])]


def test_eos_early_stop_leaves_inside_a_block() -> None:
    """EOS is written first at position 0 of the block: the rest of the block is not denoised."""
    model = ToyModel(seed=5)

    def eos_first(logits: torch.Tensor) -> torch.Tensor:
        flat = torch.zeros_like(logits)
        flat[:, 5] = 1.0
        flat[0, 46] = 20.0
        return flat

    model.edit_logits = eos_first
    early = generation.generate(model, [1] * 8, gen_length=64, block_length=8, eos_early_stop=True)
    assert early[0].tolist() == [46] and early.num_forwards == 1
    late = generation.generate(model, [1] * 8, gen_length=64, block_length=8)
    assert late[0].tolist() == [46] and late.num_forwards == 8


def test_eos_early_stop_waits_for_what_comes_before_the_eos() -> None:
    """EOS is written before the positions in front of it, and an EOS in the prompt's tail must not count as the first."""
    model = ToyModel(seed=5)

    def eos_at_position_5(logits: torch.Tensor) -> torch.Tensor:
        flat = torch.zeros_like(logits)
        flat[:, 5] = 3.0
        if len(model.logit_rows) == 1:  # positions 3 to 7 of the block are masked
            flat[2, 46] = 20.0
        return flat

    model.edit_logits = eos_at_position_5
    early = generation.generate(model, [1, 46, 2], gen_length=30, block_length=8, eos_early_stop=True)
    assert early[0].tolist() == [5, 5, 46] and early.num_forwards == 3


def test_rule_objects_and_names_agree() -> None:
    model = ToyModel(seed=6)
    kwargs: dict[str, Any] = {"gen_length": 20, "block_length": 8}
    by_name = generation.generate(model, [1, 2, 3], decoding="quality", **kwargs)
    by_object = generation.generate(model, [1, 2, 3], decoding=LLaDA21(threshold=0.7, editing_threshold=0.5), **kwargs)
    by_arguments = generation.generate(model, [1, 2, 3], threshold=0.7, editing_threshold=0.5, **kwargs)
    assert by_name[0].tolist() == by_object[0].tolist() == by_arguments[0].tolist()
    assert by_name.num_forwards == by_object.num_forwards == by_arguments.num_forwards
    off = generation.generate(model, [1, 2, 3], decoding="llada2.1", editing_threshold=None, **kwargs)
    plain_20 = generation.generate(model, [1, 2, 3], editing_threshold=None, **kwargs)
    assert off[0].tolist() == plain_20[0].tolist()
    edited = generation.generate(model, [1, 2, 3], decoding="llada2.1", **kwargs)
    explicit = generation.generate(model, [1, 2, 3], threshold=0.95, editing_threshold=0.9, **kwargs)
    assert edited[0].tolist() == explicit[0].tolist() and edited.num_forwards == explicit.num_forwards


@pytest.mark.parametrize("rule", [LLaDA20(threshold=1.0), LLaDA21(threshold=1.0)])
def test_a_step_within_a_block_reads_from_the_device_once(rule: LLaDA20 | LLaDA21) -> None:
    """What it finds and how many logits the next one needs come in one copy; a block's first and last step read more."""
    bound = rule.bind(mask_id=47, eos_id=46, gen_length=16, block_length=8)
    engine = Engine(ToyModel(seed=4), bound, 8, 2, 32)
    engine.add(torch.tensor([1, 2, 3]), 16)
    engine.add(torch.tensor([5] * 8), 16)
    reads: list[int] = []
    while engine.num_rows:
        with host_reads("llada_kernels/generation/") as seen:
            engine.step()
        reads.append(len(seen))
    assert len(reads) > 12 and reads[1:4] == [1, 1, 1], "within the first block of both rows"
    assert sorted(reads)[len(reads) // 2] == 1 and max(reads) <= 4
