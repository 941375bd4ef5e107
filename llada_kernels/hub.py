"""Official checkpoints in and out: ``Model.from_pretrained`` and ``Model.save_pretrained``."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ._checkpoint_files import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    PARTIAL_SUFFIX,
    SHARD_NAME,
    SINGLE_NAME,
    TORCH_DTYPES,
    CheckpointError,
    TensorInfo,
    find_tensors,
    read_tensor,
    replace_file,
    sync,
    write_safetensors,
)
from ._hub_files import resolve
from ._tensor_names import Slot, droppable, layout_of, tensor_slots
from .config import Config, read_json_object
from .nn.moe import QuantizedWeight
from .ops.quantized_experts import KINDS, QuantizedExperts

if TYPE_CHECKING:
    from .model import Model

__all__ = ["CheckpointError", "LoadReport", "load", "save"]

CONFIG_NAME, GENERATION_CONFIG_NAME = "config.json", "generation_config.json"
# Weights as safetensors and plain data only: no pickles, no code.
_WANTED = ("*.json", "*.safetensors", "*.jinja")
_SHARD = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B", re.IGNORECASE)


@dataclass(frozen=True)
class LoadReport:
    """What loading did beside copying.

    Attributes:
        dropped: official tensors that the family lets out (multi-token prediction layers, rotary tables).
        converted: tensors whose stored dtype is not the one they have in the model.
    """

    dropped: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()


def load(
    model_class: type[Model],
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    expert_dtype: str | None = None,
) -> Model:
    """Build a model from an official checkpoint; see :meth:`llada_kernels.Model.from_pretrained`."""
    dtype = _dtype(dtype)
    if expert_dtype is not None and expert_dtype not in KINDS:
        raise ValueError(f"expert_dtype: expected one of {', '.join(KINDS)} or None, got {expert_dtype!r}")
    target = _device(device)
    directory = resolve(path, revision, _WANTED)
    config = Config.from_pretrained(directory)
    generation = directory / GENERATION_CONFIG_NAME
    generation_config = read_json_object(generation) if generation.exists() else {}
    problems: list[str] = []
    tensors = find_tensors(directory, problems)
    slots = tensor_slots(config, layout_of(tensors))
    dropped = _check(config, tensors, slots, problems)
    if problems:
        raise CheckpointError(directory, problems)

    embedding = next(name for name, slot in slots.items() if slot.parameter == "embed_tokens.weight")
    model_dtype = TORCH_DTYPES[tensors[embedding].dtype] if dtype is None else dtype
    with torch.device("meta"):
        model = model_class(config, dtype=model_dtype)
    _keep_router_dtypes(model, tensors, slots)
    if expert_dtype is not None:
        try:
            model.quantize_experts(expert_dtype)
        except ValueError as error:
            raise ValueError(f"expert_dtype: {str(error).partition(': ')[2]}") from None
    model.to_empty(device=target)
    state = model.state_dict()
    for name, slot in slots.items():
        if name not in tensors:
            state[slot.parameter].zero_()  # only an expert bias may be absent, where the configuration says that it is off
    quantized = {name: module.value for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    _copy(tensors, slots, state, quantized)
    plain = [name for name, slot in slots.items() if name in tensors and slot.parameter not in quantized]
    converted = [name for name in plain if TORCH_DTYPES[tensors[name].dtype] != state[slots[name].parameter].dtype]
    model.load_report = LoadReport(tuple(dropped), tuple(converted))
    model.generation_config = generation_config
    return model.eval()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype, None for the stored one."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named is None and dtype in (None, "auto"):
        return None
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype: expected a floating torch.dtype or its name, 'auto' or None, got {dtype!r}")
    return named


def _device(device: torch.device | str | None) -> torch.device:
    """The device, tried out before anything is read."""
    try:
        target = torch.device("cpu") if device is None else torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected None or a device that PyTorch can use here, got {device!r}: {reason}") from error
    return target


def _check(config: Config, tensors: dict[str, TensorInfo], slots: dict[str, Slot], problems: list[str]) -> list[str]:
    """Append everything that keeps ``tensors`` from filling ``slots``; returns the names that may be dropped."""
    dropped: list[str] = []
    fp8 = [name for name in tensors if name.endswith("_scale_inv")]
    if fp8:
        problems.append(f"{len(fp8)} FP8 scale tensors ({fp8[0]}, ...): FP8 exports are not supported yet; use the bf16 checkpoint")
    optional_bias = config.raw.get("moe_router_enable_expert_bias") is False
    for name, slot in slots.items():
        if name not in tensors and not (optional_bias and slot.kind == "expert_bias"):
            problems.append(f"tensor {name}: missing (expected shape {slot.shape})")
    for name, info in tensors.items():
        expected = slots.get(name)
        if expected is None:
            if droppable(config, name, info.shape):
                dropped.append(name)
            elif not name.endswith("_scale_inv"):
                problems.append(f"tensor {name}: unknown in a {config.family} model, got {info.dtype} {info.shape} in {info.file.name}")
            continue
        if info.shape != expected.shape:
            problems.append(f"tensor {name}: expected shape {expected.shape}, got {info.shape} in {info.file.name}")
        if info.dtype not in TORCH_DTYPES:
            problems.append(f"tensor {name}: expected dtype {', '.join(TORCH_DTYPES)}, got {info.dtype} in {info.file.name}")
    return dropped


def _keep_router_dtypes(model: Model, tensors: dict[str, TensorInfo], slots: dict[str, Slot]) -> None:
    """Give router weights their stored dtype where it is the wider one: it decides which experts are chosen."""
    for name, slot in slots.items():
        if slot.kind == "router":
            weight = model.get_parameter(slot.parameter)
            weight.data = weight.data.to(torch.promote_types(weight.dtype, TORCH_DTYPES[tensors[name].dtype]))


def _copy(tensors: dict[str, TensorInfo], slots: dict[str, Slot], state: dict[str, Tensor], quantized: dict[str, QuantizedExperts]) -> None:
    """Copy straight into the parameters, one file open at a time and each read front to back. Experts to be quantised pass through a
    buffer of one expert's tensor."""
    files: dict[Path, list[str]] = {}
    for name in slots:
        if name in tensors:
            files.setdefault(tensors[name].file, []).append(name)
    for file, names in files.items():
        with open(file, "rb") as f:
            for name in sorted(names, key=lambda n: tensors[n].begin):
                slot = slots[name]
                if slot.parameter in quantized:
                    _quantize(f, tensors[name], slot, quantized[slot.parameter])
                else:
                    read_tensor(f, tensors[name], slot.of(state[slot.parameter]))


def _quantize(file: BinaryIO, info: TensorInfo, slot: Slot, target: QuantizedExperts) -> None:
    """Read one expert's rows, or those of all experts one after the other, and quantise them as they are stored."""
    experts = [i for i in slot.index[:1] if isinstance(i, int)] or list(range(info.shape[0]))
    rows = next((i for i in slot.index[1:] if isinstance(i, slice)), slice(None))
    size = (info.end - info.begin) // len(experts)
    buffer = torch.empty(info.shape[-2:], dtype=TORCH_DTYPES[info.dtype])
    for i, expert in enumerate(experts):
        begin = info.begin + i * size
        read_tensor(file, replace(info, shape=info.shape[-2:], begin=begin, end=begin + size), buffer)
        target.set_rows(expert, rows, buffer.to(target.data.device))


def save(model: Model, path: str | os.PathLike[str], layout: str = "per_expert", max_shard_size: int | str = "5GB") -> None:
    """Write an official checkpoint; see :meth:`llada_kernels.Model.save_pretrained`."""
    limit = _bytes(max_shard_size)
    slots = tensor_slots(model.config, layout)
    state = model.state_dict()
    if missing := [slot.parameter for slot in slots.values() if slot.parameter not in state]:
        raise ValueError(
            f"model: expected unquantised experts, got a model whose {missing[0]} is quantised, which official checkpoints cannot hold: "
            "load the original one without expert_dtype and save that"
        )
    directory = Path(path).expanduser()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path: expected a directory, got the file {directory}")
    config_values = _config_dict(model, layout)
    _refuse_other_config(directory, config_values)
    directory.mkdir(parents=True, exist_ok=True)
    for left_over in directory.glob(f".*{PARTIAL_SUFFIX}"):
        left_over.unlink(missing_ok=True)
    before = _weight_files(directory)
    tensors = {name: slot.of(state[slot.parameter]) for name, slot in slots.items()}
    shards = _plan_shards(tensors, limit)
    names = _shard_names(directory, len(shards))
    with contextlib.ExitStack() as partials:
        written = [partials.enter_context(_partial(directory / name)) for name in names]
        for file, shard in zip(written, shards, strict=True):
            with _synced(file) as f:
                write_safetensors(f, {name: tensors[name] for name in shard})
        index = partials.enter_context(_partial(directory / INDEX_NAME))
        if len(shards) > 1:
            total = sum(t.numel() * t.element_size() for t in tensors.values())
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            _write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        config = partials.enter_context(_partial(directory / CONFIG_NAME))
        _write_json(config, config_values)
        generation = partials.enter_context(_partial(directory / GENERATION_CONFIG_NAME))
        if model.generation_config:
            _write_json(generation, model.generation_config)

        # All is on the disk; only renames are left. Shards have names that nothing refers to yet, so what was there before
        # stays loadable until one rename, of the index or of the single file, puts the new checkpoint in its place. A config.json
        # that is there already says the same; generation_config.json, mere defaults of `generate`, follows last.
        for file, name in zip(written, names, strict=True):
            replace_file(file, directory / name)
        if len(shards) > 1:
            replace_file(index, directory / INDEX_NAME)
        else:
            (directory / INDEX_NAME).unlink(missing_ok=True)
            sync(directory)
        replace_file(config, directory / CONFIG_NAME)
        if model.generation_config:
            replace_file(generation, directory / GENERATION_CONFIG_NAME)
        else:
            (directory / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
            sync(directory)
    for old in before:
        if old.name not in names:
            old.unlink(missing_ok=True)


def _refuse_other_config(directory: Path, values: dict[str, Any]) -> None:
    """Weights and config.json cannot be replaced in one instant: a crash between them would leave a checkpoint that loads, but
    as another model. So a checkpoint is only ever overwritten by one of the same config.json."""
    try:
        before = read_json_object(directory / CONFIG_NAME)
    except ValueError:
        return  # none, or one that nothing can load
    missing = object()
    after = json.loads(json.dumps(values))
    if changed := sorted(key for key in before | after if before.get(key, missing) != after.get(key, missing)):
        raise ValueError(
            f"path: expected an empty directory or a checkpoint of the same configuration, got {directory}, whose {CONFIG_NAME} differs "
            f"in {', '.join(changed)}: save to another directory, or remove that checkpoint first"
        )


def _weight_files(directory: Path) -> list[Path]:
    """Weight files that the checkpoint in ``directory`` uses, and those of one that was not finished."""
    names = {f.name for f in directory.glob("model*.safetensors") if f.name == SINGLE_NAME or _SHARD.fullmatch(f.name)}
    with contextlib.suppress(ValueError):
        weight_map = read_json_object(directory / INDEX_NAME, MAX_INDEX_BYTES).get("weight_map")
        if isinstance(weight_map, dict):
            names |= {n for n in weight_map.values() if isinstance(n, str) and SHARD_NAME.fullmatch(n)}
    return [directory / name for name in names]


def _config_dict(model: Model, layout: str) -> dict[str, Any]:
    values = model.config.to_dict()
    if model.config.family == "llada2":
        values["model_type"] = "llada2_moe_veomni" if layout == "merged" else "llada2_moe"
    values["dtype" if "dtype" in values else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
    return values


def _bytes(size: int | str) -> int:
    """A size in bytes from a number or a text such as "5GB" or "200MiB"."""
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** ("KMGT".index(match[2].upper()) + 1 if match[2] else 0))
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"max_shard_size: expected a positive number of bytes or a text such as '5GB', got {size!r}")
    return size


def _plan_shards(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Fill shards in order; a tensor larger than the limit gets a shard of its own."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _shard_names(directory: Path, count: int) -> list[str]:
    """The usual names, or where those are taken by shards of the present checkpoint, names with a number before them."""
    if count == 1:
        return [SINGLE_NAME]
    attempt = 0
    while True:
        prefix = f"model-{attempt}" if attempt else "model"
        names = [f"{prefix}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if not any((directory / name).exists() for name in names):
            return names
        attempt += 1


@contextlib.contextmanager
def _partial(final: Path) -> Iterator[Path]:
    """A temporary name beside ``final``; removed on leaving if it is still there."""
    partial = final.with_name(f".{final.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _synced(file: Path) -> Iterator[Any]:
    with open(file, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


def _write_json(file: Path, values: dict[str, Any]) -> None:
    with _synced(file) as f:
        f.write((json.dumps(values, indent=2) + "\n").encode())
