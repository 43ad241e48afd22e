"""Models of Hugging Face transformers run on Tilewise.

    from tilewise.compat.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="tilewise")

Training and generation, with padding, packing, caches, sliding windows, sinks and soft caps, in memory linear in the length:
masks stay functions of the indices from the model's code to the kernel. docs/transformers.md has a table of what is supported.
"""
from __future__ import annotations

import functools

OLDEST = (4, 57)                        # the first with masks and attention functions as they are called here

__all__ = ["register", "unregister"]


def register(name: str = "tilewise", *, backend: str = "auto") -> None:
    """Makes attn_implementation=name run `tw.attention`; again with the same name: with the backend named last.

    name: no implementation of transformers' own, without / and |, which mean kernels from the hub and paged caches there.
    backend: as in `tw.attention`.

    Raises:
        ImportError: transformers is not there, or older than 4.57.
        ValueError: the name or the backend cannot be used.
    """
    functions, mask_functions = _interfaces()
    from tilewise import backends
    from tilewise.compat.transformers.attention import attention
    from tilewise.compat.transformers.masking import attention_mask
    if backend != "auto":
        backends.load(backend)
    if not isinstance(name, str) or not name or set(name) & set("/|") or "flash" in name:
        raise ValueError(f"name: expected a name without / and |, and without \"flash\", which has a meaning of its own to "
                         f"transformers, got {name!r}")
    if name == "eager" or mask_functions().get(name, attention_mask) is not attention_mask:
        raise ValueError(f"name: expected one that is free, got {name!r}, an implementation that transformers has already")
    functions.register(name, functools.partial(attention, backend=backend))
    mask_functions.register(name, attention_mask)


def unregister(name: str = "tilewise") -> None:
    """Takes a name registered here away again; a model that was made with it can no longer run."""
    functions, mask_functions = _interfaces()
    from tilewise.compat.transformers.masking import attention_mask
    if mask_functions().get(name) is not attention_mask:
        raise ValueError(f"name: expected one that register() was called with, got {name!r}")
    for interface in (functions, mask_functions):
        del interface._global_mapping[name]    # `register` writes to it, nothing public takes away


def _interfaces() -> tuple:
    """transformers' registries of attention functions and of what makes their masks."""
    wanted = f"transformers >= {'.'.join(map(str, OLDEST))}"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"tilewise.compat.transformers needs {wanted}: pip install 'tilewise[hf]'") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(f"tilewise.compat.transformers needs {wanted}, found {transformers.__version__}")
    return transformers.AttentionInterface, transformers.AttentionMaskInterface
