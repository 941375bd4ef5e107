"""Losses against direct transcriptions: one document, one view and one dense mask at a time."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llada_kernels import use_backend
from llada_kernels._tensor_names import tensor_slots
from llada_kernels.model import Model
from llada_kernels.training import Objective, ar_perplexity, elbo_perplexity, loss_terms, objectives, prepare, unigram_perplexity
from llada_kernels.training.data import Batch, collate, document_blocks
from llada_kernels.training.noise import Noise, draw_noise

from ..conftest import GOLDEN
from .conftest import MASK, VOCAB, tiny_data, tiny_model

CASE = GOLDEN / "train_block_diffusion"


def spans(batch):
    starts = batch.cu_seqlens.tolist()
    return [(a, b) for a, b in zip(starts, starts[1:], strict=False) if b > a]


def dense_block_diffusion(length, block_size, views=1):
    """Eq. 3 for one document: [x_t1; ...; x_0], each pair of tokens at a time."""
    copies = views + 1
    visible = torch.zeros(copies * length, copies * length, dtype=torch.bool)
    for q in range(copies * length):
        for k in range(copies * length):
            (qc, qi), (kc, ki) = divmod(q, length), divmod(k, length)
            qb, kb = qi // block_size, ki // block_size
            if qc < views:
                visible[q, k] = (kc == qc and kb == qb) or (kc == views and kb < qb)
            else:
                visible[q, k] = kc == views and kb <= qb
    return visible


def logits_of(model, ids, visible):
    positions = torch.arange(len(ids)) if len(visible) == len(ids) else None
    return model(ids[None], attention_mask=visible[None, None], position_ids=positions[None]).logits[0]


def transcription(model, batch, noise, block_size, norm):
    """sum over documents and views of the weighted cross entropies, and the count."""
    total, masked_count = 0.0, 0
    for begin, end in spans(batch):
        x0, n = batch.tokens[begin:end], end - begin
        for view in range(len(noise.masked)):
            m, t = noise.masked[view, begin:end], noise.level[view, begin:end]
            xt = torch.where(m, MASK, x0)
            if block_size == "full":
                logits = logits_of(model, xt, torch.ones(n, n, dtype=torch.bool))
            else:
                visible = dense_block_diffusion(n, block_size)
                positions = torch.arange(n).repeat(2)
                out = model(torch.cat([xt, x0])[None], attention_mask=visible[None, None], position_ids=positions[None])
                logits = out.logits[0, :n]
            for i in range(n):
                if m[i]:
                    ce = -logits[i].log_softmax(-1)[x0[i]]
                    total = total + (ce / t[i] if norm == "elbo" else ce)
                    masked_count += 1
    count = masked_count if norm == "masked" else len(noise.masked) * int(batch.supervised.sum())
    return total, count


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("norm", ["elbo", "masked", "uniform"])
@pytest.mark.parametrize("block_size", [1, 4, 16, "full"])
def test_diffusion_losses_and_gradients(block_size, norm, prompts):
    model, batch = tiny_model(), tiny_data(documents=5, prompts=prompts).batch(0, 2)
    objective = Objective("diffusion", block_size, norm, (0.1, 0.9), views=2, complementary=True)
    prepared = prepare(batch, objective, MASK, seed=3, step=1)
    terms = loss_terms(model, prepared)
    (terms.loss / prepared.count).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    noise = draw_noise(
        batch.samples, batch.indices, document_blocks(batch.cu_seqlens, block_size), batch.supervised,
        seed=3, step=1, mask_ratio=(0.1, 0.9), views=2, complementary=True,
    )  # fmt: skip
    with use_backend("reference"):
        expected, count = transcription(model, batch, noise, block_size, norm)
        (expected / count).backward()
    assert prepared.count == count
    torch.testing.assert_close(terms.loss, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_double_precision():
    model, batch = tiny_model().double(), tiny_data(documents=4).batch(0, 1)
    prepared = prepare(batch, Objective("diffusion", 4), MASK, seed=0, step=0)
    exact = loss_terms(model, prepared).loss
    assert exact.dtype == torch.float64
    torch.testing.assert_close(loss_terms(model.float(), prepared).loss, exact.float(), rtol=1e-5, atol=1e-5)


def test_ar_loss():
    model, batch = tiny_model(), tiny_data(documents=6, prompts=True).batch(0, 2)
    prepared = prepare(batch, Objective("ar"), MASK, seed=0, step=0)
    expected, count = 0.0, 0
    for begin, end in spans(batch):
        x, n = batch.tokens[begin:end], end - begin
        logits = logits_of(model, x, torch.ones(n, n, dtype=torch.bool).tril())
        for i in range(n - 1):
            if batch.supervised[begin + i + 1]:
                expected, count = expected + F.cross_entropy(logits[i], x[i + 1]), count + 1
    assert prepared.count == count
    torch.testing.assert_close(loss_terms(model, prepared).loss, expected, rtol=1e-4, atol=1e-4)


def test_blocks_without_supervision_are_left_out_at_no_change(monkeypatch):
    model, batch = tiny_model(), tiny_data(documents=8, prompts=True).batch(0, 3)
    objective = Objective("diffusion", 4)
    small = prepare(batch, objective, MASK, seed=1, step=0)
    monkeypatch.setattr(objectives, "_kept_blocks", lambda *_: None)
    large = prepare(batch, objective, MASK, seed=1, step=0)
    assert len(small.input_ids) < len(large.input_ids) and small.count == large.count
    torch.testing.assert_close(loss_terms(model, small).loss, loss_terms(model, large).loss)


@pytest.mark.parametrize("block_size", [1, 4, "full"])
def test_uniform_predictor_scores_log_vocabulary(block_size):
    """The sign and size of the weight: in expectation the ELBO of a predictor that knows nothing is log V per token."""
    model, data = tiny_model(), tiny_data(documents=60, row_tokens=64)
    model.lm_head_weight.data.zero_()
    total = count = 0.0
    with torch.no_grad():
        for step in range(60):
            prepared = prepare(data.batch(0, 8), Objective("diffusion", block_size), MASK, seed=0, step=step)
            total, count = total + float(loss_terms(model, prepared).loss), count + prepared.count
        assert abs(total / count / math.log(VOCAB) - 1.0) < 0.06
        masked = prepare(data.batch(0, 4), Objective("diffusion", block_size, "masked"), MASK, seed=0, step=0)
        assert float(loss_terms(model, masked).loss) / masked.count == pytest.approx(math.log(VOCAB), rel=1e-5)
    batches = [data.batch(0, 4)]
    assert elbo_perplexity(model, batches, block_size, MASK, draws=16) == pytest.approx(VOCAB, rel=1e-4)
    assert ar_perplexity(model, batches) == pytest.approx(VOCAB, rel=1e-4)


def test_elbo_perplexity_at_block_one_is_exact():
    """Every block of one token is masked, weight 1: the cross entropy of each token given all clean tokens before it."""
    model, batch = tiny_model(), tiny_data(documents=4).batch(0, 2)
    total = 0.0
    with torch.no_grad():
        for begin, end in spans(batch):
            x = batch.tokens[begin:end]
            for i in range(end - begin):
                ids = torch.cat([x[:i], torch.tensor([MASK])])
                visible = torch.ones(i + 1, i + 1, dtype=torch.bool).tril()
                total += float(F.cross_entropy(logits_of(model, ids, visible)[-1], x[i]))
    measured = elbo_perplexity(model, [batch], 1, MASK, draws=3)
    assert measured == pytest.approx(math.exp(total / len(batch.tokens)), rel=1e-4)
    with pytest.raises(ValueError, match="at least one supervised token"):
        elbo_perplexity(model, [], 1, MASK)


def test_embedding_noise_only_at_masked_positions_and_shared_by_no_view():
    model, batch = tiny_model(), tiny_data().batch(0, 2)
    prepared = prepare(batch, Objective("diffusion", 4, views=2), MASK, seed=1, step=2)
    noisy = objectives._noisy_embeddings(model, prepared, 0.5, 1, 2) - model.embed(prepared.input_ids)
    noised = torch.cat([prepared.noised, torch.zeros(len(prepared.input_ids) - len(prepared.noised), dtype=torch.bool)])
    assert not noisy[~noised].any() and noisy[noised].abs().min(dim=1).values.max() > 0
    assert abs(float(noisy[noised].detach().std()) - 0.5) < 0.05
    n = len(batch.tokens)
    both = noised[:n] & noised[n : 2 * n]
    assert both.any() and not torch.equal(noisy[:n][both], noisy[n : 2 * n][both])


def test_unigram_perplexity():
    train, held = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2])
    p = [4 / 7, 2 / 7, 1 / 7]
    assert unigram_perplexity(train, held, 3) == pytest.approx(math.exp(-sum(map(math.log, p)) / 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kind": "mlm"}, "kind"), ({"loss_norm": "mean"}, "loss_norm"), ({"mask_ratio": (0.5, 1.5)}, "mask_ratio")],
)
def test_bad_objectives(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**arguments)


# Golden outputs of the official trainer


def golden_parts(run, io, labels_name, targets_name):
    """One Prepared per row of the official batch, the official norm (cross entropy over masked tokens)."""
    parts = []
    x0, labels, targets = io[f"{run['name']}.x0"], io[f"{run['name']}.{labels_name}"], io[f"{run['name']}.{targets_name}"]
    for row in range(run["batch"]):
        lengths = run["docs"][row] if run["docs"] else [run["L"]]
        masked = (labels[row] != -100)[None]
        batch = collate([(row, [(t, torch.ones(len(t), dtype=torch.bool)) for t in x0[row].split(lengths)])])
        noise = Noise(masked, masked.float(), masked.float())
        origin = "row" if run["name"] == "packed_unaligned" else "document"
        part = objectives.build_diffusion(batch, noise, run["block_size"], 319, "masked", origin)
        assert torch.equal(part.input_ids, torch.cat([io[f"{run['name']}.xt"][row], x0[row]]))
        mask = io[f"{run['name']}.mask"]
        assert torch.equal(part.mask.dense(), mask[row % len(mask)])
        parts.append(replace(part, targets=targets[row].clamp(min=0)))
    return parts


def official_gradients(model):
    """Gradients under the official tensor names."""
    slots = tensor_slots(model.config)
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {name: slot.of(gradients[slot.parameter]) for name, slot in slots.items() if slot.parameter in gradients}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("run", json.loads((CASE / "case.json").read_text())["runs"], ids=lambda r: r["name"])
def test_golden_loss_and_gradients(run, backend):
    io, model = load_file(CASE / "io.safetensors"), Model.from_pretrained(CASE)
    with use_backend(backend):
        parts = golden_parts(run, io, "labels", "labels")
        count = sum(p.count for p in parts)
        assert count == run["n_masked"]
        loss = 0.0
        for part in parts:
            term = loss_terms(model, part).loss / count
            term.backward()
            loss += float(term.detach())
    assert loss == pytest.approx(run["loss"], rel=2e-5)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(run["grad_total_norm"], rel=1e-4)
    if run["name"] == "packed_aligned":  # the only run whose gradients are stored tensor by tensor
        compare_gradients(model, io, f"{run['name']}.grad.", 50)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("run", json.loads((CASE / "case.json").read_text())["runs"], ids=lambda r: r["name"])
def test_golden_cap(run, backend):
    io, model = load_file(CASE / "io.safetensors"), Model.from_pretrained(CASE)
    with use_backend(backend):
        parts = golden_parts(run, io, "labels_cap", "labels_cap")
        terms = [loss_terms(model, p, confidence=True) for p in parts]
        correct = sum(int(t.correct) for t in terms)
        consistency = sum(t.loss for t in terms) / sum(p.count for p in parts)
        confidence = sum(t.confidence for t in terms) / correct
        total = consistency + run["cap"]["beta"] * confidence
        total.backward()
        consistency, confidence, total = consistency.detach(), confidence.detach(), total.detach()
    assert correct == run["cap"]["n_correct"]
    assert float(consistency) == pytest.approx(run["cap"]["consistency"], rel=2e-5)
    assert float(confidence) == pytest.approx(run["cap"]["confidence"], rel=2e-5)
    assert float(total) == pytest.approx(run["cap"]["total"], rel=2e-5)
    if run["name"] == "packed_aligned":
        compare_gradients(model, io, f"{run['name']}.grad_cap.", 4)


def compare_gradients(model, io, prefix, number):
    gradients = official_gradients(model)
    expected = {k.removeprefix(prefix): v for k, v in io.items() if k.startswith(prefix)}
    assert len(expected) == number and expected.keys() <= gradients.keys()
    for name, value in expected.items():
        bound = 2e-4 * float(value.abs().max()) + 1e-7
        assert float((gradients[name] - value).abs().max()) <= bound, name


def test_batch_moves_between_devices():
    batch = tiny_data().batch(0, 1)
    moved = batch.to("cpu")
    assert isinstance(moved, Batch) and torch.equal(moved.tokens, batch.tokens)


def test_arguments_of_the_wrong_kind(model, data):
    batch = data.batch(0, 1)
    with pytest.raises(TypeError, match="batches: expected a list of Batch, got Batch"):
        elbo_perplexity(model, batch, 4, MASK)
    with pytest.raises(TypeError, match="batches: expected a list of Batch, got Batch"):
        ar_perplexity(model, batch)
    with pytest.raises(TypeError, match="batches: expected a Batch, got Tensor"):
        ar_perplexity(model, [batch.tokens])
    with pytest.raises(TypeError, match="objective: expected an Objective, got 'ar'"):
        prepare(batch, "ar", MASK, seed=0, step=0)
    with pytest.raises(TypeError, match="batch: expected a Batch, got PackedDataset"):
        prepare(data, Objective(), MASK, seed=0, step=0)
    for block_size in ("foo", 0, 2.0, True):
        with pytest.raises(ValueError, match='^block_size: expected a block size of at least 1 or "full", got'):
            Objective(block_size=block_size)
