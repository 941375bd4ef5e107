"""What ``generate`` accepts, which defaults it chooses, and how it refuses the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llada_kernels import generation
from llada_kernels.generation import GenerationOutput, LLaDA20, LLaDA21, LowConfidence, rules
from llada_kernels.generation.api import resolve_rule
from llada_kernels.generation.inputs import special_ids
from llada_kernels.ops.threshold_unmask import Unmasked

from .toy import ToyModel

SHORT: dict[str, Any] = {"gen_length": 8, "block_length": 4}


def generate(inputs: Any, model: Any = None, **kwargs: Any) -> GenerationOutput:
    return generation.generate(model or ToyModel(), inputs, **{**SHORT, **kwargs})


def test_forms_of_inputs() -> None:
    """A list, a tensor, a batch of one, and padding on either side are the same prompt."""
    want = generate([1, 2, 3])[0].tolist()
    assert isinstance(generate([1, 2, 3]).num_forwards, int)
    assert generate(torch.tensor([1, 2, 3]))[0].tolist() == want
    assert generate(torch.tensor([[1, 2, 3]], dtype=torch.int32))[0].tolist() == want
    padded, real = torch.tensor([[46, 46, 1, 2, 3], [1, 2, 3, 46, 46]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    out = generate(padded, attention_mask=real)
    assert [t.tolist() for t in out] == [want, want] and len(out.num_forwards) == 2  # type: ignore[arg-type]
    out = generate([torch.tensor([1, 2, 3]), [4]])
    assert out[0].tolist() == want and out[1].tolist() == generate([4])[0].tolist()
    assert len(out) == 2 and [t.tolist() for t in out[0:1]] == [want] and out[0].dtype == torch.int64
    assert out.tokens_per_forward == sum(len(t) for t in out) / sum(out.num_forwards)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ([], {}, "inputs: expected at least one prompt, got an empty batch"),
        (torch.zeros(0, 3, dtype=torch.int64), {}, "inputs: expected at least one prompt"),
        ([[]], {}, "inputs: expected at least one token, got an empty prompt"),
        ([[1], []], {}, r"inputs\[1\]: expected at least one token"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), {}, r"inputs: expected shape \[S\] or \[B, S\], got \(2, 2, 2\)"),
        ([1, 47], {}, "inputs: expected a prompt without the mask token 47, got one at position 1"),
        ([[1], [2, 48]], {}, r"inputs\[1\]: expected token ids in \[0, 48\), got 48 at position 1"),
        ([-1], {}, r"inputs: expected token ids in \[0, 48\), got -1 at position 0"),
        ([[2**70]], {}, rf"^inputs: expected token ids in \[0, 48\), got {2**70} at position 0"),
        ([1, -(2**70)], {}, rf"^inputs: expected token ids in \[0, 48\), got -{2**70} at position 1"),
        ([[1], [2, 3, 2**63]], {}, rf"^inputs\[1\]: expected token ids in \[0, 48\), got {2**63} at position 2"),
        (torch.zeros(0, 3).long(), {"attention_mask": torch.zeros(0, 3)}, "inputs: expected at least one prompt, got an empty batch"),
        (torch.zeros(1, 0).long(), {"attention_mask": torch.zeros(1, 0)}, "inputs: expected at least one token, got an empty prompt"),
        (torch.zeros(2, 0).long(), {"attention_mask": torch.zeros(2, 0)}, r"inputs\[0\]: expected at least one token"),
        (torch.zeros(0).long(), {"attention_mask": torch.zeros(0)}, "inputs: expected at least one token, got an empty prompt"),
        ([1], {"seed": torch.tensor(-1)}, r"seed: expected numbers in \[0, 2\*\*63\), got -1"),
        ([1], {"seed": 2**63}, r"seed: expected numbers in \[0, 2\*\*63\), got 9223372036854775808"),
        (torch.ones(1, 3).long(), {"attention_mask": torch.ones(3)}, r"attention_mask: expected shape \(1, 3\)"),
        (torch.ones(1, 3).long(), {"attention_mask": torch.tensor([[1, 0, 1]])}, r"attention_mask\[0\].*holes"),
        (torch.ones(1, 3).long(), {"attention_mask": torch.zeros(1, 3)}, r"attention_mask\[0\].*got none"),
        ([[1]], {"attention_mask": torch.ones(1, 1)}, "attention_mask: expected None for a list"),
        ([1], {"threshold": 1.5}, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ([1], {"threshold": float("nan")}, "threshold: .*got nan"),
        ([1], {"threshold": -0.1}, "threshold: .*got -0.1"),
        ([1], {"editing_threshold": 2.0}, r"editing_threshold: expected a number in \[0, 1\], got 2.0"),
        ([1], {"editing_threshold": -1.0}, "editing_threshold: .*got -1.0"),
        ([1], {"gen_length": 0}, "gen_length: expected at least 1, got 0"),
        ([1], {"block_length": 0}, "block_length: expected at least 1, got 0"),
        ([1], {"steps": 0}, "steps: expected at least 1, got 0"),
        ([1], {"minimal_topk": 9}, "minimal_topk: expected at most gen_length = 8 .*got 9"),
        ([1], {"minimal_topk": 0}, "minimal_topk: expected at least 1, got 0"),
        ([1], {"temperature": -1.0}, "temperature: .*got -1.0"),
        ([1], {"temperature": float("inf")}, "temperature: .*got inf"),
        ([1], {"top_k": -1}, "top_k: .*got -1"),
        ([1], {"top_p": 0.0}, "top_p: .*got 0.0"),
        ([1], {"max_batch": 0}, "max_batch: expected at least 1, got 0"),
        ([1], {"seed": -1}, r"seed: expected numbers in \[0, 2\*\*63\), got -1"),
        ([1], {"seed": [1, 2]}, r"seed: expected one number or one per prompt \(1\), got 2"),
        ([1], {"mask_id": 48}, r"mask_id: expected an id in \[0, 48\), got 48"),
        ([1], {"eos_id": 47}, "eos_id: expected other ids than mask_id, got 47 for both"),
        ([1], {"eos_id": [1, 47]}, "eos_id: expected other ids than mask_id, got 47 for both"),
        ([1], {"eos_id": []}, r"eos_id: expected at least one id \(-1 for none\), got none"),
        ([1], {"editing_threshold": 0.5, "num_to_transfer": 0}, "num_to_transfer: expected at least 1, got 0"),
        ([1], {"editing_threshold": 0.5, "max_post_steps": -1}, "max_post_steps: expected at least 0, got -1"),
        ([1], {"num_to_transfer": 2}, "num_to_transfer: expected no value, decoding 'llada2.0' does not use it, got 2"),
        ([1], {"decoding": "llada2.0", "editing_threshold": 0.5}, "editing_threshold: expected no value"),
        ([1], {"cfg_scale": 1.0}, "cfg_scale: expected no value"),
        ([1], {"remasking": "random"}, "remasking: expected no value"),
        ([1], {"decoding": "best"}, "decoding: expected one of llada2.0, .*got 'best'"),
        ([1], {"decoding": LLaDA20(), "threshold": 0.5}, "decoding: .*got also threshold"),
        ([1], {"decoding": "low_confidence", "threshold": 0.5}, "threshold: expected no value"),
        ([1], {"decoding": "low_confidence", "remasking": "high"}, "remasking: expected 'low_confidence' or 'random', got 'high'"),
        ([1], {"decoding": "low_confidence", "gen_length": 9}, "gen_length: expected a multiple of block_length = 4, got 9"),
        ([1], {"decoding": "low_confidence", "steps": 7}, "steps: expected a multiple of the 2 blocks .*got 7"),
        ([1], {"decoding": "low_confidence", "cfg_scale": -1.0}, "cfg_scale: .*got -1.0"),
    ],
)  # fmt: skip
def test_bad_values(inputs: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(inputs, **kwargs)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ("text", {}, "inputs: expected a tensor or a list of prompts, got str"),
        ([["a"]], {}, r"inputs\[0\]: expected an integer token id, got str 'a'"),
        (torch.ones(1, 3), {}, "inputs: expected integer token ids, got torch.float32"),
        ([1], {"gen_length": 8.0}, "gen_length: expected an int, got float"),
        ([1], {"seed": 1.5}, "seed: expected an int, one per prompt or None, got float 1.5"),
        ([1], {"seed": "a"}, "seed: expected an int, one per prompt or None, got str 'a'"),
        ([1], {"seed": True}, "seed: expected an int, one per prompt or None, got bool True"),
        ([[1], [2]], {"seed": [1, "b"]}, "seed: expected an int, one per prompt or None, got str 'b'"),
        ([1], {"seed": torch.tensor(1.5)}, "seed: expected an int, one per prompt or None, got Tensor"),
        ([1], {"seed": torch.tensor([[1]])}, "seed: expected an int, one per prompt or None, got Tensor"),
        ([1], {"eos_id": [1, "a"]}, "eos_id: expected an int, several or None, got str 'a'"),
        ([1], {"eos_id": 1.0}, "eos_id: expected an int, several or None, got float 1.0"),
        ([1], {"mask_id": "a"}, "mask_id: expected an int or None, got str 'a'"),
        ([1], {"steps": 2.5}, "steps: expected an int, got float 2.5"),
        ([1], {"steps": "3"}, "steps: expected an int, got str '3'"),
        ([1], {"steps": True}, "steps: expected an int, got bool True"),
        ([1], {"decoding": "low_confidence", "steps": 2.5}, "steps: expected an int, got float 2.5"),
        ([1], {"decoding": "low_confidence", "cfg_scale": "x"}, "cfg_scale: expected a number, got str 'x'"),
        ([1], {"decoding": "low_confidence", "remasking": 3}, "remasking: expected a str, got int 3"),
        ([1], {"minimal_topk": 1.5}, "minimal_topk: expected an int, got float 1.5"),
        ([1], {"eos_early_stop": "no"}, "eos_early_stop: expected True or False, got str 'no'"),
        ([1], {"temperature": "hot"}, "temperature: expected a number, got str 'hot'"),
        ([1], {"temperature": torch.zeros(2)}, "temperature: expected a number, got Tensor"),
        ([1], {"top_k": 1.5}, "top_k: expected an int or None, got float 1.5"),
        ([1], {"top_p": "x"}, "top_p: expected a number or None, got str 'x'"),
        ([1], {"threshold": "x"}, "threshold: expected a number, got str 'x'"),
        ([1], {"editing_threshold": "x"}, "editing_threshold: expected a number or None, got str 'x'"),
        ([1], {"editing_threshold": 0.5, "max_post_steps": 1.5}, "max_post_steps: expected an int, got float 1.5"),
        ([1], {"editing_threshold": 0.5, "num_to_transfer": "2"}, "num_to_transfer: expected an int, got str '2'"),
        ([1], {"decoding": LLaDA20}, "decoding: expected the name of a rule or a rule object"),
        (torch.ones(1, 3).long(), {"attention_mask": [[1, 1, 1]]}, "attention_mask: expected a tensor, got list"),
    ],
)
def test_bad_types(inputs: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        generate(inputs, **kwargs)


def test_numbers_that_stand_for_an_int() -> None:
    """0-d integer tensors and a tensor of seeds are as good as ints."""
    sampled: dict[str, Any] = {"temperature": 1.0, "eos_id": -1}
    want = generate([1, 2, 3], seed=5, **sampled)[0].tolist()
    assert generate([1, 2, 3], seed=torch.tensor(5), **sampled)[0].tolist() == want
    assert generate([1, 2, 3], seed=[torch.tensor(5)], **sampled)[0].tolist() == want
    both = generate([[1, 2, 3], [1, 2, 3]], seed=torch.tensor([5, 6]), **{**sampled, "eos_id": torch.tensor(-1)})
    assert both[0].tolist() == want and both[1].tolist() == generate([1, 2, 3], seed=6, **sampled)[0].tolist() != want


def test_bad_models() -> None:
    causal = ToyModel()
    causal.config.causal = True
    with pytest.raises(ValueError, match="model: expected a diffusion model, got a causal one"):
        generate([1], causal)


class Watching(ToyModel):
    """Spoils the logits of one absolute position of the row that begins with ``first`` in its ``forward``-th forward."""

    def __init__(self, first: int, position: int, forward: int, value: float) -> None:
        super().__init__()
        self.where, self.countdown, self.value = (first, position), forward, value

    def forward(self, input_ids: torch.Tensor, *, mask: Any = None, cache: Any = None, logits_to_keep: Any = None) -> Any:
        positions, (first, position) = mask.position_ids, self.where
        rows = mask.cu_query_lens[:-1].tolist() if mask.kind == "cached" else (positions == 0).nonzero().flatten().tolist()
        ends = [*rows[1:], len(input_ids)]
        out = super().forward(input_ids, mask=mask, cache=cache, logits_to_keep=logits_to_keep)
        for slot, (begin, end) in enumerate(zip(rows, ends, strict=True)):
            if end > begin and positions[begin] == 0:
                self.firsts = getattr(self, "firsts", {}) | {slot: int(input_ids[begin])}
            here = (logits_to_keep >= begin) & (logits_to_keep < end) & (positions[logits_to_keep] == position)
            if end > begin and self.firsts[slot] == first and here.any():
                self.countdown -= 1
                if self.countdown < 0:
                    out.logits[here, 3] = self.value
        return out


@pytest.mark.parametrize("decoding", ["llada2.0", "llada2.1", "low_confidence"])
@pytest.mark.parametrize("max_batch", [1, 2, None])
@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), r"\+inf")])
def test_bad_logits_are_named_as_the_caller_counts(decoding: str, max_batch: int | None, value: float, name: str) -> None:
    """The row is the prompt's number, though it waited in a queue; the position counts from the row's start, though the sampler
    saw only what is still masked of a later block."""
    prompts = [[1, 2, 3], [4], [7, 8, 9, 10, 11]]
    options: dict[str, Any] = {"decoding": decoding, "max_batch": max_batch, "eos_id": -1, "gen_length": 12}
    options |= {"steps": 12} if decoding == "low_confidence" else {"threshold": 1.0}
    plan = Watching(7, 11, 10**6, value)
    generate(prompts, plan, **options)
    reads = 10**6 - plan.countdown
    assert reads >= 2, "the position is read again after others of its block were unmasked"
    for forward in (0, reads - 1):
        with pytest.raises(ValueError, match=rf"^logits: expected finite numbers, got {name} in row 2, position 11 \(prompt of 5 "):
            generate(prompts, Watching(7, 11, forward, value), **options)


def test_other_errors_of_a_step_pass_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*args: Any, **named: Any) -> Unmasked:
        raise ValueError("threshold: expected a better one")

    monkeypatch.setattr(rules, "threshold_unmask", refusing)
    with pytest.raises(ValueError, match="^threshold: expected a better one$"):
        generate([1])


def test_bad_logits_that_the_sampler_only_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sampler does not raise (GPU), it marks the row with counts of -1, and the engine raises."""

    def marking(logits: torch.Tensor, tokens: torch.Tensor, *rest: Any, **named: Any) -> Unmasked:
        counts = torch.zeros(len(tokens), 2, dtype=torch.int32)
        counts[-1] = -1
        return Unmasked(tokens, torch.zeros_like(tokens, dtype=torch.float32), counts)

    monkeypatch.setattr(rules, "threshold_unmask", marking)
    with pytest.raises(ValueError, match=r"logits: expected finite numbers, .*in rows \[2\]"):
        generate([[1], [2], [3]])


def test_the_rule_that_family_and_arguments_choose() -> None:
    assert resolve_rule("llada2", None, {}) == LLaDA20(threshold=0.95, steps=32, minimal_topk=1, eos_early_stop=False)
    assert resolve_rule("llada2", None, {"editing_threshold": None}) == LLaDA20()
    assert resolve_rule("llada2", None, {"editing_threshold": 0.0, "steps": 16}) == LLaDA21(0.0, None, None, None, None, 0.95, 0.0, 16, 1)
    assert resolve_rule("llada2", "llada2.1", {}) == LLaDA21(threshold=0.95, editing_threshold=0.9)
    assert resolve_rule("llada2", "llada2.1", {"editing_threshold": None}).editing_threshold is None  # type: ignore[attr-defined]
    assert resolve_rule("llada2", "quality", {}) == LLaDA21(threshold=0.7, editing_threshold=0.5)
    assert resolve_rule("llada2", "speed", {"threshold": 0.6}) == LLaDA21(threshold=0.6, editing_threshold=0.0)
    assert resolve_rule("lladamoe", None, {}) == LowConfidence(steps=128, remasking="low_confidence", cfg_scale=0.0)
    assert LLaDA20(minimal_topk=4).bind(mask_id=1, eos_id=2, gen_length=64, block_length=32).steps == 16


def test_default_lengths() -> None:
    """2048 tokens in blocks of 32 for LLaDA2, 128 in one block for LLaDA-MoE; an EOS ends the row long before."""
    model = ToyModel(family="llada2")
    model.edit_logits = lambda logits: torch.zeros_like(logits).index_fill(-1, torch.tensor([46]), 50.0)
    shapes: list[int] = []
    generation.generate(model, [1, 2], on_step=lambda row, start, tokens: shapes.append(len(tokens)))
    assert shapes == [32] and model.packed_tokens == [32]
    moe = ToyModel(family="lladamoe")
    moe.edit_logits = model.edit_logits
    shapes.clear()
    out = generation.generate(moe, [1, 2], on_step=lambda row, start, tokens: shapes.append(len(tokens)))
    assert shapes == [128] * 128 and moe.packed_tokens == [130] * 128 and out[0].tolist() == [46]


def test_where_the_ids_come_from() -> None:
    config = SimpleNamespace(vocab_size=160000, mask_token_id=None, eos_token_id=None)
    assert special_ids(SimpleNamespace(config=config), None, None) == (156895, 156892)
    config.mask_token_id, config.eos_token_id = 10, 11
    assert special_ids(SimpleNamespace(config=config), None, None) == (10, 11)
    both = SimpleNamespace(config=config, generation_config={"mask_token_id": 20, "eos_token_id": [21, 22]})
    assert special_ids(both, None, None) == (20, 21)
    both.generation_config = SimpleNamespace(eos_token_id=23)
    assert special_ids(both, None, None) == (10, 23)
    assert special_ids(both, 5, -1) == (5, -1)
    assert special_ids(both, 5, [6, 7]) == (5, (6, 7)) and special_ids(both, 5, [6]) == (5, 6)
    out = generate([1, 2], decoding=LLaDA20(threshold=0.1, mask_id=40, eos_id=-1))
    assert not (out[0] == 40).any() and len(out[0]) == 8


@pytest.mark.parametrize("decoding", ["llada2.0", "llada2.1", "low_confidence"])
@pytest.mark.parametrize("early", [False, True])
def test_any_of_several_eos_ids_ends_a_row(decoding: str, early: bool) -> None:
    """What is generated does not depend on where it will be cut."""
    prompts, options = [[1, 2, 3], [4], [7, 8, 9, 10, 11]], {"decoding": decoding, "gen_length": 24, "eos_early_stop": early}
    if decoding == "low_confidence":
        options["steps"] = 24
    whole = [row.tolist() for row in generate(prompts, eos_id=-1, **options)]
    first, second = whole[0][9], whole[1][5]
    assert first != second
    ids: list[Any] = [[first, second], (second, first, -1), torch.tensor([first, second])]
    for eos_id in ids:
        for row, through in zip(generate(prompts, eos_id=eos_id, **options), whole, strict=True):
            ends = [i for i, token in enumerate(through) if token in (first, second)]
            assert row.tolist() == (through[: ends[0] + 1] if ends else through)
    assert [row.tolist() for row in generate(prompts, eos_id=[first], **options)] == [
        row.tolist() for row in generate(prompts, eos_id=first, **options)
    ]


def test_several_eos_ids_save_forwards_and_may_be_the_rules() -> None:
    model = ToyModel()
    whole = generate([1, 2, 3], model, eos_id=-1, gen_length=40)
    end = int(whole[0][10])
    stopped = generate([1, 2, 3], model, eos_id=[46, end], gen_length=40)
    assert stopped.num_forwards < whole.num_forwards and stopped[0][-1] == end  # type: ignore[operator]
    by_rule = generate([1, 2, 3], model, decoding=LLaDA20(eos_id=(46, end)), gen_length=40)
    assert by_rule[0].tolist() == stopped[0].tolist()


def test_arrays_and_numbers_of_numpy() -> None:
    """What tokenizers and data sets give."""
    want = generate([1, 2, 3])[0].tolist()
    array = np.array([1, 2, 3])
    inputs: list[Any] = [array, array.astype(np.int32), list(array), tuple(array), [array], [list(array)], array[None]]
    for given in inputs:
        assert generate(given)[0].tolist() == want
    padded = np.array([[1, 2, 3, 46], [46, 1, 2, 3]])
    assert [row.tolist() for row in generate(padded, attention_mask=np.array([[1, 1, 1, 0], [0, 1, 1, 1]]))] == [want, want]
    assert [row.tolist() for row in generate([array, [1, 2, 3]])] == [want, want]
    plain: dict[str, Any] = {"gen_length": 8, "block_length": 4, "steps": 3, "threshold": 0.5, "temperature": 0.5, "top_k": 5, "seed": 3}
    kinds = {int: np.int64, float: np.float32}
    theirs = {name: kinds[type(value)](value) for name, value in plain.items()}
    early = {"eos_early_stop": np.bool_(True), "eos_id": np.int64(46), "mask_id": np.int32(47), "max_batch": np.int64(1)}
    want = generate([1, 2], **plain, eos_early_stop=True)[0].tolist()
    assert generate([1, 2], **theirs, **early)[0].tolist() == want
    with pytest.raises(TypeError, match="inputs: expected integers, got an array of object"):
        generate(np.array([1, "a"], dtype=object))
    with pytest.raises(TypeError, match="inputs: expected integer token ids, got torch.float64"):
        generate(np.array([1.0, 2.0]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([True, False], r"^inputs\[0\]: expected an integer token id, got bool True"),
        ([1, 2.0], r"^inputs\[1\]: expected an integer token id, got float 2.0"),
        ([[1], [2, True]], r"^inputs\[1\]\[1\]: expected an integer token id, got bool True"),
        ([1, None], r"^inputs\[1\]: expected an integer token id, got NoneType None"),
        ([np.bool_(True)], r"^inputs\[0\]: expected an integer token id, got bool"),
        (["a text"], r"^inputs\[0\]: expected a tensor or a list of integers, got str"),
    ],
)
def test_ids_are_integers(inputs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        generate(inputs)


def test_an_argument_beside_a_rule_object_must_be_the_rules() -> None:
    """A temperature of 0 is one that was given."""
    sampling = LLaDA20(temperature=1.0)
    with pytest.raises(ValueError, match="decoding: expected the rule object to hold the rule's parameters, got also temperature"):
        generate([1, 2, 3], decoding=sampling, temperature=0.0)
    want = generate([1, 2, 3], decoding=sampling, seed=1)[0].tolist()
    assert generate([1, 2, 3], decoding=sampling, temperature=1.0, seed=1)[0].tolist() == want
    assert generate([1, 2, 3], temperature=1.0, seed=1)[0].tolist() == want
    assert generate([1, 2, 3], decoding=LLaDA20(), temperature=0.0)[0].tolist() == generate([1, 2, 3])[0].tolist()


def test_on_step_is_called() -> None:
    with pytest.raises(TypeError, match="on_step: expected a callable or None, got int 3"):
        generate([1], on_step=3)


@pytest.mark.parametrize("eos_id", [(1, "a"), (1, True), True, [1, 2]])
def test_a_rule_checks_its_eos_ids(eos_id):
    with pytest.raises(TypeError, match="eos_id: expected an int, a tuple of ints or None, got"):
        LLaDA20(eos_id=eos_id)
