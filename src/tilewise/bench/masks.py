"""What masks and score functions cost: capturing them, finding their tiles, sparse blocks, gradients of captured tables.

    python -m tilewise.bench.masks [--quick] [--out FILE]

Each call is held to the tolerance rule before it is timed; sums that no one could hold whole (16k queries) for a sample of
the queries, with dout 0 elsewhere. Beside them, where it runs, torch's FlexAttention without compilation.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tilewise as tw
from tilewise import patterns
from tilewise.bench import record
from tilewise.bench.cases import Call, Case
from tilewise.bench.resident import GIVE_BACK, restart_peak, status_bytes
from tilewise.bench.timing import Timing, compare, finish, times_faster
from tilewise.bench.tolerance import Results, judge
from tilewise.masks import Mask
from tilewise.trace.bounds import EMPTY, FULL, PARTIAL

Row = dict[str, Any]
SAMPLE = 128                            # queries, and tiles of each class, that are checked
PROMISED = 1.3                          # at most, of the ratio with to without a captured table's gradient
FLEX_BYTES, FLEX_SECONDS = 2**31, 20.0  # what create_block_mask may take
DOCUMENT = 4096                         # tokens, on average


@dataclass(frozen=True)
class Sizes:
    """What is measured. seconds: for all calls of one comparison together."""
    functions: int = 1024
    classified: tuple[int, ...] = (131072, 1048576)
    flex_from: int = 4096
    sparse: int = 16384
    sparse_heads: int = 4
    captured: int = 2048
    repeats: int = 15
    seconds: float = 20.0
    head_dim: int = 64
    block: int = 128


QUICK = Sizes(classified=(131072,), sparse=4096, sparse_heads=1, captured=512, repeats=5, seconds=2.0)


# ---- one call of attention, and whether it is right ---------------------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """Attention under functions of the indices. score: the score function for a table, tensors["table"]."""
    tensors: dict[str, Tensor]          # q, k, v [1, N, H, D], and "table"
    dout: Tensor
    mask: Callable | None = None
    score: Callable[[Tensor | None], Callable] | None = None
    blocks: Mask | None = None          # the mask as it is given when timed

    @property
    def learned(self) -> list[str]:
        return [name for name, x in self.tensors.items() if x.requires_grad]

    def forward(self, turn: int = 0) -> Tensor:
        """The call that is timed."""
        mask = self.mask if self.blocks is None else self.blocks
        score = None if self.score is None else self.score(self.tensors.get("table"))
        return tw.attention(*(self.tensors[name] for name in "qkv"), mask=mask, score_mod=score)

    def both(self, turn: int = 0) -> tuple[Tensor, ...]:
        """The call that is timed, with its gradients."""
        return torch.autograd.grad(self.forward(), [self.tensors[name] for name in self.learned], self.dout)

    def standard(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Some queries' out and gradients by standard attention in a dtype."""
        x = {name: (t[:, rows] if name == "q" else t).detach().to(dtype) for name, t in self.tensors.items()}
        for name in self.learned:
            x[name].requires_grad_()
        score = None if self.score is None else moved(self.score(x.get("table")), rows)
        mask = None if self.mask is None else moved(self.mask, rows)
        out = tw.attention(x["q"], x["k"], x["v"], mask=mask, score_mod=score, backend="reference")
        return self._named(out, torch.autograd.grad(out, [x[name] for name in self.learned], self.dout[:, rows].to(dtype)))

    def sampled(self, rows: Tensor) -> dict[str, Tensor]:
        """The same of the call that is timed: all queries, dout 0 but for the chosen ones."""
        out = self.forward()
        dout = torch.zeros_like(self.dout).index_copy_(1, rows, self.dout[:, rows])
        found = self._named(out[:, rows], torch.autograd.grad(out, [self.tensors[name] for name in self.learned], dout))
        return found | {"dq": found["dq"][:, rows]}

    def _named(self, out: Tensor, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"out": out.detach()} | {f"d{name}": g for name, g in zip(self.learned, gradients, strict=True)}


def moved(function: Callable, rows: Tensor) -> Callable:
    """A mask or score function for queries that were picked out."""
    def at(*arguments):
        *first, q, k = arguments
        return function(*first, rows[q], k)
    return at


def draw(length: int, heads: int, head_dim: int, device: torch.device,
         dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """q, k and v, which require gradients, and dout."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (torch.randn((1, length, heads, head_dim), generator=generator, device=device, dtype=dtype)
                     for _ in range(4))
    return {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}, dout


def sample(q: Tensor) -> Tensor:
    """Which of the queries are checked, ascending."""
    return torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(1))[:SAMPLE].sort().values.to(q.device)


def faults(work: Work) -> str:
    """What is wrong with the call that is timed; nothing, if it may be timed."""
    q, k, v = (work.tensors[name] for name in "qkv")
    rows = sample(q)
    found, truth, standard = (Results(x) for x in (
        work.sampled(rows), work.standard(rows, torch.float64), work.standard(rows, q.dtype)))
    verdicts = judge(Call(Case("timed"), q[:, rows], k, v, {}), found, truth, standard)
    return "; ".join(f"{v.name}: {v.note or f'error {v.error:.1e}, allowed {v.allowed:.1e}'}" for v in verdicts if not v.ok)


def admitted(works: dict[str, Work]) -> dict[str, Row]:
    """A row for each: its state, "timed" or "wrong"."""
    found = {name: faults(work) for name, work in works.items()}
    return {name: {"state": "wrong" if words else "timed", "reason": words} for name, words in found.items()}


# ---- 1. functions: the first call with a new one, and at a new length -----------------------------------------------------

def new_mask(index: int) -> Callable:
    """A causal mask function, whose graph is another for each index from 0 to 2^8 - 1, at the same cost."""
    def visible(b, h, q, k):
        kept = q >= k
        for bit in range(8):
            kept = kept & (q - k != -1 - bit) if index >> bit & 1 else kept & (k - q != 1 + bit)
        return kept
    return visible


def new_score(index: int) -> Callable:
    """A score function, whose graph is another for each index from 0 to 2^8 - 1, at about the same cost."""
    def score_mod(s, b, h, q, k):
        for bit in range(8):
            s = s + 0.001 * bit if index >> bit & 1 else s - 0.001 * bit
        return s
    return score_mod


def functions(sizes: Sizes, device: torch.device) -> Row:
    """First calls with new functions and at new lengths, beyond the same call again; FlexAttention at the same length."""
    length = sizes.functions
    tensors, dout = draw(length, 4, sizes.head_dim, device)

    def with_function(what: str, index: int) -> Callable[[], Tensor]:
        if what == "mask":
            return Work(tensors, dout, mask=new_mask(index)).forward
        function = new_score(index)
        return Work(tensors, dout, score=lambda _: function).forward

    def at_length(what: str, index: int) -> Callable[[], Tensor]:
        other, dout = draw(length + 16 * (1 + index), 4, sizes.head_dim, device)
        return Work(other, dout, mask=causal).forward if what == "mask" else Work(other, dout, score=lambda _: capped).forward

    checked = {"mask": Work(tensors, dout, mask=new_mask(0)), "score": Work(tensors, dout, score=lambda _: new_score(0))}
    row: Row = {"length": length, "heads": 4, "head_dim": sizes.head_dim, "flex": flex(length, sizes, device)}
    for what, entry in admitted(checked).items():
        if entry["state"] == "timed":
            entry["new_function"] = first_calls(partial(with_function, what), sizes.repeats, device)
            entry["new_length"] = first_calls(partial(at_length, what), sizes.repeats, device)
        row[what] = entry
    return row


def causal(b, h, q, k):
    return q >= k


def capped(s, b, h, q, k):
    return 20.0 * torch.tanh(s / 20.0)


def first_calls(make: Callable[[int], Callable[[], object]], repeats: int, device: torch.device) -> Row:
    """Seconds of first calls, of the same calls again (the median of three), and of the differences."""
    first, again = [], []
    for index in range(repeats + 1):
        call = make(index)
        one, *others = (stopwatch(call, device) for _ in range(4))
        if index:                       # with the very first, libraries wake up
            first.append(one)
            again.append(statistics.median(others))
    beyond = [a - b for a, b in zip(first, again, strict=True)]
    return {name: Timing(rounds, rounds).summary() for name, rounds in dict(first=first, again=again, beyond=beyond).items()}


def stopwatch(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until the result is there."""
    finish(device)
    begin = time.perf_counter()
    call()
    finish(device)
    return time.perf_counter() - begin


def flex(length: int, sizes: Sizes, device: torch.device) -> Row:
    """FlexAttention without compilation, with the same mask; if it does not run or is wrong, the reason."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        q, k, v = (x.detach().transpose(1, 2) for x in list(draw(length, 4, sizes.head_dim, device)[0].values()))

        def make(turn: int) -> Any:
            return create_block_mask(causal, None, None, length, length, device=str(device), BLOCK_SIZE=sizes.block)

        def attend(turn: int, mask: Any = None) -> Tensor:
            return flex_attention(q, k, v, block_mask=mask)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # that it is not compiled
            mask = make(0)
            ours = tw.attention(q, k, v, mask=causal, layout="bhsd")
            if not torch.allclose(attend(0, mask), ours, atol=1e-4, rtol=1e-4):
                return {"state": "wrong", "reason": "its out differs from ours by more than 1e-4"}
            timed = compare({"create_block_mask": make, "attention": partial(attend, mask=mask)}, device,
                            seconds=sizes.seconds / 4, most=sizes.repeats)
    except Exception as error:  # whatever a version of torch raises
        return {"state": "refused", "reason": record.words(error)}
    return {"state": "timed", "reason": ""} | {name: timing.summary() for name, timing in timed.items()}


# ---- 2. which tiles a mask function shows ---------------------------------------------------------------------------------

def documents(length: int) -> Callable:
    """A causal mask function of documents whose lengths are random."""
    generator = torch.Generator().manual_seed(length)
    starts = torch.rand(length, generator=generator) < 1 / min(DOCUMENT, max(1, length // 8))
    ids = starts.cumsum(0, dtype=torch.int32)
    return lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k)


def ours_classified(length: int, block: int) -> Tensor:
    return tw.mask_mod(documents(length)).classify(1, 1, length, length, block, block)[0, 0]


def flex_classified(length: int, block: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(documents(length), None, None, length, length, device="cpu", BLOCK_SIZE=block)


def classes_of(found: Any) -> Tensor:
    """EMPTY, PARTIAL or FULL of each tile, from a tensor of them or from FlexAttention's lists."""
    if isinstance(found, Tensor):
        return found
    classes = torch.zeros(found.to_dense()[0, 0].shape, dtype=torch.uint8)
    for kind, counts, indices in ((PARTIAL, found.kv_num_blocks, found.kv_indices),
                                  (FULL, found.full_kv_num_blocks, found.full_kv_indices)):
        for row, (count, columns) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].long(), strict=True)):
            classes[row, columns[:count]] = kind
    return classes


def misjudged(classes: Tensor, function: Callable, length: int, block: int) -> tuple[int, int]:
    """Of a sample of tiles: how many are EMPTY or FULL and should not be; how many PARTIAL ones could be either."""
    wrong = loose = 0
    generator = torch.Generator().manual_seed(2)
    inside = torch.arange(block)
    for kind in (EMPTY, PARTIAL, FULL):
        where = (classes == kind).flatten().nonzero()[:, 0]
        chosen = where[torch.randint(len(where), (SAMPLE,), generator=generator)] if len(where) else where
        rows, cols = ((t * block)[:, None] + inside for t in (chosen // classes.shape[1], chosen % classes.shape[1]))
        q, k = rows.clamp(max=length - 1)[:, :, None], cols.clamp(max=length - 1)[:, None]
        seen = function(0, 0, q, k).flatten(1)
        every, some = seen.all(1), seen.any(1)
        wrong += int({EMPTY: some, PARTIAL: torch.zeros_like(some), FULL: ~every}[kind].sum())
        loose += int((every | ~some).sum()) if kind == PARTIAL else 0
    return wrong, loose


def classified_here(who: str, length: int, block: int) -> Row:
    """Seconds and peak memory of classifying, in this process, beyond what it held before; then whether it is right."""
    classify = {"tilewise": ours_classified, "create_block_mask": flex_classified}[who]
    classify(16 * block, block)         # what libraries load on first use
    counted = sys.platform == "linux"
    if counted:
        restart_peak()
        before = status_bytes("VmRSS")
    begin = time.perf_counter()
    found = classify(length, block)
    seconds = [time.perf_counter() - begin]
    beyond = max(0, status_bytes("VmHWM") - before) if counted else None
    classes = classes_of(found)
    row: Row = {"who": who, "length": length, "tiles": classes.numel(), "kept": int((classes != EMPTY).sum()),
                "partial": int((classes == PARTIAL).sum()), "bytes": beyond}
    row["wrong"], row["loose"] = misjudged(classes, documents(length), length, block)
    for _ in range(2 if seconds[0] < FLEX_SECONDS / 4 else 0):
        begin = time.perf_counter()
        classify(length, block)
        seconds.append(time.perf_counter() - begin)
    return row | Timing(seconds, seconds).summary()


def classified(who: str, length: int, sizes: Sizes, patience: float = 120.0) -> Row:
    """`classified_here` in two processes of its own: for its memory, with settings that make allocation slow, and its time."""
    code = f"from tilewise.bench import masks; masks.print_classified({who!r}, {length}, {sizes.block})"
    found: list[Row] = []
    for settings in (GIVE_BACK, {}):
        try:
            done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=os.environ | settings, timeout=patience,
                                  capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return {"who": who, "length": length, "state": "refused", "reason": f"ended after {patience:.0f} s"}
        if done.returncode:
            words = (done.stderr.splitlines() or ["it was killed"])[-1]
            return {"who": who, "length": length, "state": "refused", "reason": words[:200]}
        found.append(json.loads(done.stdout.splitlines()[-1]))
    memory, row = found
    wrong = memory["wrong"] + row["wrong"]
    return row | {"bytes": memory["bytes"], "state": "wrong" if wrong else "timed", "reason": f"{wrong} tiles" if wrong else ""}


def print_classified(who: str, length: int, block: int) -> None:
    print(json.dumps(classified_here(who, length, block)))


def classification(sizes: Sizes) -> list[Row]:
    """Ours at each length; create_block_mask at lengths that double until one is beyond its limits, which is kept too."""
    rows = [classified("tilewise", length, sizes) for length in sizes.classified]
    length, within = sizes.flex_from, True
    while within and length <= max(sizes.classified):
        row = classified("create_block_mask", length, sizes)
        within = row["state"] == "timed" and row["seconds"] <= FLEX_SECONDS and (row["bytes"] or 0) <= FLEX_BYTES
        rows.append(row | {"within": within})
        length *= 2
    return rows


# ---- 3. sparse blocks -----------------------------------------------------------------------------------------------------

def layouts(n: int) -> dict[str, Tensor]:
    return {"butterfly": patterns.butterfly(n), "local+global": patterns.local(n, 1) | patterns.global_blocks(n, 1),
            "bigbird": patterns.bigbird(n)}


def block_sparse(sizes: Sizes, device: torch.device) -> Row:
    """Patterns of blocks against full attention: time / (density x full attention's time), in turns."""
    tensors, dout = draw(sizes.sparse, sizes.sparse_heads, sizes.head_dim, device)
    works = {"full": Work(tensors, dout)} | {name: sparse_work(tensors, dout, layout.to(device), sizes.block)
                                             for name, layout in layouts(sizes.sparse // sizes.block).items()}
    rows = admitted(works)
    calls = {(name, mode): getattr(work, mode) for name, work in works.items() if rows[name]["state"] == "timed"
             for mode in ("forward", "both")}
    for (name, mode), timing in (timed := compare(calls, device, seconds=sizes.seconds)).items():
        rows[name][mode] = timing.summary()
        blocks = works[name].blocks
        if isinstance(blocks, tw.BlockMask) and ("full", mode) in timed:
            share = 1 / times_faster(timing, timed["full", mode])
            rows[name] |= {"density": blocks.density}
            rows[name][mode] |= {"of_full": share, "of_ideal": share / blocks.density}
    return {"length": sizes.sparse, "heads": sizes.sparse_heads, "head_dim": sizes.head_dim, "block": sizes.block,
            "patterns": rows}


def sparse_work(tensors: dict[str, Tensor], dout: Tensor, layout: Tensor, block: int) -> Work:
    return Work(tensors, dout, mask=lambda b, h, q, k: layout[q // block, k // block],
                blocks=tw.block_mask(layout, block_size=block))


# ---- 4. gradients of captured tables ----------------------------------------------------------------------------------------

class Table(NamedTuple):
    """A score function that reads a table."""
    shape: tuple[int, ...]
    score: Callable[[Any], Callable]


def tables(length: int, heads: int) -> dict[str, Table]:
    return {
        "relative position": Table((heads, 2 * length - 1),
                                   lambda t: lambda s, b, h, q, k: s + t[h, q - k + (length - 1)]),
        "pair bias": Table((heads, length, length), lambda t: lambda s, b, h, q, k: s + t[h, q, k]),
        "scalar per head": Table((heads,), lambda t: lambda s, b, h, q, k: s + t[h] * s),
    }


def captured(sizes: Sizes, device: torch.device) -> Row:
    """Forward and backward with and without the gradient of a captured table, in turns."""
    inputs, dout = draw(sizes.captured, 4, sizes.head_dim, device)
    row: Row = {"length": sizes.captured, "heads": 4, "head_dim": sizes.head_dim, "promised": PROMISED, "tables": {}}
    for name, (shape, score) in tables(sizes.captured, 4).items():
        table = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device)
        works = {"without": Work(inputs | {"table": table}, dout, score=score),
                 "with": Work(inputs | {"table": table.clone().requires_grad_()}, dout, score=score)}
        row["tables"][name] = entry = admitted(works)["with"] | {"shape": list(shape)}
        if entry["state"] == "timed":
            timed = compare({mode: work.both for mode, work in works.items()}, device, seconds=sizes.seconds / 3,
                            least=sizes.repeats // 3 + 1, most=3 * sizes.repeats)
            entry |= {mode: timing.summary() for mode, timing in timed.items()}
            entry["ratio"] = times_faster(timed["without"], timed["with"])
    return row


# ---- the whole ------------------------------------------------------------------------------------------------------------

def benchmark(sizes: Sizes, device: torch.device, out: Path | None = None,
              progress: Callable[[str], None] = lambda words: None) -> Row:
    """All four, written to `out` as each is done; one's failure does not cost the others."""
    result: Row = record.stamp() | {"lines": []}
    parts: dict[str, Callable[[], Any]] = {
        "functions": partial(functions, sizes, device), "classification": partial(classification, sizes),
        "block_sparse": partial(block_sparse, sizes, device), "captured": partial(captured, sizes, device)}
    for name, measure in parts.items():
        progress(name)
        try:
            result[name] = measure()
            with labelled(name):
                result["lines"] += LINES[name](result[name])
        except Exception as error:  # such as memory
            result[name] = {"error": record.words(error)}
            result["lines"].append(f"{name}: {record.words(error)}")
        record.write(out, result)
    return result


@contextmanager
def labelled(name: str) -> Iterator[None]:
    """Errors say that they are the table's, not the measurement's."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"no lines of {name}: {record.words(error)}") from error


def function_lines(row: Row) -> list[str]:
    found = [f"functions, N {row['length']} H {row['heads']}, ms   a call   first with a new function   first at a new length"]
    for what in ("mask", "score"):
        entry = row[what]
        found.append(f"  {what:24}" + (f"{_ms(entry['new_function']['again'])} {_ms(entry['new_function']['beyond'], '+'):>27} "
                                       f"{_ms(entry['new_length']['beyond'], '+'):>23}" if entry["state"] == "timed"
                                       else _why(entry)))
    entry = row["flex"]
    if entry["state"] != "timed":
        return [*found, f"  flex, not compiled      {_why(entry)}"]
    attention, making = _ms(entry["attention"]), _ms(entry["create_block_mask"])
    return [*found, f"  flex, not compiled      {attention}   create_block_mask {making}"]


def classification_lines(rows: list[Row]) -> list[str]:
    found = ["tiles of a causal document function        s        MiB    tiles kept   loosely PARTIAL"]
    for row in rows:
        found.append(f"  {row['who']:18} {row['length']:>9,} " + (
            f"{row['seconds']:>13.3f} {(row['bytes'] or 0) / 2**20:>10.1f} {row['kept']:>13,} {row['loose']:>11}/{SAMPLE}"
            f"{'' if row.get('within', True) else '   beyond 2 GiB or 20 s'}" if row["state"] == "timed" else _why(row)))
    return found


def sparse_lines(row: Row) -> list[str]:
    found = [f"sparse blocks, N {row['length']} H {row['heads']}   density   fwd s   / ideal   fwd+bwd s   / ideal"]
    for name, entry in row["patterns"].items():
        if entry["state"] != "timed":
            found.append(f"  {name:26} {_why(entry)}")
            continue
        forward, both = entry["forward"], entry["both"]
        found.append(f"  {name:26} {entry.get('density', 1):>8.3f} {forward['seconds']:>7.3f} "
                     f"{forward.get('of_ideal', 1):>9.2f} {both['seconds']:>11.3f} {both.get('of_ideal', 1):>9.2f}")
    return found


def captured_lines(row: Row) -> list[str]:
    found = [f"gradient of a captured table, N {row['length']}, ms    without      with   ratio (at most {row['promised']})"]
    for name, entry in row["tables"].items():
        found.append(f"  {name:40} " + (f"{_ms(entry['without'])} {_ms(entry['with'])} {entry['ratio']:>7.2f}"
                                        if entry["state"] == "timed" else _why(entry)))
    return found


LINES: dict[str, Callable[[Any], list[str]]] = dict(functions=function_lines, classification=classification_lines,
                                                    block_sparse=sparse_lines, captured=captured_lines)


def _ms(summary: Row, sign: str = "-") -> str:
    return f"{summary['seconds'] * 1000:{sign}9.2f}"


def _why(entry: Row) -> str:
    return f"{entry['state']}: {entry['reason']}"[:120]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tilewise.bench.masks", description="Masks and score functions.")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    result = benchmark(QUICK if options.quick else Sizes(), torch.device(options.device), options.out,
                       progress=lambda words: print(words, file=sys.stderr, flush=True))
    print("\n".join(result["lines"]))


if __name__ == "__main__":
    main()
