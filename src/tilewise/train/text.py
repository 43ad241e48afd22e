"""Text as bytes: which files, in which order, split how, and which batch comes at which step.

Everything here is a pure function of the files and the seed: two runs, or one that was resumed, see the same batches.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SKIPPED = {"__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from and bytes to judge by, both uint8 [n]; they never share a byte."""

    source: str
    files: int
    train: Tensor
    val: Tensor


def load_corpus(path: str | Path | None = None, *, max_bytes: int = 8 << 20, val_share: float = 0.1,
                min_bytes: int = 1 << 14) -> Corpus:
    """The text of a file or folder; without a path, of the Python standard library's own sources.

    A folder's files are ordered by a hash of their names, which mixes them, so that the tail kept for validation is a
    fair sample; binary files, hidden folders, tests and installed packages are left out. Reads at most max_bytes.
    """
    stdlib = path is None
    root = Path(sysconfig.get_path("stdlib") if stdlib else path)   # type: ignore[arg-type]
    source = "the Python standard library" if stdlib else str(root)
    if not root.exists():
        raise FileNotFoundError(f"text: no such file or folder: {root}")
    names = [root] if root.is_file() else list_files(root, suffix=".py" if stdlib else "")
    parts: list[bytes] = []
    size = 0
    for name in names:
        part = _read_text(name, max_bytes - size, strict=root.is_file())
        if part:
            parts.append(part)
            size += len(part)
        if size >= max_bytes:
            break
    if size < min_bytes:
        raise ValueError(f"text: expected at least {min_bytes:,} bytes of text, got {size:,} from {source}")
    data = torch.from_numpy(np.frombuffer(b"".join(parts), dtype=np.uint8).copy())
    cut = size - int(size * val_share)
    return Corpus(source, len(parts), data[:cut], data[cut:])


def list_files(root: Path, suffix: str = "") -> list[Path]:
    """Files under root whose names end in suffix, in an order that depends on their relative names only."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.startswith(".")]
        found += [Path(folder, name) for name in files if name.endswith(suffix) and not name.startswith(".")]
    return sorted(found, key=lambda file: hashlib.sha256(file.relative_to(root).as_posix().encode()).digest())


def batch(data: Tensor, step: int, *, size: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (one byte further), both int64 [size, context]: batch number `step` of the stream `seed`."""
    start = np.random.default_rng((seed, step)).integers(len(data) - context, size=(size, 1))
    window = data[torch.from_numpy(start) + torch.arange(context + 1)].long()                     # [size, context + 1]
    return window[:, :-1], window[:, 1:]


def _read_text(file: Path, limit: int, *, strict: bool) -> bytes:
    """At most `limit` bytes of a file, or nothing where it is binary. What cannot be read is an error if `strict`."""
    try:
        with file.open("rb") as stream:
            part = stream.read(limit)
    except OSError:
        if strict:
            raise
        return b""
    if b"\0" in part[:8192]:
        if strict:
            raise ValueError(f"text: expected a text file, got a binary one: {file}")
        return b""
    return part
