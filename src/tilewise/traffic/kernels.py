"""The library's own Triton kernels: what they will move and compute for a problem, and what they do when counted.

`predicted` and `counted` give the same launches in the same order with the same names; they agree to the byte.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tilewise import costs
from tilewise.backends import Needs
from tilewise.backends.gpu_math.arguments import padded
from tilewise.backends.gpu_math.splits import folds
from tilewise.backends.triton.configs import Config, choose, forward_row, not_shipped, parts
from tilewise.costs import Blocks, Moved, Sizes, Walk
from tilewise.problem import Operands, Problem
from tilewise.trace.graph import Graph, Node, leaves
from tilewise.traffic.walks import walk

if TYPE_CHECKING:
    from tilewise.traffic.counter import Launch

TABLES = {"q_rows": 12, "k_rows": 12, "work": 8}        # bytes that a program reads of where its sequence lies
NAMES = {"dv_": "dv", "o": "out"}                        # the kernels' DV is a size; O of `baselines.flash1`


@dataclass
class Kernel:
    """One launch: bytes by tensor; FLOPs as in `counter.Launch`, None where no closed form is kept."""
    name: str
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    products: int = 0
    exponentials: int | None = 0
    arithmetic: int | None = None

    @property
    def bytes(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())


def tensors(counts: Mapping[str, int]) -> dict[str, int]:
    """Bytes by tensor, named as in the papers, in alphabetical order; nothing that is 0."""
    named = {NAMES.get(name.lower(), name.lower()): n for name, n in counts.items()}
    return {name: named[name] for name in sorted(named) if named[name]}


# ---- counted -----------------------------------------------------------------------------------------------------------

def counted(problem: Problem, x: Operands, tiles: Blocks, backward: bool = False) -> list[Kernel]:
    """What the kernels do, run in Triton's interpreter in tiles of a chosen size. Only where TRITON_INTERPRET=1."""
    from tilewise.backends.triton import launch
    from tilewise.traffic.counter import counting

    config = Config(tiles.q, tiles.k, 4, 1)
    found: list[Kernel] = []

    def run(kernel: Any, problem: Problem, programs: Callable[[Config], tuple[int, ...]], values: Mapping[str, Any]) -> None:
        before = len(launches)
        launch.run_in(config, kernel, problem, programs, values)
        found.extend(of_launch(kernel.fn.__name__ + values.get("PART", ""), done) for done in launches[before:])

    with counting() as launches:
        out, lse = launch.forward(problem, x, run)
        if backward:
            none = Needs(bias=False, sinks=False)
            launch.backward(problem, x, out, lse, torch.ones_like(out), None, none, run)
    return found


def of_launch(name: str, done: Launch) -> Kernel:
    return Kernel(name, tensors(done.read), tensors(done.written), done.products, done.exponentials, done.arithmetic)


# ---- in closed form ----------------------------------------------------------------------------------------------------

def sizes(problem: Problem) -> Sizes:
    """Of packed sequences, whose rows lie side by side, the rows of all together."""
    slots_q, rows_q = problem.rows_q
    _, rows_k = problem.rows_k
    stored = 0 if problem.stored is None else problem.stored.itemsize
    return Sizes(slots_q, problem.heads, problem.kv_heads, rows_q, rows_k, problem.head_dim, problem.head_dim_v,
                 problem.dtype.itemsize, stored)


def predicted(problem: Problem, x: Operands, tiles: Blocks, backward: bool = False, splits: int = 1) -> list[Kernel]:
    """The same from closed forms (`tilewise.costs`): of the tiles that the mask leaves and the sizes, nothing is run.

    Raises NotImplementedError for what is only counted: captured tensors, batch-invariant calls, latent caches, and packed
    sequences under a mask without bands.
    """
    for reason, there in (("captured tensors", len(x.captured) > 0 and not problem.graphs.listed),
                          ("batch-invariant calls", problem.batch_invariant), ("latent caches", problem.shared),
                          ("statistics", bool(problem.statistics))):
        if there:
            raise NotImplementedError(f"{reason}: counted, not in closed form")
    fold = folds(problem)
    w = walk(problem, x, tiles, fold=fold, splits=splits)
    found = [forward(problem, x, tiles, w, fold, splits)]
    if splits > 1:
        found.append(merged(problem, x, tiles, splits, w))
    if backward:
        rows = w if not fold else walk(problem, x, tiles)
        keys = walk(problem, x, tiles, of_keys=True)
        of_rows = rows.programs * tiles.q * (2 * padded(problem.head_dim_v) - 1)
        found.append(placed(problem, x, Kernel("preprocess", arithmetic=of_rows), costs.delta(sizes(problem), rows.rows),
                            rows.programs, ("q_rows", "work")))
        found += [of_keys(problem, x, tiles, keys, part) for part in parts(problem)]
        found.append(of_queries(problem, x, tiles, rows))
    return found


def shipped(problem: Problem, x: Operands, arch: str, backward: bool = False, splits: int = 1) -> list[Kernel]:
    """As `predicted`, each kernel in the tiles shipped for an architecture (`configs.tsv`). Raises ValueError if none are."""
    found, config = [], chosen(forward_row(problem), problem, arch)
    for i, kernel in enumerate(predicted(problem, x, Blocks(config.BLOCK_M, config.BLOCK_N), backward, splits)):
        own = config if kernel.name == "forward" else chosen(kernel.name, problem, arch)
        found.append(kernel if own[:2] == config[:2] else predicted(problem, x, Blocks(own.BLOCK_M, own.BLOCK_N), backward,
                                                                    splits)[i])
    return found


def chosen(kernel: str, problem: Problem, arch: str) -> Config:
    """The kernel's configuration. Raises ValueError where none is shipped."""
    lacking = not_shipped([kernel], problem, arch)
    if lacking is not None:
        raise ValueError(lacking)
    return choose(kernel, problem, arch)


def placed(problem: Problem, x: Operands, kernel: Kernel, moved: Moved, programs: int, used: tuple[str, ...] = tuple(TABLES),
           ) -> Kernel:
    """With the tables that say where each program's sequence lies."""
    read = dict(moved.read)
    of_keys = kernel.name.startswith("key")
    there = {"q_rows": x.q_rows is not None, "k_rows": x.k_rows is not None,
             "work": x.k_rows is not None and x.q_rows is not None
                     and (problem.packed_k if of_keys else problem.packed_q) is not None}
    read |= {name: TABLES[name] * programs for name in used if there[name]}
    kernel.read, kernel.written = tensors(costs.added(kernel.read, read)), tensors(costs.added(kernel.written, moved.written))
    return kernel


def of_tiles(problem: Problem, x: Operands, tiles: Blocks, w: Walk, members: int = 1) -> dict[str, int]:
    """What every kernel that visits tiles reads beside their rows: bias, dropout's numbers, lists of tiles."""
    read = {}
    if x.bias is not None:
        read["bias"] = w.visits * tiles.q * tiles.k * x.bias.itemsize      # beyond the end indices are clamped, not hidden
    if problem.dropout:
        read["rng"] = w.visits * 3 * 8
    if problem.graphs.listed:
        read["list"] = 4 * (3 * w.programs * members + w.visits)
        for name, tensor, rows, cols in lookups(problem, x):
            elements = (tiles.q if rows else 1) * (tiles.k if cols else 1)
            read[name] = read.get(name, 0) + w.masked * elements * tensor.itemsize
    return read


def lookups(problem: Problem, x: Operands) -> list[tuple[str, Tensor, bool, bool]]:
    """The captured tensors that a mask's graph looks up: (name, tensor, by the query's index, by the key's)."""
    found: dict[Node, None] = {}

    def visit(graph: Graph) -> None:
        if isinstance(graph, Node) and graph not in found:
            if graph.op == "load":
                found[graph] = None
            for argument in graph.args:
                if isinstance(argument, (str, Node)):
                    visit(argument)

    if problem.graphs.mask is not None:
        visit(problem.graphs.mask)
    result = []
    for node in found:
        number = int("".join(c for c in str(node.args[0]) if c.isdigit()))
        used = frozenset[str]().union(*(leaves(a) for a in node.args[1::2] if isinstance(a, (str, Node))))
        result.append((f"t{number}", x.captured[number], "q" in used, "k" in used))
    return result


def exponentials(problem: Problem, n: int) -> int | None:
    return None if problem.graphs.score is not None else n


class Unit(NamedTuple):
    """What arithmetic of single elements depends on: fp32 keeps statistics natural, 16 bits in base 2, scaled on the way."""
    natural: bool
    d: int
    dv: int


def unit(problem: Problem, x: Operands) -> Unit | None:
    """None where score functions, biases, dropout or sinks add arithmetic of their own."""
    if problem.graphs.score is not None or x.bias is not None or problem.dropout or x.sinks is not None:
        return None
    return Unit(problem.dtype == torch.float32, padded(problem.head_dim), padded(problem.head_dim_v))


def finalized(u: Unit, rows: int) -> int:
    """acc / l, and lse: `softmax.finalize`."""
    return rows * (u.dv + 2)


def forward(problem: Problem, x: Operands, tiles: Blocks, w: Walk, fold: bool, splits: int) -> Kernel:
    s, programs = sizes(problem), splits * w.programs
    read = of_tiles(problem, x, tiles, w._replace(programs=programs))
    if x.pages is not None:
        read["pages"] = 2 * w.others * x.pages.itemsize
    if x.sinks is not None and splits == 1:
        read["sinks"] = programs * (tiles.q if fold else 1) * x.sinks.itemsize
    for name, scale in (("k_scale", x.k_scale), ("v_scale", x.v_scale)):
        if scale is not None:
            read[name] = programs * scale.itemsize
    dims = padded(problem.head_dim) + padded(problem.head_dim_v)
    kernel = Kernel("forward", read, products=costs.products(w.visits * tiles.q * tiles.k, dims),
                    exponentials=exponentials(problem, w.visits * (tiles.q * tiles.k + tiles.q) + programs * sink_exps(
                        x, splits, tiles) + programs * tiles.q))
    if u := unit(problem, x):               # `softmax.update`: a tile's exponent, two reductions; 5 of each row; acc
        tile = tiles.q * tiles.k
        kernel.arithmetic = w.visits * ((5 if u.natural else 4) * tile + tiles.q * (3 + u.dv)) + finalized(
            u, programs * tiles.q) + (0 if u.natural else programs)
        if x.v_scale is not None:
            kernel.arithmetic += programs * tiles.q * u.dv
    return placed(problem, x, kernel, costs.flash2_forward(s, w, splits), programs)


def sink_exps(x: Operands, splits: int, tiles: Blocks) -> int:
    """Of a block of rows whose denominator a sink joins: one for the old statistics, and one for the sink."""
    return 2 * tiles.q if x.sinks is not None and splits == 1 else 0


def merged(problem: Problem, x: Operands, tiles: Blocks, splits: int, w: Walk) -> Kernel:
    slots, rows = problem.rows_q
    programs = costs.cut(rows, tiles.q) * slots * problem.heads
    read = {} if x.sinks is None else {"sinks": programs * x.sinks.itemsize}
    count = programs * tiles.q * (2 * splits + 1 + (0 if x.sinks is None else 2))
    kernel = Kernel("merge", read, exponentials=count)
    if u := unit(problem, x):               # `softmax.merge`: two ratios, l, acc
        per_row = (7 if u.natural else 6) + 3 * u.dv
        kernel.arithmetic = programs * tiles.q * splits * per_row + finalized(u, programs * tiles.q)
    return placed(problem, x, kernel, costs.merge(sizes(problem), splits, w.parts), 0, ())


def of_keys(problem: Problem, x: Operands, tiles: Blocks, w: Walk, part: str) -> Kernel:
    d, dv = padded(problem.head_dim), padded(problem.head_dim_v)
    dims = {"": 2 * (d + dv), " dk": 2 * d + dv, " dv": d + dv}[part]
    scores = w.visits * tiles.q * tiles.k
    kernel = Kernel("key_gradients" + part, of_tiles(problem, x, tiles, w, problem.group),
                    products=costs.products(scores, dims), exponentials=exponentials(problem, scores))
    if u := unit(problem, x):
        per_tile = 5 * tiles.q * tiles.k if u.natural else 4 * tiles.q * tiles.k + tiles.q + 1
        kernel.arithmetic = w.visits * per_tile + (0 if part == " dv" else w.programs * tiles.k * u.d)
    return placed(problem, x, kernel, costs.flash2_keys(sizes(problem), w, part), w.programs)


def of_queries(problem: Problem, x: Operands, tiles: Blocks, w: Walk) -> Kernel:
    d, dv = padded(problem.head_dim), padded(problem.head_dim_v)
    scores = w.visits * tiles.q * tiles.k
    kernel = Kernel("query_gradients", of_tiles(problem, x, tiles, w), products=costs.products(scores, 2 * d + dv),
                    exponentials=exponentials(problem, scores))
    if u := unit(problem, x):
        per_tile = 5 * tiles.q * tiles.k if u.natural else 4 * tiles.q * tiles.k + 1
        kernel.arithmetic = w.visits * per_tile + w.programs * tiles.q * (u.d + (0 if u.natural else 1))
    return placed(problem, x, kernel, costs.flash2_queries(sizes(problem), w), w.programs)
