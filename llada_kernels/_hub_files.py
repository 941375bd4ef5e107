"""Where a checkpoint's files are: a directory, or the local copy of a Hugging Face repository."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["resolve"]

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def resolve(path: str | os.PathLike[str], revision: str | None, wanted: Sequence[str]) -> Path:
    """The directory of a checkpoint: ``path`` itself, or a repository's local copy, of which only files like ``wanted`` are fetched.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: a file, neither a directory nor a hub id, or huggingface_hub is not installed.
        OSError: the repository cannot be fetched.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a path or a hub id, got {type(path).__name__}")
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        hint = ": pickled weights are refused" if directory.suffix in (".bin", ".pt", ".pth", ".ckpt") else ""
        raise ValueError(f"path: expected a directory with config.json and safetensors files, got the file {directory}{hint}")
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        raise ValueError(f"path: expected a directory or a hub id 'owner/name', got {os.fspath(path)!r}, which does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"path: no directory {path!r} here, and huggingface_hub, which would fetch it, is not installed") from error
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:
        raise OSError(f"path: no directory {path!r} here, and it could not be fetched from the hub: {error}") from error
