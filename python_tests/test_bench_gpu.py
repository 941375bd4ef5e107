"""The tables of the GPU part: kernels of other projects beside ours, with stand-ins that have their signatures and compute by PyTorch."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import report
from bench.gpu import attention, moe, others, sampler
from bench.gpu.__main__ import main as gpu_main
from bench.gpu.ceilings import DeviceCeilings
from bench.harness import Case, Settings, Variant, measure
from bench.runner import read

SETTINGS = Settings(True, 1, "", 0.0, 1, 1, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    """Whatever this machine has: only stand-ins are found."""
    for name in list(sys.modules):
        if name.partition(".")[0] in others.PACKAGES.values():
            monkeypatch.delitem(sys.modules, name)
    found = importlib.util.find_spec
    absent = set(others.PACKAGES.values())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else found(name, *rest))


def stand_in(monkeypatch: Any, name: str, **content: Any) -> ModuleType:
    """A module, and the packages that it lies in, as if imported."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    module = sys.modules[name]
    vars(module).update(content)
    return module


def of_others(case: Case) -> Case:
    """The case with the variants of other projects alone."""
    return replace(case, variants=[v for v in case.variants if any(v.name.startswith(label) for label in others.PACKAGES)])


def rows_of(case: Case) -> list[dict[str, Any]]:
    return measure(case, SETTINGS, DeviceCeilings(SETTINGS))


def expect_times(case: Case, *names: str) -> None:
    rows = rows_of(of_others(case))
    assert [(r["variant"], r["status"], r["reason"]) for r in rows] == [(name, "ok", None) for name in names]
    assert all("seconds" in r for r in rows)


def named(case: Case, name: str) -> Any:
    return next(v for v in case.variants if v.name == name)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[n, heads, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)


def documents(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, causal: bool) -> Tensor:
    assert offsets.dtype == torch.int32 and int(offsets.diff().max()) == longest and int(offsets[-1]) == len(q) == len(k)
    bounds = offsets.tolist()
    return torch.cat([dense(q[a:b], k[a:b], v[a:b], causal) for a, b in zip(bounds, bounds[1:], strict=False)])


def cached_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    """[R, n, heads, D] over [R, S, kv heads, D]."""
    assert lengths.dtype == torch.int32 and lengths.shape == (len(q),) and not causal
    return torch.stack([dense(q[r], k[r, :n], v[r, :n], False) for r, n in enumerate(lengths.tolist())])


class Flash:
    """flash_attn 2.8 and flash_attn_interface 3.0; ``seen`` holds how they were called."""

    def __init__(self, monkeypatch: Any) -> None:
        self.seen: list[tuple[int, bool]] = []

        def varlen2(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
            window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
        ):  # fmt: skip
            assert dropout_p == 0.0 and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and not return_attn_probs
            self.seen.append((2, deterministic))
            return documents(q, k, v, cu_seqlens_q, max_seqlen_q, causal)

        def varlen3(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
            causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
            num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
        ):  # fmt: skip
            self.seen.append((3, deterministic))
            out = documents(q, k, v, cu_seqlens_q, max_seqlen_q, causal)
            return out, torch.zeros(1)  # as its first releases

        def kvcache2(
            q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
            cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
        ):  # fmt: skip
            assert k is None and v is None and block_table is None
            return cached_attention(q, k_cache, v_cache, cache_seqlens, causal)

        def kvcache3(
            q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
            cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
            q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0,
            softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
            return_softmax_lse=False,
        ):  # fmt: skip
            assert k is None and v is None
            if page_table is not None:
                assert page_table.dtype == torch.int32 and len(page_table) == len(q)
                k_cache, v_cache = (x[page_table.long()].flatten(1, 2) for x in (k_cache, v_cache))
            return cached_attention(q, k_cache, v_cache, cache_seqlens, causal)

        stand_in(monkeypatch, "flash_attn", flash_attn_varlen_func=varlen2, flash_attn_with_kvcache=kvcache2, __version__="2.8.3")
        stand_in(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=varlen3, flash_attn_with_kvcache=kvcache3)


class PagedWrapper:
    """BatchPrefillWithPagedKVCacheWrapper of FlashInfer 0.6."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None, paged_kv_indptr_buf=None,
                 paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None, backend="auto",
                 jit_args=None, jit_kwargs=None) -> None:  # fmt: skip
        assert float_workspace_buffer.dtype == torch.uint8 and float_workspace_buffer.numel() >= 128 << 20 and kv_layout == "NHD"

    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk, page_size,
             head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
             use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None,
             q_data_type="float16", kv_data_type=None, o_data_type=None, non_blocking=True) -> None:  # fmt: skip
        tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(t.dtype == torch.int32 and t.dim() == 1 for t in tables) and not causal
        assert bool((paged_kv_last_page_len == page_size).all())
        self.tables = [t.tolist() for t in tables]
        self.shape, self.dtype = (num_qo_heads, num_kv_heads, head_dim_qk, page_size), q_data_type

    def run(self, q, paged_kv_cache, *args, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False, enable_pdl=None):
        queries, keys, pages, last = self.tables
        assert (q.shape[1], *paged_kv_cache[0].shape[2:], paged_kv_cache[0].shape[1]) == self.shape and q.dtype == self.dtype
        parts = []
        for row in range(len(last)):
            own = pages[keys[row] : keys[row + 1]]
            k, v = (x[own].flatten(0, 1) for x in paged_kv_cache)
            parts.append(dense(q[queries[row] : queries[row + 1]], k, v, False))
        return torch.cat(parts)


def softmax_of_flashinfer(logits, temperature=None, enable_pdl=None):
    assert logits.dim() == 2
    return logits.float().softmax(-1)


def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, activation="silu", quant_config=None, apply_router_weight_on_input=False,
                  global_num_experts=-1, expert_map=None):  # fmt: skip
    """vLLM 0.11."""
    assert topk_weights.dtype == torch.float32 and topk_ids.dtype == torch.int32 and activation == "silu"
    out = torch.zeros_like(hidden_states)
    for t, k in torch.cartesian_prod(*(torch.arange(n) for n in topk_ids.shape)).tolist():
        gate, up = (w1[topk_ids[t, k]] @ hidden_states[t]).chunk(2)
        out[t] += topk_weights[t, k] * (w2[topk_ids[t, k]] @ (F.silu(gate) * up))
    return out


def moe_general_routing_inputs(x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
                               is_inference_mode_enabled=False):  # fmt: skip
    """SonicMoE 0.0.1."""
    assert w1.stride(1) == 1 and w2.stride(1) == 1 and w1.shape[2] == w2.shape[2] == E and activation_type == "swiglu"
    assert token_indices.dtype == expert_indices.dtype == torch.int32 and router_scores.dtype == torch.float32
    assert bool((token_indices.diff() >= 0).all()) and len(token_indices) == len(expert_indices) == len(router_scores)
    assert b1 is None and b2 is None and is_inference_mode_enabled != torch.is_grad_enabled()
    product = torch.einsum("rh,fhr->rf", x[token_indices], w1[:, :, expert_indices])
    rows = torch.einsum("ri,hir->rh", F.silu(product[:, ::2]) * product[:, 1::2], w2[:, :, expert_indices])
    out = torch.zeros_like(x).index_add(0, token_indices, rows * router_scores[:, None])
    return out, torch.bincount(expert_indices, minlength=E)


def gmm(a, b, batch_sizes, trans_b=False):
    """grouped_gemm 0.1.6."""
    assert batch_sizes.dtype == torch.int64 and batch_sizes.device.type == "cpu" and trans_b
    return torch.cat([rows @ w.T for rows, w in zip(a.split(batch_sizes.tolist()), b, strict=True)])


def m_grouped_bf16_gemm_nt_contiguous(a, b, d, grouped_layout, compiled_dims="nk", use_psum_layout=False, ensure_zero_padding=True,
                                      expected_m_for_psum_layout=None):  # fmt: skip
    """DeepGEMM 2.6."""
    assert grouped_layout.dtype == torch.int32 and len(grouped_layout) == len(a)
    d.copy_(torch.einsum("rk,rnk->rn", a, b[grouped_layout]))


class LigerLoss(torch.nn.Module):
    """LigerFusedLinearCrossEntropyLoss of liger_kernel 0.8."""

    def __init__(self, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean", softcap=None,
                 return_z_loss=False, accum_dtype=None, use_token_scaling=False, return_token_accuracy=False,
                 return_predicted_tokens=False) -> None:  # fmt: skip
        super().__init__()
        assert accum_dtype == torch.float32
        self.reduction = reduction

    def forward(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy(_input @ lin_weight.T, target, reduction=self.reduction)


def test_flash_attention_runs_causal_documents_as_a_yardstick(monkeypatch):
    flash = Flash(monkeypatch)
    for cases in (attention.training, attention.packed, attention.prefill):
        for case in cases(SETTINGS):
            expect_times(case, "FlashAttention 2 causal", "FlashAttention 3 causal")
            assert all(named(case, f"FlashAttention {n} causal").role == "yardstick" for n in (2, 3))
    assert set(flash.seen) == {(2, False), (3, False)}
    case = next(attention.packed(SETTINGS))
    lengths = case.shapes["lengths"]
    assert len(lengths) > 1 and sum(lengths) == 128
    variant = named(case, "FlashAttention 2 causal")
    assert variant.flops == 4 * 128 * 16 * sum(n * (n + 1) // 2 for n in lengths) and variant.run().shape == (128, 16, 128)
    # Gradients are those of the documents' own tokens.
    backward = named(next(c for c in attention.packed(SETTINGS) if "backward" in c.name), "FlashAttention 3 causal")
    assert [len(g) for g in backward.run()] == [128] * 3


def test_flash_attention_with_and_without_determinism(monkeypatch):
    flash = Flash(monkeypatch)
    for case in attention.determinism(SETTINGS):
        kinds = [f"FlashAttention {n} causal, {kind}" for n in (2, 3) for kind in ("deterministic", "not deterministic")]
        expect_times(case, *kinds)
        assert all(row["extra"] == {"runs": 3, "different_runs": 0} for row in rows_of(of_others(case)))
    assert set(flash.seen) == {(n, strict) for n in (2, 3) for strict in (True, False)}


def test_a_run_with_other_bits_is_seen_and_shown():
    values = iter([1.0, 1.0, 2.0])
    counted = attention.repeats(lambda: (torch.full((2,), next(values)),), SETTINGS)
    assert counted == {"runs": 3, "different_runs": 1}
    assert report.facts({"extra": counted}) == ", 1 of 3 runs differ"
    assert report.facts({"extra": {"runs": 100, "different_runs": 0}}) == ", 100 equal runs" and report.facts({}) == ""


def test_decoding_over_the_caches_of_other_projects(monkeypatch):
    Flash(monkeypatch)
    stand_in(monkeypatch, "flashinfer", BatchPrefillWithPagedKVCacheWrapper=PagedWrapper, __version__="0.6.18")
    flash = ("FlashAttention 2, contiguous cache", "FlashAttention 3, contiguous cache", "FlashAttention 3, paged cache")
    names = (*flash, "FlashInfer, paged cache")
    expect_times(next(attention.decode(SETTINGS)), *names)
    expect_times(attention.decode_case("three rows", 16, 3, 96, SETTINGS), *names)


def test_experts_of_other_projects(monkeypatch):
    stand_in(monkeypatch, "vllm.model_executor.layers.fused_moe", fused_experts=fused_experts)
    stand_in(monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=moe_general_routing_inputs)
    stand_in(monkeypatch, "sonicmoe.enums", ActivationType=type("ActivationType", (), {"SWIGLU": "swiglu"}))
    plain, *quantised = moe.decode(SETTINGS)
    expect_times(plain, "vLLM fused_experts")
    assert [case.name.split()[-2] for case in quantised] == ["int8", "int4", "fp8"]
    for case in quantised:
        expect_times(case)
    for case in moe.training(SETTINGS):
        expect_times(case, "SonicMoE")


def test_a_wrong_weight_gradient_of_interleaved_rows_is_found(monkeypatch):
    def swapped(*args: Any) -> Any:
        w1 = args[4]
        return moe_general_routing_inputs(
            *args[:4], torch.stack([w1[1::2], w1[::2]], 1).flatten(0, 1).permute(2, 0, 1).contiguous().permute(1, 2, 0), *args[5:]
        )

    stand_in(monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=swapped)
    stand_in(monkeypatch, "sonicmoe.enums", ActivationType=type("ActivationType", (), {"SWIGLU": "swiglu"}))
    for case in moe.training(SETTINGS):
        (row,) = rows_of(of_others(case))
        assert row["status"] == "failed"


def test_grouped_products_of_other_projects(monkeypatch):
    stand_in(monkeypatch, "grouped_gemm.ops", gmm=gmm)
    stand_in(monkeypatch, "deep_gemm", m_grouped_bf16_gemm_nt_contiguous=m_grouped_bf16_gemm_nt_contiguous)
    expect_times(next(moe.grouped(SETTINGS)), "grouped_gemm gmm", "DeepGEMM m_grouped_bf16")


def test_sampler_and_loss_of_other_projects(monkeypatch):
    stand_in(monkeypatch, "flashinfer.sampling", softmax=softmax_of_flashinfer)
    stand_in(monkeypatch, "liger_kernel.transformers", LigerFusedLinearCrossEntropyLoss=LigerLoss)
    expect_times(sampler.unmask("two rows", 2, 512, torch.float32, SETTINGS), "FlashInfer softmax + max")
    expect_times(sampler.loss("loss", 16, 512, 64, SETTINGS), "Liger fused linear cross entropy")


def all_cases() -> Iterator[Case]:
    for cases in (attention.training, attention.determinism, attention.decode, moe.decode, moe.training, moe.grouped, sampler.cases):
        yield from cases(SETTINGS)


def test_absent_packages_are_left_out():
    assert not any(of_others(case).variants for case in all_cases())


def test_the_reference_is_a_baseline_of_every_op():
    without = {case.name for case in all_cases() if not any(v.name == "reference" and v.role == "baseline" for v in case.variants)}
    assert without == {case.name for case in attention.determinism(SETTINGS)}


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no kernel for this device\nmore")


def test_a_package_that_raises_leaves_the_others_their_times(monkeypatch):
    stand_in(monkeypatch, "grouped_gemm.ops", gmm=broken)
    stand_in(monkeypatch, "deep_gemm")  # another version: the function is not there
    rows = {row["variant"]: row for row in rows_of(next(moe.grouped(SETTINGS)))}
    assert (rows["grouped_gemm gmm"]["status"], rows["grouped_gemm gmm"]["reason"]) == (
        "not run",
        "RuntimeError: no kernel for this device",
    )
    assert rows["DeepGEMM m_grouped_bf16"]["status"] == "not run" and "AttributeError" in rows["DeepGEMM m_grouped_bf16"]["reason"]
    # Without its interpreter Triton serves no CPU.
    rest = [row for name, row in rows.items() if name not in ("triton", "grouped_gemm gmm", "DeepGEMM m_grouped_bf16")]
    assert len(rest) == 4 and all(row["status"] == "ok" and "seconds" in row for row in rest)
    assert set(rows["native"]["ratios"]) - {"triton"} == {row["variant"] for row in rest} - {"native"}
    assert report.other_cell(rows["native"], rows["grouped_gemm gmm"], False) == "not run"
    assert any(n.startswith("- grouped_gemm gmm: not run: RuntimeError: no kernel") for n in report.notes(list(rows.values())))


@pytest.mark.parametrize("lasts", [1, 2])
def test_a_package_that_raises_later_leaves_the_others_their_times(monkeypatch, lasts):
    """At the second call, which estimates, and at the third, which is timed."""
    left = [True] * lasts

    def fails_later(*args: Any, **kwargs: Any) -> Any:
        left.pop()  # IndexError when none is left
        return gmm(*args, **kwargs)

    stand_in(monkeypatch, "grouped_gemm.ops", gmm=fails_later)
    rows = {row["variant"]: row for row in rows_of(next(moe.grouped(SETTINGS)))}
    assert rows["grouped_gemm gmm"]["status"] == "not run" and rows["grouped_gemm gmm"]["reason"] == "IndexError: pop from empty list"
    assert "seconds" not in rows["grouped_gemm gmm"] and "grouped_gemm gmm" not in rows["native"]["ratios"]
    assert all("seconds" in rows[name] for name in ("native", "F.grouped_mm", "cuBLAS, group by group", "reference"))


@pytest.mark.parametrize("when", ["prepare", "run"])
def test_a_package_that_compiles_too_long_leaves_the_others_their_times(when):
    slow = {"prepare": lambda: None, "run": lambda: torch.ones(1), when: lambda: time.sleep(60)}
    fast, handler = Variant("ours", lambda: torch.ones(1), "ours"), signal.getsignal(signal.SIGALRM)
    case = Case(
        "op", "case", torch.float32, {}, [fast, Variant("slow", **slow), replace(fast, name="other", role="baseline")], lambda r: None
    )
    begin = time.monotonic()
    rows = measure(case, replace(SETTINGS, patience=0.2), DeviceCeilings(SETTINGS))
    assert time.monotonic() - begin < 30
    assert [row["status"] for row in rows] == ["ok", "not run", "ok"] and rows[1]["reason"] == "TimeoutError: not ready within 0.2 s"
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_versions_of_those_that_ran_stand_in_the_results(monkeypatch, tmp_path):
    stand_in(monkeypatch, "grouped_gemm.ops", gmm=gmm)
    stand_in(monkeypatch, "grouped_gemm", __version__="0.1.6")
    stand_in(monkeypatch, "deep_gemm", m_grouped_bf16_gemm_nt_contiguous=broken, __version__="2.6.1")
    path = tmp_path / "results.json"
    assert gpu_main(["tables", "C", "--json", str(path), "--dry-run"]) == 0
    content = read(path)
    assert content["benches"]["gpu C"]["environment"]["others"] == {"grouped_gemm": "0.1.6"}
    assert "- beside them: grouped_gemm 0.1.6\n" in report.provenance(content)
    assert gpu_main(["tables", "C", "--json", str(path), "--dry-run", "--without", "grouped_gemm", "--without", "deep_gemm"]) == 0
    again = read(path)["benches"]["gpu C"]
    assert again["environment"]["others"] == {} and not any("gemm gmm" in row["variant"] for row in again["rows"])
    assert "beside them" not in report.provenance(read(path))


def test_a_version_that_only_the_distribution_states(monkeypatch):
    assert others.version("pytest") == pytest.__version__
    monkeypatch.delattr(sys.modules["pytest"], "__version__")
    assert others.version("pytest") == importlib.metadata.version("pytest")
    assert others.version("no_such_module") == "unknown"
