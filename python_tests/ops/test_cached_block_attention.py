from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.masks import DiffusionMask
from llada_kernels.ops.block_attention import block_attention
from llada_kernels.ops.cached_block_attention import BACKENDS, cached_block_attention
from llada_kernels.testing import assert_as_exact_as

from ..backends import cpu_backends

NAMES = cpu_backends(BACKENDS)


class Case:
    """Random rows over a shuffled cache. What no row may read is NaN; page numbers behind a context name no page."""

    def __init__(self, context_lens, query_lens, block_size, heads=4, kv_heads=2, dim=16, dtype=torch.float32, page_size=None):
        page_size = page_size or block_size
        self.mask = DiffusionMask.cached(context_lens, query_lens, block_size)
        new = sum(query_lens)
        self.q, self.k, self.v = (torch.randn(new, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
        pages = [-(-n // page_size) for n in context_lens]
        self.cache_k, self.cache_v = (torch.full((sum(pages) + 2, page_size, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
        self.page_table = torch.full((len(pages), max(pages, default=0) + 1), 10**6, dtype=torch.int32)
        free = torch.randperm(sum(pages) + 2).tolist()
        self.context = []  # dense keys and values of each row
        for row, length in enumerate(context_lens):
            k, v = (torch.randn(length, kv_heads, dim, dtype=dtype) for _ in range(2))
            for i in range(pages[row]):
                page = self.page_table[row, i] = free.pop()
                n = min(page_size, length - i * page_size)
                self.cache_k[page, :n], self.cache_v[page, :n] = k[i * page_size :][:n], v[i * page_size :][:n]
            self.context.append((k, v))
        self.query_lens, self.block_size = query_lens, block_size

    def arguments(self):
        return self.q, self.k, self.v, self.cache_k, self.cache_v, self.page_table, self.mask

    def run(self, backend, scale=None):
        with torch.no_grad():
            return cached_block_attention(*self.arguments(), scale, backend=backend)

    def by_rows(self, attend, dtype):
        """Row by row: dense attention over [context, new keys], each new token seeing new keys up to the end of its block."""
        parts, begin = [], 0
        for (k, v), n in zip(self.context, self.query_lens, strict=True):
            new = slice(begin, begin + n)
            keys, values = torch.cat([k, self.k[new]]), torch.cat([v, self.v[new]])
            visible = torch.ones(n, len(keys), dtype=torch.bool)  # filled in on a CPU, one by one
            for i in range(n):
                for j in range(n):
                    visible[i, len(k) + j] = j // self.block_size <= i // self.block_size
            parts.append(attend(self.q[new].to(dtype), keys.to(dtype), values.to(dtype), visible.to(keys.device)))
            begin += n
        return torch.cat(parts) if parts else torch.empty_like(self.q, dtype=dtype)


def exact(q, k, v, visible):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def sdpa(q, k, v, visible):
    if len(q) == 0:
        return q
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*rows, attn_mask=visible, enable_gqa=True)[0].transpose(0, 1)


def check(backend, case):
    assert_as_exact_as(case.run(backend), case.by_rows(sdpa, case.q.dtype), case.by_rows(exact, torch.float64), name="out")


def check_overflowing_scores(case, backend):
    """Products of -inf with the context, in one part or in many: only the new keys have a weight."""
    case.q[:] = 1e20
    case.cache_k[:] = -1e20
    case.context = [(torch.full_like(k, -1e20), v) for k, v in case.context]
    torch.testing.assert_close(case.run(backend), case.by_rows(sdpa, torch.float32))


ROWS = {
    "denoise": ([32, 96, 0], [32, 32, 32], 32),
    "commit_and_next": ([64, 0], [64, 64], 32),
    "prefill": ([0, 0, 0], [150, 1, 33], 32),
    "ragged": ([8, 0, 200, 16, 0], [5, 0, 8, 17, 3], 8),
    "nothing_new": ([8, 16], [0, 0], 8),
    "no_rows": ([], [], 8),
}


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 32), (6, 2, 40), (2, 2, 8)])
@pytest.mark.parametrize("rows", ROWS)
def test_values(rows, heads, kv_heads, dim, dtype, backend):
    check(backend, Case(*ROWS[rows], heads, kv_heads, dim, dtype))


@pytest.mark.parametrize("backend", NAMES)
def test_official_head_geometry(backend):
    check(backend, Case([128, 32], [32, 64], 32, 16, 4, 128, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1024, 2048, 2080, 4096, 9000])
def test_long_contexts(length, dtype):
    """Contexts that are cut into parts for several threads, beside one that is not."""
    case = Case([length, 40, length], [8, 8, 40], 8, 2, 1, 8, dtype)
    case.k *= 4  # scores of new keys large or small beside those of the context: the parts' maxima differ
    check("native", case)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 256])
def test_page_size_is_free(page_size, backend):
    check(backend, Case([80, 0, 144], [16, 16, 20], 16, page_size=page_size))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 2, 7, 8, 9, 31, 33])), max_size=4),
    st.sampled_from([1, 3, 8, 32]),
    st.sampled_from(NAMES),
)
def test_any_rows(rows, block_size, backend):
    check(backend, Case([n * block_size for n, _ in rows], [n for _, n in rows], block_size, 2, 1, 8))


def test_is_block_attention_of_the_whole_row():
    """Cached context and new blocks together are block-causal attention over the row, as without a cache."""
    case = Case([64], [40], 16)
    k, v = (torch.cat([context, new]) for context, new in zip(case.context[0], (case.k, case.v), strict=True))
    q = torch.cat([torch.randn(64, 4, 16), case.q])
    for backend in NAMES:
        whole = block_attention(q, k, v, DiffusionMask.block_causal([0, 104], 16), backend=backend)
        torch.testing.assert_close(case.run(backend), whole[64:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_alone_and_in_a_batch(dtype):
    """A row's result depends neither on the rows beside it nor on which pages it got nor on the number of threads."""
    lengths, news = [96, 32, 0, 4128], [32, 45, 7, 32]
    case = Case(lengths, news, 32, dtype=dtype)
    before = torch.get_num_threads()
    together = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        together.append(case.run("native"))
    torch.set_num_threads(before)
    assert all(torch.equal(together[0], x) for x in together[1:])
    begin = 0
    for row, (length, n) in enumerate(zip(lengths, news, strict=True)):
        alone = Case([length], [n], 32, dtype=dtype)
        alone.q, alone.k, alone.v = (x[begin : begin + n] for x in (case.q, case.k, case.v))
        pages = case.page_table[row, : length // 32].long()
        order = torch.arange(length // 32).flip(0)
        alone.cache_k, alone.cache_v = (torch.cat([x[pages[order]], x[:1]]) for x in (case.cache_k, case.cache_v))
        alone.page_table = order.int()[None]
        assert torch.equal(alone.run("native"), together[0][begin : begin + n])
        begin += n


@pytest.mark.parametrize("backend", NAMES)
def test_non_contiguous_inputs(backend):
    case = Case([16, 8], [8, 8], 8)
    expected = case.run(backend)
    case.q, case.k, case.v = torch.cat([case.q, case.k, case.v], 1).split((4, 2, 2), 1)
    case.cache_k, case.cache_v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.cache_k, case.cache_v))
    case.page_table = torch.stack([case.page_table, case.page_table], -1)[..., 0]
    assert not any(x.is_contiguous() for x in case.arguments()[:-1])
    torch.testing.assert_close(case.run(backend), expected)


@pytest.mark.parametrize("backend", NAMES)
def test_softmax_scale(backend):
    case = Case([8], [8], 8)
    scaled = Case([8], [8], 8)
    scaled.__dict__.update({**case.__dict__, "q": case.q * 0.3 * 4})  # 1 / sqrt(16) is the default
    torch.testing.assert_close(case.run(backend, scale=0.3), scaled.run(backend))


def test_native_is_inference_only():
    case = Case([8], [8], 8)
    case.q.requires_grad_()
    with pytest.raises(ValueError, match="native is inference only"):
        cached_block_attention(*case.arguments(), backend="native")
    out = cached_block_attention(*case.arguments())  # the reference serves
    grad = torch.autograd.grad(out.sum(), case.q)[0]
    assert torch.isfinite(grad).all()
    with torch.inference_mode():
        torch.testing.assert_close(cached_block_attention(*case.arguments(), backend="native"), out.detach())


def test_gradcheck():
    case = Case([4, 0], [2, 3], 2, 2, 1, 2, torch.float64)
    case.cache_k, case.cache_v = (x.nan_to_num(0.5) for x in (case.cache_k, case.cache_v))  # finite differences touch every entry
    inputs = [x.requires_grad_() for x in case.arguments()[:5]]
    rest = case.arguments()[5:]
    assert torch.autograd.gradcheck(lambda *x: cached_block_attention(*x, *rest, backend="reference"), inputs)


def operator_arguments(case):
    plan = case.mask.tile_plan()
    return [*case.arguments()[:-1], case.mask.own, plan.tiles, plan.order, plan.rows, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_contract(dtype):
    torch.library.opcheck(torch.ops.llada_kernels.cached_block_attention, operator_arguments(Case([8, 0], [8, 3], 8, dtype=dtype)))


def test_compiles_without_graph_breaks():
    @torch.no_grad()
    def f(*arguments):
        return cached_block_attention(*arguments, backend="native").sin()

    compiled = torch.compile(f, fullgraph=True)
    for context in ([16, 8], [24, 0]):
        case = Case(context, [8, 8], 8)
        torch.testing.assert_close(compiled(*case.arguments()), case.run("reference").sin())


def test_errors():
    def fails(error, text, backends=NAMES, **changes):
        case = Case([16, 8], [8, 8], 8)
        case.__dict__.update(changes)
        for backend in backends:
            with pytest.raises(error, match=text):
                case.run(backend)

    good = Case([16, 8], [8, 8], 8)
    fails(ValueError, r"mask: expected kind 'cached', got 'causal' \(use block_attention\)", mask=DiffusionMask.causal([0, 16]))
    fails(TypeError, r"mask: expected a DiffusionMask, got Tensor", mask=torch.ones(16, 16))
    fails(ValueError, r"mask: expected one row per token of q \(15\), got 16", q=good.q[:15])
    fails(ValueError, r"v_new: expected shape \(16, 2, 16\)", v=good.v[:15])
    fails(ValueError, r"cache_k: expected 4 dimensions", cache_k=good.cache_k[0])
    fails(ValueError, r"cache_k: expected shape \(\*, \*, 2, 16\), got \(5, 8, 1, 16\)", cache_k=good.cache_k[:, :, :1])
    fails(ValueError, r"cache_v: expected shape \(5, 8, 2, 16\), got \(4, 8, 2, 16\)", cache_v=good.cache_v[:4])
    fails(ValueError, r"cache_k: expected dtype torch.float32 \(that of q\), got torch.bfloat16", cache_k=good.cache_k.bfloat16())
    empty = torch.empty(5, 0, 2, 16)
    fails(ValueError, r"cache_k: expected pages of at least one key", cache_k=empty, cache_v=empty)
    fails(ValueError, r"page_table: expected dtype int32, got int64", page_table=good.page_table.long())
    fails(ValueError, r"page_table: expected shape \(2, \*\), got \(1, 3\)", page_table=good.page_table[:1])
    short = good.page_table[:, :1]
    fails(ValueError, r"page_table: expected pages for the 16 cached keys of row 0, got 8 places", page_table=short)
    for page in (-1, 5):
        wrong = good.page_table.clone()
        wrong[1, 0] = page
        fails(ValueError, rf"page_table: expected pages below 5, got {page} in row 1", page_table=wrong)
    odd = {name: value[..., :12] for name, value in good.__dict__.items() if name in ("q", "k", "v", "cache_k", "cache_v")}
    fails(ValueError, r"native serves head dims that are multiples of 8, got 12", ["native"], **odd)


def test_operator_refuses_a_plan_of_other_sizes():
    case = Case([16, 8], [40, 8], 8)
    op = torch.ops.llada_kernels.cached_block_attention
    cases = [
        (7, (1, 3), 10**6, r"page_table: expected pages for the 1000000 cached keys of row 0, got 24 places"),
        (7, (2, 5), 49, r"tiles: own keys of tile 2: expected keys in \[0, 48\), got \[40, 49\)"),
        (7, (1, 3), 24, r"page_table: expected pages below 5, got 1000000 in row 0"),
        (9, (2,), 2, r"page_table: expected an entry for row 2"),
    ]
    for index, at, value, text in cases:
        arguments = operator_arguments(case)
        arguments[index] = arguments[index].clone()
        arguments[index][at] = value
        with pytest.raises(ValueError, match=text):
            op(*arguments)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("context", [32, 4096])
def test_overflowing_scores(backend, context):
    check_overflowing_scores(Case([context], [32], 32), backend)
