"""What a model may be given: options that no golden case has, masks, positions, labels, caches, and refusals."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch

from llada_kernels import DiffusionMask, Model, use_backend

from .models import LLADA2, VARIANTS, official_state, random_model, transcription


@pytest.fixture(params=["native", "reference"], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_agree_with_a_transcription(variant):
    config = VARIANTS[variant]
    m = random_model(config)
    ids = torch.randint(config.vocab_size, (2, 13))
    visible = torch.ones(13, 13, dtype=torch.bool)
    visible = visible.tril() if config.causal else visible
    expected = [transcription(official_state(m), config, row, visible, torch.arange(13)) for row in ids]
    torch.testing.assert_close(m(ids).logits, torch.stack(expected).float(), atol=1e-4, rtol=1e-4)


def test_fp64_is_exact_to_fp64(backend):
    config = VARIANTS["biases"]
    m = random_model(config, dtype=torch.float64)
    ids = torch.randint(config.vocab_size, (11,))
    if backend == "native":
        with pytest.raises(ValueError, match="native serves torch.float32, torch.bfloat16|native serves float32, bfloat16"):
            m(ids)
        return
    expected = transcription(official_state(m), config, ids, torch.ones(11, 11, dtype=torch.bool), torch.arange(11))
    logits = m(ids).logits
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)  # the rotary table is fp32 in the official code


def test_padding_is_as_if_it_was_not_there():
    m = random_model(LLADA2)
    lengths, width = [5, 9, 1, 9], 9
    for side in ("left", "right"):
        for causal in (False, True):
            m.config = replace(LLADA2, causal=causal)
            ids = torch.randint(320, (4, width))
            mask = torch.zeros(4, width, dtype=torch.int64)
            rows = []
            for b, n in enumerate(lengths):
                place = slice(width - n, width) if side == "left" else slice(0, n)
                mask[b, place] = 1
                rows.append((b, place))
            for padding in (mask, mask.bool(), mask.float()):
                logits = m(ids, attention_mask=padding).logits
                for b, place in rows:
                    torch.testing.assert_close(logits[b, place], m(ids[b : b + 1, place]).logits[0], atol=2e-5, rtol=2e-5)
                    assert logits[b].isfinite().all()
    m.config = LLADA2


def test_padding_in_the_middle():
    m = random_model(LLADA2)
    ids = torch.randint(320, (1, 12))
    real = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    with use_backend("reference"):  # three runs of real tokens are more than two intervals
        logits = m(ids, attention_mask=real[None]).logits[0]
    visible = real[None, :].expand(12, -1)
    positions = torch.arange(12)
    expected = transcription(official_state(m), LLADA2, ids[0], visible, positions)
    torch.testing.assert_close(logits[real], expected[real].float(), atol=1e-4, rtol=1e-4)


def test_a_mask_of_many_intervals_takes_the_reference(backend):
    m = random_model(LLADA2)
    ids = torch.randint(320, (2, 12))
    dense = torch.rand(2, 1, 12, 12) < 0.5
    dense |= torch.eye(12, dtype=torch.bool)
    if backend == "native":
        with pytest.raises(ValueError, match="block_attention: backend 'native' does not support this call"):
            m(ids, attention_mask=dense)
    with use_backend(None if backend == "native" else backend):
        logits = m(ids, attention_mask=dense).logits
    for b in range(2):
        expected = transcription(official_state(m), LLADA2, ids[b], dense[b, 0], torch.arange(12))
        torch.testing.assert_close(logits[b], expected.float(), atol=1e-4, rtol=1e-4)


def test_positions():
    m = random_model(LLADA2)
    ids = torch.randint(320, (2, 10))
    rows = torch.stack([torch.randperm(40)[:10], torch.randperm(40)[:10]])
    visible = torch.ones(10, 10, dtype=torch.bool)
    logits = m(ids, position_ids=rows).logits
    for b in range(2):
        expected = transcription(official_state(m), LLADA2, ids[b], visible, rows[b])
        torch.testing.assert_close(logits[b], expected.float(), atol=1e-4, rtol=1e-4)
    shared = m(ids, position_ids=rows[:1]).logits
    torch.testing.assert_close(shared[0], logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(m(ids, position_ids=rows[0].int()).logits, shared, atol=1e-5, rtol=1e-5)
    # Documents of a pack start at position 0 again.
    mask = DiffusionMask.bidirectional([0, 4, 10])
    torch.testing.assert_close(m(ids[0], mask=mask).logits[4:], m(ids[0, 4:]).logits, atol=2e-5, rtol=2e-5)


def test_packed_rows_and_embeddings_are_the_same_tokens():
    m = random_model(LLADA2)
    ids = torch.randint(320, (3, 8))
    rows = m(ids, output_hidden_states=True, output_router_logits=True)
    packed = m(ids.flatten(), mask=DiffusionMask.bidirectional(torch.arange(4) * 8), output_hidden_states=True, output_router_logits=True)
    assert torch.equal(rows.logits.flatten(0, 1), packed.logits)
    assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(rows.hidden_states, packed.hidden_states, strict=True))
    assert all(torch.equal(a[1].flatten(0, 1), b[1]) for a, b in zip(rows.router_logits, packed.router_logits, strict=True))
    assert rows.router_logits[0][0].shape == (3, 8, 16) and rows.router_logits[0][1].shape == (3, 8, 4)
    assert torch.equal(m(inputs_embeds=m.embed(ids)).logits, rows.logits)
    assert torch.equal(m(ids.int()).logits, rows.logits)
    assert torch.equal(m(ids.t().contiguous().t()).logits, rows.logits), "non-contiguous ids"
    hidden = []
    final = m.backbone(ids, hidden_states=hidden)
    assert torch.equal(final, rows.hidden_states[-1].flatten(0, 1)) and len(hidden) == 4


def test_logits_to_keep():
    m = random_model(LLADA2)
    ids = torch.randint(320, (3, 8))
    logits = m(ids).logits
    close_ = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    close_(m(ids, logits_to_keep=2).logits, logits[:, -2:])
    close_(m(ids, logits_to_keep=99).logits, logits)
    close_(m(ids, logits_to_keep=0).logits, logits)
    index = torch.tensor([23, 0, 9])
    close_(m(ids, logits_to_keep=index).logits, logits.flatten(0, 1)[index])
    one_row = m(ids[0]).logits
    close_(m(ids[0], logits_to_keep=3).logits, one_row[-3:])
    close_(m(ids[0], logits_to_keep=9).logits, one_row)


def test_labels_of_diffusion_models_are_of_the_same_position():
    m = random_model(LLADA2)
    ids, labels = torch.randint(320, (2, 9)), torch.randint(320, (2, 9))
    labels[torch.rand(2, 9) < 0.4] = -100
    out = m(ids, labels=labels)
    log_p = out.logits.log_softmax(-1)
    terms = [-log_p[b, t, labels[b, t]] for b in range(2) for t in range(9) if labels[b, t] != -100]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    assert float(m(ids, labels=torch.full_like(labels, -100)).loss) == 0.0


def test_labels_of_the_parent_are_shifted_inside_documents():
    m = random_model(VARIANTS["parent"])
    ids = torch.randint(320, (12,))
    cu = [0, 5, 6, 6, 12]
    out = m(ids, mask=DiffusionMask.causal(cu), labels=ids)
    log_p = out.logits.log_softmax(-1)
    terms = [-log_p[t, ids[t + 1]] for a, b in zip(cu, cu[1:], strict=False) for t in range(a, b - 1)]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    rows = m(ids.view(2, 6), labels=ids.view(2, 6))
    log_p = rows.logits.log_softmax(-1)
    terms = [-log_p[b, t, ids.view(2, 6)[b, t + 1]] for b in range(2) for t in range(5)]
    torch.testing.assert_close(rows.loss, torch.stack(terms).mean())


def test_cache_gives_the_block_causal_forward():
    from llada_kernels.generation.kv_cache import KVCache

    m = random_model(LLADA2)
    c, size = m.config, 4
    lengths = [12, 8]
    rows = [torch.randint(320, (n,)) for n in lengths]
    whole = [m(r, mask=DiffusionMask.block_causal([0, len(r)], size)).logits for r in rows]
    cache = KVCache(c.num_hidden_layers, 2, 16, size, c.num_key_value_heads, c.head_dim)
    with torch.no_grad():
        first = m(torch.cat([rows[0][:8], rows[1][:4]]), mask=cache.mask([8, 4]), cache=cache, logits_to_keep=4)
        torch.testing.assert_close(first.logits, torch.cat([whole[0][4:8], whole[1][:4]]), atol=2e-5, rtol=2e-5)
        cache.commit([8, 4])
        # No mask: the cache makes it, of the same number of new tokens in each row.
        second = m(torch.stack([rows[0][8:], rows[1][4:]]), cache=cache).logits
    torch.testing.assert_close(second, torch.stack([whole[0][8:], whole[1][4:]]), atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="mask: expected one of kind 'cached' with a cache"):
        m(rows[0], mask=DiffusionMask.bidirectional([0, 12]), cache=cache)
    with pytest.raises(ValueError, match="mask: expected none of kind 'cached' with no cache"):
        m(rows[0][:8], mask=cache.mask([4, 4]))


IDS = torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids: expected either input_ids or inputs_embeds, got neither"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 64)}, "input_ids: expected either .* got both"),
        ({"input_ids": IDS + 320}, r"input_ids: expected token ids of 0 to 319, got 320 at \[0, 0\]"),
        ({"input_ids": IDS - 1}, "input_ids: expected token ids of 0 to 319, got -1"),
        ({"input_ids": IDS.float()}, "input_ids: expected dtype int64 or int32, got torch.float32"),
        ({"input_ids": IDS[None]}, r"input_ids: expected shape \[B, S\] or \[T\], got \(1, 2, 6\)"),
        ({"input_ids": IDS[:0]}, r"input_ids: expected at least one token, got shape \(0, 6\)"),
        ({"input_ids": IDS.to("meta")}, "input_ids: expected device cpu .* got meta"),
        ({"inputs_embeds": torch.zeros(2, 6, 63)}, r"inputs_embeds: expected shape \[B, S, 64\]"),
        ({"inputs_embeds": torch.zeros(2, 6, 64).half()}, "inputs_embeds: expected dtype torch.float32 .* got torch.float16"),
        ({"input_ids": IDS, "mask": DiffusionMask.causal([0, 11])}, "mask: expected one of 12 tokens .* got 11"),
        ({"input_ids": IDS, "mask": torch.ones(2, 5, 5).bool()}, "mask: expected a DiffusionMask or bool"),
        ({"input_ids": IDS, "mask": torch.ones(2, 6, 6)}, "mask: expected a DiffusionMask or bool"),
        ({"input_ids": IDS, "mask": DiffusionMask.causal([0, 12]), "attention_mask": IDS}, "attention_mask: expected None together"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :5]}, r"attention_mask: expected shape \(2, 6\) .* got \(2, 5\)"),
        ({"input_ids": IDS, "attention_mask": IDS + 2}, "attention_mask: expected 2-D values 1 .* or 0"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 1, 6, 6).bool()}, "attention_mask: expected shape"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4, 6, 6).bool()}, "attention_mask: expected shape"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 6, 6)}, "attention_mask: expected 4-D values 0 .* pass it as bool"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 6, 6).long()}, "attention_mask: expected a 4-D mask of bool"),
        ({"input_ids": IDS, "position_ids": IDS[:, :5]}, r"position_ids: expected shape \[2, 6\] or \[1, 6\], got \(2, 5\)"),
        ({"input_ids": IDS, "position_ids": IDS.float()}, "position_ids: expected dtype int64"),
        ({"input_ids": IDS, "labels": IDS[0]}, r"labels: expected int64 or int32 of shape \(2, 6\)"),
        ({"input_ids": IDS, "labels": IDS + 320}, "labels: expected token ids of 0 to 319, got 320"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "logits_to_keep: expected None together with labels"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep: expected at least 0, got -1"),
        ({"input_ids": IDS, "logits_to_keep": torch.tensor([12])}, "logits_to_keep: expected indices of 0 to 11, got 12"),
        ({"input_ids": IDS, "logits_to_keep": torch.tensor([1.0])}, "logits_to_keep: expected a number or int64"),
    ],
)
def test_bad_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_model(LLADA2)(**arguments)


def test_wrong_python_types_are_named():
    m = random_model(LLADA2)
    for arguments, name in [
        ({"input_ids": [[1]]}, "input_ids"),
        ({"input_ids": IDS, "mask": [1]}, "mask"),
        ({"input_ids": IDS, "attention_mask": 1}, "attention_mask"),
        ({"input_ids": IDS, "position_ids": [1]}, "position_ids"),
        ({"input_ids": IDS, "labels": 1}, "labels"),
        ({"input_ids": IDS, "logits_to_keep": "1"}, "logits_to_keep"),
    ]:
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            m(**arguments)
    with pytest.raises(TypeError, match="config: expected a Config"):
        Model({"vocab_size": 3})


def test_autocast_is_refused_with_the_remedy():
    m, ids = random_model(LLADA2), torch.arange(6)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            for call in (m, m.backbone):
                with pytest.raises(RuntimeError, match=r"torch\.autocast: expected to be off for cpu, .*model\.to\(torch\.bfloat16\)"):
                    call(ids)
            with torch.autocast("cpu", enabled=False):
                inside = m(ids).logits
        assert torch.equal(inside, m(ids).logits)


def test_rows_that_look_padded_without_a_mask_are_warned_of():
    m = random_model(replace(LLADA2, pad_token_id=0, mask_token_id=318, eos_token_id=317))
    short = {"gen_length": 4, "block_length": 4}
    right, left, plain = (torch.tensor([[1, 2, 3], row]) for row in ([4, 5, 0], [0, 4, 5], [4, 0, 5]))
    for ids in (right, left):
        for name, call in (("input_ids", m), ("inputs", functools.partial(m.generate, **short))):
            with pytest.warns(UserWarning, match=f"^{name}: a row begins or ends with pad_token_id 0 and there is no attention_mask"):
                call(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m(plain)
        m(right.flatten())
        m(right, attention_mask=(right != 0).long())
        m(right, mask=DiffusionMask.bidirectional([0, 3, 6]))
        m.generate(plain, **short)
        m.generate([[4, 5, 0]], **short)
        m.generate(right, attention_mask=right != 0, **short)


def test_a_cache_is_a_kv_cache():
    for wrong in (object(), (), {}, True):
        with pytest.raises(TypeError, match=f"cache: expected a KVCache or None, got {type(wrong).__name__}"):
            random_model(LLADA2)(torch.arange(4), cache=wrong)
