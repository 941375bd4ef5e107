"""Text for the demo that every Python installation already has: documentation and source code of its standard library."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["END", "MASK", "Corpus", "read_corpus", "show_tokens", "train_tokenizer"]

END, MASK = "<|endoftext|>", "<|mask|>"

# Tests and tables: little language, much repetition.
_LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__", "idlelib", "lib2to3",
    "pydoc_data", "turtledemo", "ensurepip", "config",
}  # fmt: skip
# Words with their leading space, indentation and runs of the same punctuation, as in GPT-2's rule but with line breaks apart.
_WORDS = Regex(r" ?[A-Za-z_]+|[0-9]{1,3}|\n[ \t]*| ?[^\sA-Za-z0-9_]+|\s+")
_SHORTEST = 200  # characters; shorter pieces teach little
_HELD_OUT = 20  # one document of this many is never trained on


@dataclass(frozen=True)
class Corpus:
    """Documents as strings; the held-out ones are chosen by a hash of the text's origin, the same on every machine."""

    train: list[str]
    held_out: list[str]

    @property
    def characters(self) -> int:
        """Length of all documents together."""
        return sum(map(len, self.train)) + sum(map(len, self.held_out))


def read_corpus(max_characters: int) -> Corpus:
    """Documentation strings, function bodies and help topics of the standard library, up to ``max_characters``.

    A whole module is either trained on or held out, so that no held-out text was seen in another form.

    Raises:
        ValueError: this Python has too little of its standard library in source form.
    """
    sources = sorted(_sources(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    train: list[str] = []
    held_out: list[str] = []
    total = 0
    for origin, read in sources:
        held = int.from_bytes(hashlib.sha256(b"split" + origin.encode()).digest()[:4], "big") % _HELD_OUT == 0
        for piece in read():
            if len(piece) >= _SHORTEST:
                (held_out if held else train).append(piece)
                total += len(piece)
        if total >= max_characters:
            break
    if sum(map(len, train)) < 200_000 or sum(map(len, held_out)) < 10_000:
        raise ValueError(
            f"standard library: expected at least 200 kB of its source text under {sysconfig.get_paths()['stdlib']}, "
            f"got {total} characters; the demo needs a Python that ships its .py files"
        )
    return Corpus(train, held_out)


def _sources() -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Name of every module and help topic, and what reads its pieces of text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not _LEFT_OUT.intersection(name.parts[:-1]) and not name.parts[0].startswith("config-"):
            yield name.as_posix(), partial(_module, path)
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for key, text in topics.items():
        yield f"topic {key}", partial(_paragraphs, text)


def _module(path: Path) -> list[str]:
    """Pieces of a source file; none if it cannot be read or is not valid for this version of Python."""
    try:
        return list(_pieces(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []


def _pieces(source: str) -> Iterator[str]:
    """English (documentation strings) and code (top-level functions and methods, without them) of a module."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield from _paragraphs(text)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield _code(node, lines)


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str:
    """A function's source, dedented, without its documentation string."""
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    kept = list(lines[first:last])
    if ast.get_docstring(node) is not None and node.body[0].lineno > node.lineno:
        begin, end = node.body[0].lineno - 1 - first, (node.body[0].end_lineno or node.body[0].lineno) - first
        del kept[begin:end]
    return inspect.cleandoc("\n" + "".join(kept)) + "\n"


def _paragraphs(text: str, longest: int = 1500) -> list[str]:
    """Text cut at blank lines into pieces of at most about ``longest`` characters."""
    pieces, current = [], ""
    for paragraph in text.strip().split("\n\n"):
        if current and len(current) + len(paragraph) > longest:
            pieces.append(current)
            current = ""
        current += ("\n\n" if current else "") + paragraph
    return [*pieces, current] if current else pieces


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer; every text can be written with it. Its last two ids are END and MASK."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END, MASK])
    return tokenizer


def show_tokens(tokenizer: Tokenizer, tokens: Sequence[int], mask_id: int, blank: str = "\u2591") -> str:
    """Text of a sequence that is partly masked; a mask is shown as ``blank``, END as an empty string."""
    text = ""
    run: list[int] = []
    for token in [*tokens, mask_id]:
        if token == mask_id:
            text += tokenizer.decode(run) + blank
            run = []
        else:
            run.append(token)
    return text[: -len(blank)]
