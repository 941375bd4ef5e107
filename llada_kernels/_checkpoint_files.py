"""Files of a safetensors checkpoint: headers read with suspicion, files written so that a crash loses nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .config import read_json_object

__all__ = ["CheckpointError", "TensorInfo", "find_tensors", "read_tensor", "replace_file", "write_safetensors"]

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER_BYTES, MAX_INDEX_BYTES = 16 << 20, 64 << 20
_MAX_DIMS = 8
_BUFFER_BYTES = 16 << 20
_SHOWN_PROBLEMS = 200
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SHARD_NAME = re.compile(r"[^/\\\x00]+\.safetensors")
PARTIAL_SUFFIX = ".partial"

#: Bytes of one element by the dtype names of the format.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. ``problems`` lists everything that is wrong with it, not only the first thing."""

    def __init__(self, where: str | os.PathLike[str], problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        shown = [f"  - {p}" for p in self.problems[:_SHOWN_PROBLEMS]]
        if len(self.problems) > _SHOWN_PROBLEMS:
            shown.append(f"  - and {len(self.problems) - _SHOWN_PROBLEMS} more (all are in .problems)")
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"checkpoint {os.fspath(where)}: {count}", *shown]))


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor; ``begin`` and ``end`` count bytes from the start of the data, at ``data`` in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    data: int


def find_tensors(directory: Path, problems: list[str]) -> dict[str, TensorInfo]:
    """Headers of all weight files of a checkpoint; whatever is wrong is appended to ``problems``.

    Reads ``model.safetensors.index.json`` and the shards that it names, or else ``model.safetensors``. Nothing but headers
    is read, and nothing that a file claims is believed before it is checked against the size of the file.

    Raises:
        CheckpointError: there is nothing to read: no checkpoint at all, pickled weights, an unreadable index.
    """
    index = directory / INDEX_NAME
    if index.exists():
        weight_map = _read_index(index, problems)
        files = sorted(set(weight_map.values()))
    elif (directory / SINGLE_NAME).exists():
        weight_map, files = {}, [SINGLE_NAME]
    else:
        raise CheckpointError(directory, [_nothing_found(directory)])
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        file = directory / name
        if not file.is_file():
            held = sum(1 for f in weight_map.values() if f == name)
            problems.append(f"shard {name}: missing (the index places {held} tensors there)")
            continue
        found = read_header(file, problems)
        for tensor, info in found.items():
            if tensor in tensors:
                problems.append(f"tensor {tensor}: in both {tensors[tensor].file.name} and {name}")
            elif weight_map and weight_map.get(tensor) != name:
                problems.append(f"tensor {tensor}: found in {name}, but the index places it in {weight_map.get(tensor, 'no shard')}")
            tensors[tensor] = info
        if found:
            absent = [t for t, f in weight_map.items() if f == name and t not in found]
            problems.extend(f"tensor {t}: missing from {name}, where the index places it" for t in absent)
    return tensors


def _nothing_found(directory: Path) -> str:
    pickles = sorted(f.name for f in directory.iterdir() if f.name.endswith(_PICKLE_SUFFIXES))
    if pickles:
        return (
            f"expected safetensors, found pickled weights ({', '.join(pickles[:5])}): refused, because loading a pickle runs "
            "code from the file; convert it with safetensors first"
        )
    other = sorted(f.name for f in directory.glob("*.safetensors"))
    hint = f", found only {', '.join(other[:5])}" if other else ""
    return f"expected {SINGLE_NAME} or {INDEX_NAME}{hint}"


def _read_index(index: Path, problems: list[str]) -> dict[str, str]:
    try:
        weight_map = read_json_object(index, MAX_INDEX_BYTES).get("weight_map")
    except ValueError as error:
        raise CheckpointError(index.parent, [str(error)]) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index.parent, [f"{INDEX_NAME}: weight_map: expected a non-empty object, got {weight_map!r:.80}"])
    good: dict[str, str] = {}
    for tensor, name in weight_map.items():
        if isinstance(name, str) and SHARD_NAME.fullmatch(name):
            good[tensor] = name
        else:  # a separator could lead out of the directory; another suffix is not safetensors
            problems.append(f"{INDEX_NAME}: weight_map[{tensor!r}]: expected the plain name of a .safetensors file, got {name!r:.120}")
    return good


def read_header(file: Path, problems: list[str]) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, checked: known dtypes, sizes that fit shapes, no overlap, no gap, all inside the file."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                problems.append(f"{file.name}: truncated or not safetensors: {size} bytes, of which the header claims {length}")
                return {}
            if length > _MAX_HEADER_BYTES:
                problems.append(f"{file.name}: expected a header of at most {_MAX_HEADER_BYTES} bytes, got {length}")
                return {}
            header = json.loads(f.read(length).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError, MemoryError) as error:
        problems.append(f"{file.name}: expected a JSON header, got {error}")
        return {}
    except OSError as error:
        problems.append(f"{file.name}: expected a readable file, got {error}")
        return {}
    if not isinstance(header, dict):
        problems.append(f"{file.name}: expected a JSON object as header, got {type(header).__name__}")
        return {}
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info = _entry(file, entry, 8 + length)
        if isinstance(info, str):
            problems.append(f"tensor {name}: {info} (header of {file.name})")
        else:
            tensors[name] = info
    _check_ranges(file, tensors, size - 8 - length, len(tensors) == len(header), problems)
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name that occurs twice")
    return result


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _entry(file: Path, entry: Any, data: int) -> TensorInfo | str:
    """One entry of a header, or what is wrong with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return f"expected dtype, shape and data_offsets, got {entry!r:.80}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"dtype: expected one of {', '.join(ITEM_BYTES)}, got {dtype!r:.80}"
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_count(n) for n in shape):
        return f"shape: expected at most {_MAX_DIMS} sizes of at least 0, got {shape!r:.80}"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_count(n) for n in offsets) or offsets[0] > offsets[1]:
        return f"data_offsets: expected two rising positions, got {offsets!r:.80}"
    expected = ITEM_BYTES[dtype]
    for n in shape:
        expected *= n
    if offsets[1] - offsets[0] != expected:
        return f"data_offsets: expected {expected} bytes for {dtype} of shape {tuple(shape)}, got {offsets[1] - offsets[0]}"
    return TensorInfo(file, dtype, tuple(shape), offsets[0], offsets[1], data)


def _check_ranges(file: Path, tensors: dict[str, TensorInfo], data: int, complete: bool, problems: list[str]) -> None:
    cut = [name for name, t in tensors.items() if t.end > data]
    if cut:
        missing = max(tensors[name].end for name in cut) - data
        problems.append(f"{file.name}: truncated: {missing} bytes are missing, for the tensors {', '.join(cut)}")
    reached, previous = 0, ""
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if t.begin < reached:
            problems.append(f"tensor {name}: its bytes overlap those of {previous} (header of {file.name})")
        elif t.begin > reached and complete:
            problems.append(f"tensor {name}: expected data from byte {reached}, got {t.begin} (a gap; header of {file.name})")
        if t.end >= reached:
            reached, previous = t.end, name
    if complete and not cut and reached != data:
        problems.append(f"{file.name}: expected {reached} bytes of data by its header, got {data}")


def read_tensor(file: BinaryIO, info: TensorInfo, target: Tensor) -> None:
    """Read one tensor from its open file into ``target``, any strided view of its shape on any device, converting the dtype.

    Bytes go straight into the target where that is possible, else through a buffer of a few megabytes: a mapped file would
    count as memory of this process as far as it is read.

    Raises:
        ValueError: the file has become shorter since its header was read.
    """
    file.seek(info.data + info.begin)
    _read(file, target, TORCH_DTYPES[info.dtype])


def _read(file: BinaryIO, target: Tensor, dtype: torch.dtype) -> None:
    if not target.is_contiguous():
        for part in target:
            _read(file, part, dtype)
        return
    direct = target.device.type == "cpu" and target.dtype == dtype
    for part in target.view(-1).split(_BUFFER_BYTES // dtype.itemsize):
        buffer = part if direct else torch.empty(part.shape, dtype=dtype)
        if file.readinto(buffer.view(torch.uint8).numpy().data) != buffer.numel() * dtype.itemsize:  # type: ignore[attr-defined]
            raise ValueError(f"{file.name}: expected the tensors of its header, got a file that ends within them")
        if not direct:
            part.copy_(buffer)


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` (any device) in the safetensors format, one at a time: no copy of more than one is held.

    Raises:
        ValueError: a dtype that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    # The widest elements first keep every tensor aligned to its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name}: expected a dtype that safetensors files hold here, got {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        if tensor.numel():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def replace_file(partial: Path, final: Path) -> None:
    """Give a finished, synced file its name, and sync the directory: after a crash the old or the new file is there, whole."""
    os.replace(partial, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Flush a file to the disk; of a directory, make the renames and removals in it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
