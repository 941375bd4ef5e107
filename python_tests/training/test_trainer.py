"""The training loop: accumulation, skipped and bad steps, optimizer, expert bias, bitwise resume."""

from __future__ import annotations

import copy
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from llada_kernels.model import Model
from llada_kernels.ops.moe_routing import Routing
from llada_kernels.training import Document, PackedDataset, TrainConfig, Trainer, latest_checkpoint, wsd_plan
from llada_kernels.training.optimizer import AdamW, decays
from llada_kernels.training.router import ExpertLoads, router_losses, update_expert_bias

from .conftest import tiny_data, tiny_model, tiny_model_for, tiny_parent

PLAN = ((0.3, 1), (0.4, "full"), (0.3, 4))


def config(**changes):
    values = {"steps": 6, "plan": PLAN, "rows": 4, "learning_rate": 5e-3, "warmup_steps": 2, "mask_noise_fraction": 0.5}
    return TrainConfig(**{**values, **changes})


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def trained(cfg, data=None, model=None, **options):
    trainer = Trainer(model or tiny_model_for(cfg.objective), data or tiny_data(), cfg, **options)
    trainer.run()
    return trainer


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_learns(objective):
    losses = []
    cfg = config(steps=60, objective=objective, plan=((1.0, 4),), rows=8, loss_norm="masked", expert_bias_rate=1e-2)
    trained(cfg, on_step=lambda m: losses.append(m["loss"]))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.parametrize("options", [{}, {"objective": "ar"}, {"loss_norm": "masked", "confidence": 0.5}, {"router_z_loss": 0.1}])
def test_accumulation_does_not_change_the_step(options):
    """Rows differ in their numbers of tokens and masks: a mean of means would be off by far more."""
    data = PackedDataset([Document(list(range(n)), [i > n // 3 for i in range(n)]) for n in (3, 30, 11, 7, 25, 2, 31)], 32)
    grads = []
    for accumulation in (1, 2, 4):
        model = tiny_model_for(options.get("objective"))
        trainer = Trainer(model, data, config(accumulation=accumulation, plan=((1.0, 4),), **options))
        trainer.optimizer.step = lambda _: None
        trainer.train_step()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_step_without_supervised_tokens_is_skipped_and_counted():
    data = PackedDataset([Document([1, 2, 3], [False] * 3)], 8)
    for objective in ("ar", "diffusion"):
        model = tiny_model_for(objective)
        before = copy.deepcopy(model.state_dict())
        with pytest.warns(UserWarning, match="dataset: no step had a supervised token"):
            trainer = trained(config(steps=3, objective=objective), data, model)
        assert trainer.skipped_steps == 3 and trainer.next_sample == 12 and same(model.state_dict(), before)


def test_steps_that_are_not_finite_change_nothing_and_stop_the_run():
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = Trainer(model, tiny_data(), config(max_bad_steps=3))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        trainer.run()
    assert trainer.bad_steps == 3 and not trainer.optimizer.state_dict()
    after = model.state_dict()
    assert all(torch.equal(after[k], v) or k == "norm.weight" for k, v in before.items())


def test_a_run_that_diverges_ends_in_an_error_without_a_checkpoint(tmp_path):
    trainer = Trainer(tiny_model(), tiny_data(), config(steps=2, learning_rate=1e39, warmup_steps=0), output=tmp_path)
    with pytest.raises(FloatingPointError, match=r"diverged: loss nan at step 1, the last, and 1 of 2 .* learning_rate below 1e\+39"):
        trainer.run()
    assert latest_checkpoint(tmp_path) is None
    trainer = Trainer(tiny_model(), tiny_data(), config(steps=1, plan=[(1.0, 4)], learning_rate=1e39, warmup_steps=0), output=tmp_path)
    with pytest.raises(FloatingPointError, match=r"diverged: embed_tokens\.weight is not finite after step 0, the last"):
        trainer.run()
    assert latest_checkpoint(tmp_path) is None
    trainer = Trainer(tiny_model(), tiny_data(), config(steps=2))
    trainer.optimizer.clip = lambda _: torch.tensor(math.inf)  # gradients that overflow, beside a loss that does not
    with pytest.raises(FloatingPointError, match="2 of 2 steps"):
        trainer.run()


def test_a_single_bad_step_is_survived(monkeypatch):
    trainer = Trainer(tiny_model(), tiny_data(), config())
    clip = trainer.optimizer.clip
    norms = iter([None, math.inf])
    monkeypatch.setattr(trainer.optimizer, "clip", lambda m: clip(m) if next(norms, None) is None else torch.tensor(math.inf))
    trainer.run()
    assert trainer.bad_steps == 1 and trainer.step == 6


def test_embedding_noise_falls_to_zero_over_its_share_of_the_run():
    trainer = Trainer(tiny_model(), tiny_data(), config(steps=100, mask_noise_fraction=0.02))
    rms = float(trainer.model.embed_tokens.weight.detach().pow(2).mean().sqrt())
    assert [trainer._embedding_sigma(s) for s in (0, 1, 2, 50)] == pytest.approx([rms, rms / 2, 0.0, 0.0])
    assert Trainer(tiny_parent(), tiny_data(), config(objective="ar"))._embedding_sigma(0) == 0.0


def test_metrics_follow_plan_and_schedule(tmp_path):
    metrics = []
    trained(config(steps=10), output=tmp_path, on_step=metrics.append)
    assert [m["block_size"] for m in metrics] == [1] * 3 + ["full"] * 4 + [4] * 3
    assert metrics[0]["learning_rate"] == pytest.approx(2.5e-3) and metrics[1]["learning_rate"] == pytest.approx(5e-3)
    assert all(m["load_imbalance"] >= 1.0 and m["grad_norm"] > 0 for m in metrics)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [m["loss"] for m in metrics]


# Optimizer


def test_adamw_against_the_formula():
    """Two steps by hand: moments, bias correction, decay of matrices only."""
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    grads = [{n: torch.randn(p.shape, generator=generator) for n, p in before.items()} for _ in range(2)]
    optimizer = AdamW(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step, lr in enumerate((0.01, 0.02)):
        for name, parameter in model.named_parameters():
            parameter.grad = grads[step][name].clone()
        optimizer.step(lr)
    for name, parameter in model.named_parameters():
        value, m, v = before[name].double(), 0.0, 0.0
        decay = 0.0 if value.ndim == 1 or name == "embed_tokens.weight" else 0.1
        assert decays(name, parameter) == (decay > 0)
        for step, lr in enumerate((0.01, 0.02), 1):
            g = grads[step - 1][name].double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            value = value * (1 - lr * decay)
            value = value - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach(), value.float(), rtol=1e-5, atol=1e-6)


def test_low_precision_weights_have_fp32_masters():
    model = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    optimizer = AdamW(model, weight_decay=0.0)
    for _ in range(100):  # each step is below half a bf16 spacing of 1.0
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step(1e-4)
    torch.testing.assert_close(model.weight.detach().float(), torch.full((4, 4), 0.99), atol=4e-3, rtol=0)
    other = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    again = AdamW(other, weight_decay=0.0)
    again.load_state_dict({k: v.clone() for k, v in optimizer.state_dict().items()})
    assert same(again.state_dict(), optimizer.state_dict())
    with pytest.raises(ValueError, match="master/weight: missing"):
        again.load_state_dict({})
    with pytest.raises(ValueError, match="exp_avg/other: no such parameter"):
        again.load_state_dict({"exp_avg/other": torch.zeros(1), **optimizer.state_dict()})


def test_clip():
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = AdamW(model)
    model.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    assert float(optimizer.clip(1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0, 0.8]]), rtol=1e-5, atol=1e-6)


# Routers


def test_expert_bias_moves_towards_equal_loads():
    model = tiny_model()
    router = model.layers[1].mlp.router
    loads = ExpertLoads()
    count = torch.tensor([10, 0, 4, 4, 9, 1, 4, 4])
    for part in (count // 2, count - count // 2):
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), part.cumsum(0)]).to(torch.int32)
        loads.add({1: SimpleNamespace(routing=SimpleNamespace(offsets=offsets))})
    router.expert_bias[3] = 0.5
    update_expert_bias(model, loads, 1e-3)
    mean = count.double().mean()
    d = torch.sign(mean - count)
    expected = 1e-3 * (d - d.mean())
    expected[3] += 0.5
    torch.testing.assert_close(router.expert_bias, expected.float())
    assert loads.imbalance() == pytest.approx(10 / float(mean))


def test_loads_are_the_tokens_of_the_whole_step():
    seen = []
    model = tiny_model()
    trainer = Trainer(model, tiny_data(), config(accumulation=4))
    add = ExpertLoads.add
    ExpertLoads.add = lambda self, outputs: (seen.append(self), add(self, outputs))[1]
    try:
        metrics = trainer.train_step()
    finally:
        ExpertLoads.add = add
    assert len(seen) == 4 and len(set(map(id, seen))) == 1
    assert model.config.num_hidden_layers == 2  # the only MoE layer is the last: it serves the noisy tokens alone
    full = trainer.plan.block_size_at(0, 6) == "full"
    noisy = metrics["tokens"] if full else metrics["tokens"] // 2
    assert int(seen[0].counts[1].sum()) == noisy * model.config.num_experts_per_tok
    assert model.layers[1].mlp.router.expert_bias.any()


def test_recomputed_layers_change_nothing_and_count_once():
    results = []
    for recompute in (False, True):
        model = tiny_model()
        model.gradient_checkpointing = recompute
        trainer = Trainer(model, tiny_data(), config(expert_bias_rate=1e-2))
        results.append([trainer.train_step()["load_imbalance"] for _ in range(2)])
        results.append(model.state_dict())
    assert results[0] == results[2] and same(results[1], results[3])


def test_the_model_must_be_of_the_objective(tmp_path):
    with pytest.raises(ValueError, match=r"model: expected a diffusion model for objective='diffusion', got a causal one; train model\.as"):
        Trainer(tiny_parent(), tiny_data(), config())
    with pytest.raises(ValueError, match="model: expected a causal model for objective='ar', got a diffusion model"):
        Trainer(tiny_model(), tiny_data(), config(objective="ar"))
    parent = tiny_parent()
    parent.gradient_checkpointing = True
    model = parent.eval().as_diffusion()
    assert not model.training and model.gradient_checkpointing and model.generation_config == {}
    assert same(model.state_dict(), parent.state_dict()) and all(p.requires_grad for p in model.parameters())
    assert model.embed_tokens.weight.data_ptr() == parent.embed_tokens.weight.data_ptr(), "no copy of the weights"
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    trainer = trained(config(steps=2), model=model, output=tmp_path)
    again = Model.from_pretrained(trainer.save())
    assert len(again.generate(torch.tensor([1, 2, 3]), gen_length=8, block_length=4)[0]) <= 8
    assert tiny_parent(mask_token_id=None).as_diffusion(7).config.mask_token_id == 7
    with pytest.raises(ValueError, match="model: expected weights that are not quantised, got int8 experts"):
        quantized().as_diffusion()
    parent.embed_tokens.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in parent.as_diffusion().named_parameters()}
    assert [n for n, wanted in flags.items() if not wanted] == ["embed_tokens.weight"]
    parent.lm_head = torch.nn.Sequential(parent.lm_head)
    with pytest.raises(ValueError, match=r"convert before adapters are added.*lm_head\.0\.weight"):
        parent.as_diffusion()


def quantized():
    return tiny_parent(hidden_size=128, moe_intermediate_size=128, shared_expert_intermediate_size=128).quantize_experts("int8")


def test_diffusion_needs_a_mask_token():
    with pytest.raises(ValueError, match="mask_token_id"):
        Trainer(tiny_model(mask_token_id=None), tiny_data(), config())


def test_router_losses():
    logits = torch.randn(6, 4, requires_grad=True)
    ids = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 0], [1, 2], [3, 0]], dtype=torch.int32)
    routing = Routing.from_topk(ids, torch.ones(6, 2), 4)
    balance, z = router_losses({0: SimpleNamespace(logits=logits, routing=routing)})
    share = torch.bincount(ids.flatten().long(), minlength=4) / 12
    expected = 4 * sum(float(share[e]) * logits.softmax(-1)[:, e].mean() for e in range(4))
    torch.testing.assert_close(balance, expected)
    torch.testing.assert_close(z, (logits.exp().sum(-1).log() ** 2).mean())
    balance.backward()
    assert logits.grad.abs().sum() > 0


# Resume


@pytest.mark.parametrize("options", [{}, {"objective": "ar"}, {"views": 2, "complementary": True, "mask_ratio": (0.1, 0.9)}])
def test_resume_is_bitwise(tmp_path, options):
    cfg = config(accumulation=2, **options)
    whole = trained(cfg, output=tmp_path / "whole")
    first = Trainer(tiny_model_for(cfg.objective), tiny_data(), cfg, output=tmp_path / "parts")
    first.run(until=3)
    first.save()
    first.run(until=4)  # lost: not saved
    second = Trainer(tiny_model_for(cfg.objective, seed=99), tiny_data(), cfg, output=tmp_path / "parts", resume=True)
    assert second.step == 3 and second.next_sample == 12
    second.run()
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert same(whole.optimizer.state_dict(), second.optimizer.state_dict())

    def losses(name):
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert losses("whole") == losses("parts") and len(losses("parts")) == 6


def test_resume_refuses_another_run(tmp_path):
    trained(config(steps=2), output=tmp_path)
    with pytest.raises(ValueError, match="output: expected a directory without checkpoints"):
        Trainer(tiny_model(), tiny_data(), config(steps=2), output=tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate: expected 0\.005, got 0\.1"):
        Trainer(tiny_model(), tiny_data(), config(steps=2, learning_rate=0.1), output=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"steps: expected 2, got 5; continue with the same values \(.*\), or start a new run from that"):
        Trainer(tiny_model(), tiny_data(), config(steps=5), output=tmp_path, resume=True)
    Trainer(tiny_model(), tiny_data(), config(steps=2, checkpoint_every=1, keep_checkpoints=0), output=tmp_path, resume=True)
    with pytest.raises(ValueError, match="dataset"):
        Trainer(tiny_model(), tiny_data(documents=9), config(steps=2), output=tmp_path, resume=True)
    same_lengths = tiny_data()
    same_lengths._tokens[0] = same_lengths._tokens[0].flip(0)
    for other in (same_lengths, PackedDataset(tiny_data()._tokens, tiny_data().row_tokens, seed=tiny_data().seed, shuffle=False)):
        with pytest.raises(ValueError, match="dataset"):
            Trainer(tiny_model(), other, config(steps=2), output=tmp_path, resume=True)
    with pytest.raises(ValueError, match="differs in"):
        Trainer(tiny_model(hidden_size=48), tiny_data(), config(steps=2), output=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"steps": 0}, "steps"), ({"rows": 3, "accumulation": 2}, "rows: expected a multiple"), ({"plan": ((0.5, 4),)}, "sum to 1"),
     ({"mask_ratio": (0.0, 1.0)}, "mask_ratio"), ({"learning_rate": math.nan}, "learning_rate"), ({"clip": -1.0}, "clip"),
     ({"warmup_steps": -1}, "warmup_steps"), ({"expert_bias_rate": math.inf}, "expert_bias_rate: expected a finite number"),
     ({"objective": "foo"}, "^objective: expected one of ar, diffusion, got 'foo'"), ({"schedule": "foo"}, "^schedule: .*got 'foo'"),
     ({"decay_fraction": 2.0}, r"decay_fraction: expected a number in \[0, 1\], got 2.0"), ({"betas": (2, 2)}, "betas: .*got"),
     ({"views": 0}, "views: expected at least 1, got 0"), ({"views": 3, "complementary": True, "mask_ratio": (0.1, 0.9)}, "views"),
     ({"max_bad_steps": 0}, "max_bad_steps"), ({"mask_noise_fraction": 1.5}, "mask_noise_fraction")],
)  # fmt: skip
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"steps": 2.5}, "steps: expected an int, got 2.5"), ({"steps": "3"}, "steps: expected an int, got '3'"),
     ({"rows": 2.0}, "rows: expected an int, got 2.0"), ({"accumulation": True}, "accumulation: expected an int"),
     ({"seed": 1.5}, "seed: expected an int"), ({"views": 2.0}, "views: expected an int"), ({"keep_checkpoints": 0.5}, "keep_checkpoints"),
     ({"learning_rate": "1"}, "learning_rate: expected a number, got '1'"),
     ({"mask_ratio": 0.5}, "mask_ratio: expected two numbers, got 0.5"),
     ({"betas": 0.9}, "betas: expected two numbers, got 0.9"), ({"plan": "wsd"}, "plan: expected a Plan or .*, got 'wsd'"),
     ({"complementary": "yes"}, "complementary: expected a bool, got 'yes'")],
)  # fmt: skip
def test_configurations_of_the_wrong_type(changes, message):
    with pytest.raises(TypeError, match=message):
        config(**changes)


def test_a_plan_object_is_a_plan():
    cfg = config(plan=wsd_plan(100, 8))
    assert cfg == config(plan=wsd_plan(100, 8).as_tuples()) and cfg.plan[-1] == (0.08, 8)
    assert config(plan=[[1.0, 4]]) == config(plan=((1.0, 4),))


def test_arguments_of_the_trainer(tmp_path):
    for arguments, message in (
        ((list, tiny_data(), config()), "model: expected a Model, got type"),
        ((tiny_model(), [[1]], config()), "dataset: expected a PackedDataset, got list"),
        ((tiny_model(), tiny_data(), {"steps": 1}), "config: expected a TrainConfig, got dict"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            Trainer(*arguments)
    with pytest.raises(ValueError, match="model: expected parameters that require gradients"):
        Trainer(tiny_model().requires_grad_(False), tiny_data(), config())
    with pytest.raises(ValueError, match="model: expected parameters that require gradients"):
        Trainer(quantized(), tiny_data(), config())
    with pytest.raises(ValueError, match="resume: expected an output directory"):
        Trainer(tiny_model(), tiny_data(), config(), resume=True)
    with pytest.raises(ValueError, match="extra_files: expected files, got"):
        Trainer(tiny_model(), tiny_data(), config(), extra_files=[tmp_path / "tokenizer.json"])


def test_a_last_stage_without_a_step_is_told():
    with pytest.warns(UserWarning, match=r"plan: block size 8, the last, gets none of 4 steps: its share is 8\.0%"):
        Trainer(tiny_model(), tiny_data(), config(steps=4, plan=wsd_plan(100, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(tiny_model(), tiny_data(), config(steps=7, plan=wsd_plan(100, 8)))
        Trainer(tiny_parent(), tiny_data(), config(steps=4, plan=wsd_plan(100, 8), objective="ar"))


def test_data_that_the_model_cannot_read():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"dataset: expected token ids of 0 to \d+, got 999 in document 1"):
        Trainer(model, PackedDataset([[1], [2, 999]], 8), config(rows=1))
    with pytest.raises(ValueError, match="dataset: expected text without the mask token"):
        Trainer(model, PackedDataset([[1, model.config.mask_token_id]], 8), config(rows=1))
