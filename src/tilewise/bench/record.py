"""What every measurement carries: where, when and on which code it was made; and how it is written."""
from __future__ import annotations

import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from tilewise.doctor import machine


def stamp() -> dict[str, Any]:
    """Machine, versions, commit (None outside a repository, "+" at its end: with changes) and date (UTC)."""
    versions = {"cudnn": torch.backends.cudnn.version()} if torch.cuda.is_available() else {}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"machine": machine() | versions, "commit": commit(), "date": date}


def commit() -> str | None:
    """The commit of the repository that this file is part of."""
    head = _git("rev-parse", "HEAD")
    return head and head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    """What git says about the source tree; None where there is no repository of ours or no git."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write(path: str | Path | None, result: Any) -> None:
    """Writes JSON, whole or not at all; None: nowhere."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, path)


def words(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
