"""Models of Hugging Face transformers run on Tilewise.

    from tilewise.compat.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="tilewise")

Training and generation, with padding, packing, caches, sliding windows, sinks and soft caps, in memory linear in the length:
masks stay functions of the indices from the model's code to the kernel. docs/transformers.md has a table of what is supported.
"""
from __future__ import annotations

import functools
import importlib
from types import ModuleType

from tilewise import backends
from tilewise.compat.transformers.attention import attention_forward
from tilewise.compat.transformers.masking import index_mask

OLDEST = (4, 57)                        # the first with masks and attention functions as they are called here

__all__ = ["register", "unregister"]


def register(name: str = "tilewise", *, backend: str = "auto") -> None:
    """Makes attn_implementation=name run `tw.attention`, from now on; again with the same name: with the backend named last.

    name: no implementation of transformers' own, without / and |, which mean kernels from the hub and paged caches there.
    backend: as in `tw.attention`.

    Raises:
        ImportError: transformers is not there, or older than 4.57.
        ValueError: the name or the backend cannot be used.
    """
    library = _transformers()
    if backend != "auto":
        backends.load(backend)
    if not isinstance(name, str) or not name or set(name) & set("/|") or "flash" in name:
        raise ValueError(f"name: expected a name without / and |, and without \"flash\", which has a meaning of its own to "
                         f"transformers, got {name!r}")
    if name == "eager" or (name in library.AttentionInterface() and not _ours(library, name)):
        raise ValueError(f"name: expected one that is free, got {name!r}, an implementation that is there already")
    library.AttentionInterface.register(name, functools.partial(attention_forward, backend=backend))
    library.AttentionMaskInterface.register(name, index_mask)


def unregister(name: str = "tilewise") -> None:
    """Takes a name registered here away again; a model that was made with it can no longer run."""
    library = _transformers()
    if not _ours(library, name):
        raise ValueError(f"name: expected one that register() was called with, got {name!r}")
    for interface in (library.AttentionInterface, library.AttentionMaskInterface):
        del interface._global_mapping[name]    # `register` writes to it, nothing public takes away


def _ours(library: ModuleType, name: str) -> bool:
    return getattr(library.AttentionInterface().get(name), "func", None) is attention_forward


def _transformers() -> ModuleType:
    """transformers, if it is there and new enough."""
    wanted = f"transformers >= {'.'.join(map(str, OLDEST))}"
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"tilewise.compat.transformers needs {wanted}: pip install 'tilewise[hf]'") from error
    if tuple(int(part) for part in library.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(f"tilewise.compat.transformers needs {wanted}, found {library.__version__}")
    return library
