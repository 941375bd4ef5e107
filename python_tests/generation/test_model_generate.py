"""The real Model: cached and batched generation against the plain loops on random tiny models; bf16 runs."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch

from llada_kernels import Config, Model, generation
from llada_kernels.generation import plain

from .toy import assert_rows_equal_plain, random_case


def random_model(seed: int, vocab: int, family: str, dtype: torch.dtype = torch.float32) -> Model:
    """A model of a random small shape, its logits spread enough that thresholds matter."""
    draw = random.Random(seed)
    kv, group = draw.choice([(1, 1), (1, 2), (2, 2)])
    head_dim, layers = draw.choice([8, 16]), draw.randint(1, 3)
    common: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": kv * group,
        "num_key_value_heads": kv, "head_dim": head_dim, "rope_theta": 10000.0, "intermediate_size": 48,
        "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "mask_token_id": vocab - 1,
        "eos_token_id": vocab - 2, "initializer_range": 0.3,
    }  # fmt: skip
    if family == "lladamoe":
        own: dict[str, Any] = {
            "rotary_dim": head_dim, "moe_layers": (True,) * layers, "family": "lladamoe", "score_function": "softmax",
            "norm_topk_prob": False, "router_dtype": "model", "expert_bias": False,
        }  # fmt: skip
    else:
        own = {
            "rotary_dim": head_dim // 2, "moe_layers": (False, *[True] * (layers - 1)), "n_group": 4, "topk_group": 2,
            "shared_expert_intermediate_size": 16, "routed_scaling_factor": 2.5,
        }  # fmt: skip
    torch.manual_seed(seed)
    return Model(Config(**common, **own)).to(dtype).eval()


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_200_random_draws_equal_the_plain_loops(first: int) -> None:
    """Model, prompts, block length, rule, threshold, sampling and batch at random, fp32: tokens and forwards of every row."""
    for seed in range(first, first + 25):
        case = random_case(random.Random(1000 + seed))
        rule = case["args"]["decoding"]
        model = random_model(seed, case["vocab"], "lladamoe" if rule == "low_confidence" else "llada2")
        assert_rows_equal_plain(model, case)


@pytest.mark.parametrize("decoding", ["llada2.0", "quality"])
def test_bf16(decoding: str) -> None:
    """In bf16 rounding differs between cached and plain, so tokens may; they are valid, and most of them agree."""
    loop = {"llada2.0": plain.llada20, "quality": plain.llada21}[decoding]
    args: dict[str, Any] = {"gen_length": 24, "block_length": 8, "threshold": 0.7}
    args |= {"editing_threshold": 0.5} if decoding == "quality" else {}
    same = total = 0
    for seed in range(6):
        model = random_model(seed, 48, "llada2", torch.bfloat16)
        prompt = torch.tensor([1, 2, 3, 4, 5])
        want, _ = loop(model, prompt, mask_id=47, eos_id=-1, **args)
        out = generation.generate(model, [prompt, prompt[:2]], decoding=decoding, eos_id=-1, **args)
        assert [len(tokens) for tokens in out] == [24, 24] and int(torch.stack(list(out)).max()) < 47
        same, total = same + int((out[0] == want).sum()), total + 24
    print(f"{decoding}: {same} of {total} tokens equal in bf16")
    assert same > 0.5 * total


def test_generate_is_a_method_of_the_model() -> None:
    """``model.generate`` takes the official arguments, finds its ids in the config, and leaves no trace in the model."""
    model = random_model(3, 48, "llada2")
    before = set(model.state_dict())
    prompt = torch.tensor([[5, 6, 7]])
    out = model.generate(prompt, gen_length=20, block_length=8, steps=8, threshold=0.9, temperature=0.0)
    assert out[0].tolist() == generation.generate(model, prompt, gen_length=20, block_length=8, steps=8, threshold=0.9)[0].tolist()
    assert isinstance(out.num_forwards, int) and set(model.state_dict()) == before
    assert not out[0].requires_grad and not out[0].is_inference()
    with pytest.raises(ValueError, match="mask token 47"):
        model.generate(torch.tensor([[5, 47]]))


class _Counting(Model):
    """Counts forwards that make logits."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **kwargs)


def test_greedy_rules_make_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """They choose from hidden states, whose LM head runs on the positions needed only; drawing rules and models with a forward of
    their own keep the logits. The tokens are the same."""
    model, prompt = random_model(3, 48, "llada2"), [1, 2, 3]
    own = random_model(3, 48, "llada2")
    own.__class__ = _Counting
    assert model.plain_lm_head and not own.plain_lm_head
    needed: list[int] = []
    unmask = generation.rules.lm_head_unmask
    monkeypatch.setattr(generation.rules, "lm_head_unmask", lambda h, *a, **k: (needed.append(h.shape[1]), unmask(h, *a, **k))[1])
    for args in ({"decoding": "llada2.0"}, {"decoding": "quality"}, {"temperature": 1.0, "seed": 1}):
        own.calls = 0
        needed.clear()
        ours, by_logits = (generation.generate(m, prompt, gen_length=13, block_length=8, eos_id=-1, **args) for m in (model, own))
        assert ours[0].tolist() == by_logits[0].tolist() and ours.num_forwards == by_logits.num_forwards == own.calls
        assert len(needed) == (0 if "temperature" in args else ours.num_forwards)
        if needed:
            assert needed[0] == 5 and (min(needed) < 5 or "quality" in args.values())


def test_bad_logits_are_named_without_logits_as_well() -> None:
    model = random_model(3, 48, "llada2")
    with torch.no_grad():
        model.lm_head_weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"got NaN in row 0, position 3 \(prompt of 3 tokens included\)"):
        generation.generate(model, [1, 2, 3], gen_length=13, block_length=8)


def test_generate_is_a_method_with_its_signature() -> None:
    model = random_model(3, 48, "llada2")
    ours = inspect.signature(Model.generate)
    assert {"gen_length", "decoding", "on_step"} <= ours.parameters.keys() and "GenerationOutput" in str(ours.return_annotation)
    assert "block_length: tokens per block" in (Model.generate.__doc__ or "")
    assert model.generate([1, 2, 3], gen_length=8)[0].tolist() == generation.generate(model, [1, 2, 3], gen_length=8)[0].tolist()


@pytest.mark.parametrize(
    ("name", "ours"),
    [("max_new_tokens", "gen_length"), ("block_size", "block_length"), ("input_ids", "inputs"), ("eos_token_id", "eos_id")],
)
def test_names_of_other_libraries_get_a_hint(name: str, ours: str) -> None:
    model, inputs = random_model(3, 48, "llada2"), [] if name == "input_ids" else [[1, 2]]
    with pytest.raises(TypeError, match=f"^{name}: expected an argument of generate, got one that is here called {ours}"):
        model.generate(*inputs, **{name: 3})
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        model.generate([1, 2], nonsense=3)  # type: ignore[call-arg]


def test_every_hint_names_an_argument() -> None:
    known = inspect.signature(generation.generate).parameters
    for name, ours in generation.api._ELSEWHERE.items():
        assert name not in known and ours.split(",")[0] in known
