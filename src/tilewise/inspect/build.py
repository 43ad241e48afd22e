"""Compile a Triton or Gluon kernel for any supported GPU on a machine that has none."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend

from tilewise.backends.gpu_math.launches import OPTIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

Path = tuple[int, ...]  # where a value stands among the arguments: (2,) or, inside a tuple argument, (2, 0)


class KernelCase(Protocol):
    """One kernel in one configuration for one GPU; any object with these attributes will do.

    Arguments are named "x"; the elements of a tuple argument "x[0]", "x[1][0]".
    """

    @property
    def name(self) -> str:
        """What a reader calls it, "forward d128 bf16 causal"; unique together with `arch`."""

    @property
    def direction(self) -> str:
        """"forward", "backward", "decode", ..."""

    @property
    def arch(self) -> str:
        """A key of `TARGETS`."""

    @property
    def kernel(self) -> Any:
        """The decorated function."""

    @property
    def signature(self) -> Mapping[str, Any]:
        """Argument -> "*bf16", "i32", "fp32", "constexpr", ..., or a tuple of these, which may nest."""

    @property
    def constants(self) -> Mapping[str, Any]:
        """Compile-time values: None, numbers, strings, jit functions. `signature` may leave out their arguments."""

    @property
    def unaligned(self) -> frozenset[str]:
        """Integers and pointers that are not multiples of 16 (bytes, for pointers). A tuple's name covers all of it."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...

    @property
    def maxnreg(self) -> int | None:
        """Registers of a thread when the program starts; None: as many as there are for one program on a multiprocessor."""

    @property
    def tensor_cores(self) -> bool:
        """Whether matrix products must run on tensor cores (True for all but ieee fp32)."""

    @property
    def key(self) -> str:
        """Hash of everything the machine code depends on: sources, configuration, Triton's version."""


def build(case: KernelCase) -> CompiledKernel:
    """Compile `case`.

    Raises RuntimeError when TRITON_INTERPRET is set, ValueError when the case does not fit its kernel or names an
    unknown arch, and whatever Triton raises when the kernel does not compile (`reason` makes one line of it).
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton interprets kernels in this process and cannot compile them")
    if case.arch not in TARGETS:
        raise ValueError(f"{case.name}: arch must be one of {', '.join(TARGETS)}, got {case.arch!r}")
    target = TARGETS[case.arch]
    types = _types(case)
    source = _source_class(case.kernel)(case.kernel, types, _constants(case, types), _alignment(case, types, target))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg, **OPTIONS}
    with contextlib.redirect_stdout(io.StringIO()):  # a failing ptxas would print the whole PTX
        return triton.compile(source, target=target, options=options)


def reason(error: BaseException) -> str:
    """The most telling line of a compilation error, at most 200 characters."""
    while error.__cause__ is not None:  # the outer errors only say which call was being compiled
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() and "code" not in line]
    line = (telling or lines[-1:] or [""])[0]
    return f"{type(error).__name__}: {line}"[:200]


def _source_class(kernel: Any) -> type[ASTSource]:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _types(case: KernelCase) -> dict[str, Any]:
    """Every argument's type, in the kernel's order; all names checked."""
    arguments = case.kernel.arg_names
    types = {name: "constexpr" if name in case.constants else case.signature.get(name) for name in arguments}
    untyped = [name for name, kind in types.items() if kind is None]
    unknown = sorted(set(case.signature) - set(arguments))
    if untyped or unknown:
        raise ValueError(f"{case.name}: arguments without a type: {untyped}; types without an argument: {unknown}")
    known = {label for names, _, _ in _leaves(types) for label in names}
    unknown = sorted((set(case.constants) | case.unaligned) - known)
    if unknown:
        raise ValueError(f"{case.name}: constants or unaligned names that are no argument: {unknown}")
    return types


def _constants(case: KernelCase, types: Mapping[str, Any]) -> dict[Path, Any]:
    constants: dict[Path, Any] = {}
    for names, path, kind in _leaves(types):
        if kind == "constexpr":
            if names[-1] not in case.constants:
                raise ValueError(f"{case.name}: {names[-1]} is a constexpr without a value")
            value = constants[path] = case.constants[names[-1]]
            if isinstance(value, tuple) and any(isinstance(item, triton.JITFunction) for item in value):
                # Triton hashes such a tuple by the functions' names: an edited function would come stale from its cache
                raise ValueError(f"{case.name}: {names[-1]} must not be a constexpr tuple of jit functions; "
                                 "make the argument a tuple and each element a constexpr")
    return constants


def _alignment(case: KernelCase, types: Mapping[str, Any], target: GPUTarget) -> dict[Path, list]:
    """What a launch with aligned tensors below 2 GB and round numbers would tell the compiler.

    Without it there are no 16-byte loads and no asynchronous copies. As in a launch, nothing is told about arguments
    that the kernel's decorator excludes; inside tuples Triton does not heed it.
    """
    backend = make_backend(target)
    attributes = {}
    for names, path, kind in _leaves(types):
        pointer, parameter = kind.startswith("*"), case.kernel.params[path[0]]
        excluded = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        told = not case.unaligned.intersection(names) and not (excluded and len(path) == 1)
        if told and (pointer or kind in ("i32", "i64")):
            attributes[path] = backend.parse_attr("DS" if pointer else "D")  # divisible by 16; small (AMD only)
    return attributes


def _leaves(types: Mapping[str, Any]) -> Iterator[tuple[list[str], Path, str]]:
    """(names from the whole argument down to the element, path, type) of every plain value."""

    def visit(names: list[str], path: Path, kind: Any) -> Iterator[tuple[list[str], Path, str]]:
        if not isinstance(kind, tuple):
            yield names, path, kind
            return
        for i, element in enumerate(kind):
            yield from visit([*names, f"{names[-1]}[{i}]"], (*path, i), element)

    for i, (name, kind) in enumerate(types.items()):
        yield from visit([name], (i,), kind)
