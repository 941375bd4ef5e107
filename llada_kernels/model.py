"""The model of the family: LLaDA2, its autoregressive parent Bailing MoE V2 (Ling 2.0), and LLaDA-MoE."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import generation, hub
from ._model_inputs import ModelInputs, check_token_ids, prepare
from .config import Config
from .masks import DiffusionMask
from .nn import Block, RMSNorm, RouterOutput
from .nn.moe import MoE, QuantizedWeight
from .nn.plain import is_plain
from .ops._common import compute_dtype
from .ops.quantized_experts import check_group_size
from .ops.rope import rope_tables

__all__ = ["Model", "ModelOutput"]

IGNORED_LABEL = -100


@dataclass(eq=False)
class ModelOutput:
    """Result of :meth:`Model.forward`; leading dimensions are those of the input, [B, S] or [T].

    Attributes:
        logits: fp32 [..., vocab_size]; of the kept tokens only if ``logits_to_keep`` was given.
        loss: fp32 scalar, the mean cross entropy over labels that are not -100; None without labels.
        hidden_states: embeddings, the output of every layer but the last, and the normalised final state; None unless asked for.
        router_logits: of each MoE layer (fp32 logits [..., E], int64 chosen experts [..., K]); None unless asked for.
    """

    logits: Tensor
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_logits: tuple[tuple[Tensor, Tensor], ...] | None = None


class Model(nn.Module):
    """A block-diffusion MoE language model, or its autoregressive parent.

    Weights are drawn from a normal distribution (``config.initializer_range``), norms are one, biases zero;
    :meth:`from_pretrained` reads official checkpoints instead.

    Args:
        config: shapes and rules of the model.
        dtype: of the parameters; None takes PyTorch's default dtype. Expert biases are always fp32.
        device: where the parameters live; None takes PyTorch's default device.

    Attributes:
        gradient_checkpointing: keep only each layer's input for the backward pass and compute the rest again.
        generation_config: what generation_config.json of the checkpoint said; written back by :meth:`save_pretrained`.
        load_report: what loading left out or converted.
    """

    def __init__(self, config: Config, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        if not isinstance(config, Config):
            raise TypeError(f"config: expected a Config, got {type(config).__name__}")
        self.config = config
        self.gradient_checkpointing = False
        self.generation_config: dict[str, Any] = {}
        self.load_report = hub.LoadReport()
        vocab, hidden = config.vocab_size, config.hidden_size
        # Built without memory first: PyTorch's own initialisation of each part would be thrown away.
        kind: Any = {"dtype": torch.get_default_dtype() if dtype is None else dtype, "device": "meta"}
        self.embed_tokens = nn.Embedding(vocab, hidden, config.pad_token_id, **kind)
        self.layers = nn.ModuleList(Block(config, i, **kind) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps, **kind)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(hidden, vocab, False, **kind)
        target = torch.get_default_device() if device is None else torch.device(device)
        if target.type != "meta":
            self.to_empty(device=target)
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew (from PyTorch's global generator of the device).

        Raises:
            ValueError: the experts are quantised: there are no weights of theirs to draw.
        """
        if any(isinstance(module, QuantizedWeight) for module in self.modules()):
            raise ValueError("reset_parameters: expected a model that is not quantised, got quantised experts")
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, self.config.initializer_range)
        for buffer in self.buffers():
            buffer.zero_()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        *,
        revision: str | None = None,
        expert_dtype: str | None = None,
    ) -> Model:
        """Read an official checkpoint: config.json and safetensors files, sharded or not, experts apart or merged.

        Every problem of the files is found from their headers and reported together, before any memory is allocated. Tensors
        are copied straight into the parameters, one shard at a time. ``load_report`` of the model lists what was left out.

        Args:
            path: a directory, or a Hugging Face repository "owner/name" (downloaded; only JSON and safetensors files are).
            dtype: of the parameters, or its name such as "bfloat16"; None and "auto" keep the stored one. Expert biases are fp32;
                a router weight is never narrowed.
            device: where the model goes; None is the CPU.
            revision: branch, tag or commit of the repository.
            expert_dtype: "int8", "int4" or "fp8" quantises the experts' weights while they are read, one expert at a time, so that the
                full weights are never in memory. See :meth:`quantize_experts`.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: not a checkpoint, an unknown architecture, pickled weights.
            CheckpointError: (a ValueError) the list of missing, unknown, wrongly shaped, wrongly typed or truncated tensors and shards.
            OSError: the repository cannot be fetched.

        Precision: bitwise what is stored, unless ``dtype`` converts it.
        """
        return hub.load(cls, path, dtype, device, revision, expert_dtype)

    def quantize_experts(self, kind: str, group_size: int | None = None) -> Model:
        """Quantise the routed experts' weights in place, layer by layer. The model then serves inference only: no parameter wants a
        gradient any more, and :meth:`save_pretrained` refuses it.

        Args:
            kind: "int8" (8.5 bits per weight), "int4" (4.5 bits), or "fp8": e4m3 weights and activations, for GPUs; on a CPU the
                reference serves them, slowly. The hidden size and the expert width must be multiples of 128.
            group_size: columns that share a scale, 32, 64 or 128; None takes 32. fp8 has blocks of 128 x 128.

        Returns:
            The model itself.

        Raises:
            ValueError: an unknown kind, a group size that does not divide the hidden size and the expert width, weights that are not
                finite, or experts that are quantised already.
        """
        c = self.config
        for columns in (c.hidden_size, c.moe_intermediate_size):
            check_group_size(kind, group_size, columns)
        layers = [block.mlp for block in self.layers if isinstance(block.mlp, MoE)]
        if layers and layers[0].expert_kind is not None:
            raise ValueError(f"kind: expected experts that are not quantised yet, got {layers[0].expert_kind} ones")
        for layer in layers:
            layer.quantize(kind, group_size)
        return self.requires_grad_(False)

    def as_diffusion(self, mask_token_id: int | None = None) -> Model:
        """The block-diffusion model to train from these weights: an autoregressive parent reads as a LLaDA2 model.

        The result shares its weights with this model (no memory, and training it changes both); what is frozen stays so. It predicts token
        i at position i, which the parent did not: see :func:`llada_kernels.training.wsd_plan` for its training. The generation config
        is not taken over: the parent's may stop at the mask token.

        Args:
            mask_token_id: None keeps the present one.

        Raises:
            ValueError: no mask token is known, the family has no diffusion counterpart, the experts are quantised, or modules were
                replaced or wrapped, as by adapters: convert before that.
        """
        kind = next((b.mlp.expert_kind for b in self.layers if isinstance(b.mlp, MoE) and b.mlp.expert_kind), None)
        if kind is not None:
            raise ValueError(f"model: expected weights that are not quantised, got {kind} experts")
        result = Model(self.config.as_diffusion(mask_token_id), dtype=self.dtype, device="meta")
        weights = self.state_dict()
        if wrong := sorted(weights.keys() ^ result.state_dict().keys()):
            raise ValueError(f"model: expected plain modules (convert before adapters are added), got others: {', '.join(wrong[:3])}")
        result.load_state_dict(weights, assign=True)
        for new, old in zip(result.parameters(), self.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        result.gradient_checkpointing = self.gradient_checkpointing
        return result.train(self.training)

    def save_pretrained(self, path: str | os.PathLike[str], layout: str = "per_expert", max_shard_size: int | str = "5GB") -> None:
        """Write an official checkpoint; :meth:`from_pretrained` reads it back bitwise.

        Files get their names only when all of them are complete and synced. A checkpoint that was in the directory before can
        still be loaded if this is interrupted or the disk fills up. Weights and configuration cannot be replaced in one
        instant, so one whose config.json would change (another family, layout or dtype) is not overwritten.

        Args:
            path: a directory; made if it does not exist. Empty, or with a checkpoint of the same configuration.
            layout: "per_expert" (one tensor per expert, as released) or "merged" (experts stacked, as the official trainer).
            max_shard_size: bytes, or a text such as "5GB" or "200MiB".

        Raises:
            ValueError: an unknown layout, a size that is none, ``path`` is a file or holds a checkpoint of another
                configuration, quantised experts.
            OSError: the files cannot be written.
        """
        hub.save(self, path, layout, max_shard_size)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.embed_tokens.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return next(self.embed_tokens.parameters()).dtype

    @property
    def lm_head_weight(self) -> Tensor:
        """[vocab_size, hidden_size], what makes logits of hidden states; the embeddings themselves if they are tied.

        Raises:
            ValueError: ``lm_head`` is no plain nn.Linear any more, so that its weight alone does not make the logits.
        """
        if self.lm_head is None:
            return self.embed_tokens.weight
        if not _is_weight(self.lm_head):
            raise ValueError(
                "lm_head: expected a plain nn.Linear without bias or hooks where its weight is used without calling it (in fused losses), "
                f"got {type(self.lm_head).__name__}: merge an adapter into the weight, remove hooks, or use the logits of forward"
            )
        return self.lm_head.weight

    @property
    def plain_lm_head(self) -> bool:
        """Whether logits are :meth:`backbone` times ``lm_head_weight`` and nothing else: not where a subclass has its own forward,
        or ``lm_head`` is wrapped or has hooks."""
        return (self.lm_head is None or _is_weight(self.lm_head)) and getattr(self.forward, "__func__", None) is Model.forward

    def embed(self, input_ids: Tensor) -> Tensor:
        """int64 [...] -> [..., hidden_size]. The row of ``pad_token_id`` gets no gradient, as in the official code."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        mask: DiffusionMask | Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
    ) -> ModelOutput:
        """Logits of a batch of rows [B, S], or of tokens packed into one row [T].

        Without any mask tokens see their whole row, in both directions; for the autoregressive parent, causally. Under
        ``torch.compile(fullgraph=True)`` pass a DiffusionMask: the other forms are made into one on the host.

        Args:
            input_ids: int64 or int32 [B, S] or [T], ids inside the vocabulary.
            mask: who sees whom among the B * S (or T) tokens. A bool tensor [B, S, S], True = visible, is taken too.
            attention_mask: as for transformers. [B, S]: 1 = token, 0 = padding, which real tokens do not see (on a CPU a warning
                tells of rows that begin or end with pad_token_id where there is no mask). [B or 1, 1, S, S]:
                bool, True = visible, or additive, 0 = visible and -inf = hidden; if no row of it is more than two intervals it
                runs as a DiffusionMask, else on the reference backend.
            position_ids: int64 or int32 [B, S], [1, S] or [T]; by default those of the mask, else 0, 1, ... in each row.
            labels: int64 or int32, shape of the input; -100 = ignored. For diffusion models of the same position, for the
                autoregressive parent of the next token in the same document, as shifted by this function.
            cache: a KVCache; the mask is then of kind "cached" (None makes it of ``cache``: S new tokens in each row).
                The new keys and values are recorded in it, to be kept by its ``commit``.
            logits_to_keep: make logits of the last n tokens of each row (0 or None: all), or of the packed tokens that
                an int64 tensor [N] lists. Rows of a packed input are those of a cached mask, else it is one row.
            inputs_embeds: dtype of the model [B, S, H] or [T, H], instead of input_ids.
            output_hidden_states, output_router_logits: also return these.

        Returns:
            ModelOutput. Of packed inputs, and for a tensor ``logits_to_keep``, logits are [N, vocab_size].

        Raises:
            TypeError: an argument of the wrong Python type.
            ValueError: wrong shapes, dtypes or devices, ids outside the vocabulary, arguments that exclude each other.
            RuntimeError: called under torch.autocast; ``model.to(torch.bfloat16)`` is what serves in its place.

        Precision: rounds where the official code does (norms cast before they scale, router in fp32); logits are
            computed in the dtype of the model, then cast to fp32.
        Determinism: bitwise repeatable, for any number of threads in this package's own kernels.
        """
        inputs = prepare(self.config, self.device, self.dtype, input_ids, inputs_embeds, mask, attention_mask, position_ids, cache)
        if labels is not None and not (logits_to_keep is None or (isinstance(logits_to_keep, int) and logits_to_keep == 0)):
            raise ValueError("logits_to_keep: expected None together with labels, got both")
        states: list[Tensor] | None = [] if output_hidden_states else None
        routers: dict[int, RouterOutput] | None = {} if output_router_logits else None
        hidden = self._run(inputs, cache, routers, states)
        index, shape = _kept(logits_to_keep, inputs)
        kept = hidden if index is None else hidden[index]
        logits = F.linear(kept, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(kept)
        logits = logits.to(compute_dtype(logits))
        loss = None if labels is None else self._loss(logits, labels, inputs)
        return ModelOutput(
            logits.view(*shape, -1),
            loss,
            None if states is None else tuple(s.view(*inputs.shape, -1) for s in states),
            None if routers is None else tuple(_router_logits(routers[i], inputs.shape) for i in sorted(routers)),
        )

    def backbone(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        mask: DiffusionMask | Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        router_outputs: dict[int, RouterOutput] | None = None,
        hidden_states: list[Tensor] | None = None,
        num_outputs: int | None = None,
    ) -> Tensor:
        """Everything but the logits: final normalised hidden states, packed [T, hidden_size].

        Arguments as :meth:`forward`. ``router_outputs`` gets the output of each MoE layer's router under the layer's index (also
        once only with gradient checkpointing); ``hidden_states`` gets [T, hidden_size] each, in the order of :class:`ModelOutput`.

        With ``num_outputs`` = N only the first N tokens' states are made, [N, hidden_size]: the last layer has neither queries nor MLP
        for the others. Exact; a training step reads only the noisy tokens. It needs a DiffusionMask without a cache.
        """
        inputs = prepare(self.config, self.device, self.dtype, input_ids, inputs_embeds, mask, attention_mask, position_ids, cache)
        if num_outputs is not None and (cache is not None or not isinstance(inputs.mask, DiffusionMask)):
            raise ValueError("num_outputs: expected None with a cache or a dense mask, got a number")
        return self._run(inputs, cache, router_outputs, hidden_states, num_outputs)

    #: Continue prompts block by block: the function of :mod:`llada_kernels.generation` as a method.
    generate = generation.generate

    def _run(
        self,
        inputs: ModelInputs,
        cache: Any,
        routers: dict[int, RouterOutput] | None,
        states: list[Tensor] | None,
        num_outputs: int | None = None,
    ) -> Tensor:
        x = inputs.tokens if inputs.tokens.is_floating_point() else self.embed(inputs.tokens)
        c = self.config
        cos, sin = rope_tables(inputs.position_ids, c.rotary_dim, c.rope_theta, x.dtype)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        for block in self.layers:
            if states is not None:
                states.append(x)
            arguments = (x, cos, sin, inputs.mask, cache, routers, num_outputs if block is self.layers[-1] else None)
            x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False) if recompute else block(*arguments)
        x = self.norm(x)
        if states is not None:
            states.append(x)
        return x

    def _loss(self, logits: Tensor, labels: Tensor, inputs: ModelInputs) -> Tensor:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected a torch.Tensor, got {type(labels).__name__}")
        if labels.dtype not in (torch.int64, torch.int32) or labels.shape != inputs.shape:
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"labels: expected int64 or int32 of shape {inputs.shape} (that of the input), got {got}")
        check_token_ids("labels", labels, self.config.vocab_size, IGNORED_LABEL)
        target = labels.reshape(-1).long()
        if self.config.causal:
            logits, target = logits[:-1], target[1:].where(inputs.continues(), IGNORED_LABEL)
        total = F.cross_entropy(logits, target, ignore_index=IGNORED_LABEL, reduction="sum")
        return total / (target != IGNORED_LABEL).sum().clamp(min=1)


def _is_weight(head: nn.Module) -> bool:
    return is_plain(head, nn.Linear) and head.bias is None


def _router_logits(output: RouterOutput, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return output.logits.view(*shape, -1), output.routing.topk_ids.long().view(*shape, -1)


def _kept(keep: int | Tensor | None, inputs: ModelInputs) -> tuple[Tensor | None, tuple[int, ...]]:
    """Indices of the packed tokens whose logits are wanted (None: all), and the leading dimensions of those logits."""
    total = inputs.tokens.shape[0]
    if isinstance(keep, Tensor):
        if keep.ndim != 1 or keep.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"logits_to_keep: expected a number or int64 [N], got {keep.dtype} {tuple(keep.shape)}")
        if keep.device.type == "cpu" and keep.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in keep.aminmax())
            if low < 0 or high >= total:
                raise ValueError(f"logits_to_keep: expected indices of 0 to {total - 1}, got {low if low < 0 else high}")
        return keep.to(inputs.tokens.device), (keep.shape[0],)
    if keep is None or (isinstance(keep, int) and keep == 0):
        return None, inputs.shape
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"logits_to_keep: expected an int or a torch.Tensor, got {type(keep).__name__}")
    if keep < 0:
        raise ValueError(f"logits_to_keep: expected at least 0, got {keep}")
    device, mask = inputs.tokens.device, inputs.mask
    if inputs.rows is not None:
        batch, length = inputs.rows
        n = min(keep, length)
        ends = torch.arange(1, batch + 1, device=device) * length
        return (ends[:, None] + torch.arange(-n, 0, device=device)).flatten(), (batch, n)
    if isinstance(mask, DiffusionMask) and mask.query_lens is not None and mask.cu_query_lens is not None:
        left = torch.repeat_interleave(mask.cu_query_lens[1:], mask.query_lens) - torch.arange(total, device=device)
        index = (left <= keep).nonzero().flatten()
    else:
        index = torch.arange(max(total - keep, 0), total, device=device)
    return index, (index.shape[0],)
