"""The command line. Every command imports what it needs when it runs, so that `tilewise --help` answers at once."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tilewise.bench.cli import app as bench
from tilewise.bench.cli import chosen_device
from tilewise.report.cli import everything, report
from tilewise.terminal import console, plain_errors, stage_bars
from tilewise.traffic.cli import app as traffic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tilewise.demo.results import Results
    from tilewise.masks import Mask

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown",
    help="Exact attention, computed tile by tile.\n\nStart with `tilewise demo`.",
)
bench.command("all")(everything)
app.add_typer(bench, name="bench")
app.add_typer(traffic, name="traffic")
CELLS = (("·", "grey50"), ("■", "orange1"), ("■", "dodger_blue1"))     # hidden, visible in a partial tile, in a full one
MOST_DRAWN = 64             # queries and keys, as text that is not on a terminal
MOST_TILES = 2**13          # on a side, when only counting
LONGEST_COUNTED = 2**24
UNBOUNDED = 2**12           # characters in a line


class Precision(str, Enum):
    """Names of the dtypes that attention takes."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


def print_version(wanted: bool) -> None:
    """The version, for --version."""
    if wanted:
        from importlib.metadata import version

        console.print(f"tilewise {version('tilewise')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True,
                                          help="Print the version and stop.")] = False,
) -> None:
    pass


@app.command()
def demo(
    text: Annotated[str | None, typer.Option(help="A file or folder to learn from; the standard library if not given.",
                                             show_default=False)] = None,
    out: Annotated[str, typer.Option(help="Folder for the report.")] = "demo-report",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.", show_default="by device")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the weights, batches and sample.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, not minutes; too small to show speed.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Train a small GPT with standard attention and with Tilewise, measure both, and write a report.

    About three minutes on two CPU cores.

    Examples: `tilewise demo`, `tilewise demo --text ~/notes --steps 300`, `tilewise demo --quick`
    """
    # Threads that wait by spinning lose whole time slices to whatever else runs here: 20 times slower was measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # read when torch is loaded, here and in the demo's workers
    from tilewise.demo import page, run

    with plain_errors(OSError, ValueError, ImportError):
        job = run.prepare(text=text, out=out, device=device, steps=steps, seed=seed, quick=quick)
    with stage_bars() as progress:
        results = run.execute(job, progress)
    print_results(results, page.write(results, job.out))


def print_results(results: Results, page: Path) -> None:
    """The demo's last words: numbers, where the report is, what to try next."""
    from tilewise.demo.page import headline_words

    console.print()
    for number, words in headline_words(results):
        console.print(f"  [bold]{number:>18}[/bold]  {words}", soft_wrap=True)
    console.print(f"\nReport: [bold]{page.resolve()}[/bold]\n", soft_wrap=True)
    for command, words in (("tilewise demo --text FILES", "learn your own text"),
                           ("tilewise explain --causal", "how attention runs here, and what it moves"),
                           ("tilewise doctor", "what this machine has and lacks")):
        console.print(f"  [bold]{command:26}[/bold]  {words}", soft_wrap=True)


@app.command()
def explain(
    seqlen_q: Annotated[int, typer.Option(min=0, help="Queries.")] = 4096,
    seqlen_k: Annotated[int | None, typer.Option(min=0, help="Keys.", show_default="as many as queries")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 16,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads.", show_default="as heads")] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of one head.")] = 64,
    dtype: Annotated[Precision, typer.Option(help="Precision of q, k and v.")] = Precision.float32,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    causal: Annotated[bool, typer.Option("--causal", help="Causal, the last query on the last key.")] = False,
    window: Annotated[str | None, typer.Option(help='Neighbours "left,right"; - for unbounded.')] = None,
    mask: Annotated[str | None, typer.Option(help="A mask as in `tilewise mask`.")] = None,
    backend: Annotated[str, typer.Option(help="auto, or the one to use.")] = "auto",
    backward: Annotated[bool, typer.Option("--backward", help="With gradients.")] = False,
) -> None:
    """Say how one attention problem would run here: which backend, why not the others, FLOPs and bytes.

    Example: `tilewise explain --seqlen-q 32768 --heads 32 --kv-heads 8 --head-dim 128 --dtype bfloat16 --causal`
    """
    import torch

    from tilewise.api import explain as explain_attention
    from tilewise.trace.capture import CaptureError

    def shaped(length: int, count: int) -> torch.Tensor:
        """[batch, length, count, head_dim] that takes the memory of one head."""
        one = torch.empty(head_dim, dtype=getattr(torch, dtype.value), device=where, requires_grad=backward)
        return one.expand(batch, length, count, head_dim)

    with plain_errors(ValueError, TypeError, RuntimeError, IndexError, OverflowError, CaptureError):
        where = chosen_device(device)
        q = shaped(seqlen_q, heads)
        k = v = shaped(seqlen_q if seqlen_k is None else seqlen_k, kv_heads or heads)
        wanted = mask_of(window, mask)
        console.print(str(explain_attention(q, k, v, causal=causal, mask=wanted, backend=backend)), markup=False,
                      soft_wrap=True)


def mask_of(window: str | None, text: str | None) -> Mask | None:
    """The mask of --window and --mask together."""
    from tilewise.mask_text import read_mask
    from tilewise.masks import window as neighbours

    named = read_mask(text) if text else None
    if not window:
        return named
    near = neighbours(*window_bounds(window))
    return near if named is None else named & near


def window_bounds(text: str) -> tuple[int | None, int | None]:
    """"128,0" -> (128, 0); "128,-" -> (128, None)."""
    bounds = [part.strip() for part in text.split(",")]
    if len(bounds) != 2 or not all(bound == "-" or bound.isdecimal() for bound in bounds):
        raise ValueError(f'window: expected "left,right", each a number or -, got {text!r}')
    left, right = (None if bound == "-" else int(bound) for bound in bounds)
    return left, right


@app.command()
def mask(
    text: Annotated[str, typer.Argument(metavar="MASK", help="A mask as text, FILE.py:NAME or MODULE:NAME.",
                                        show_default=False)],
    rows: Annotated[int | None, typer.Option(min=1, max=4096, help="Queries.", show_default="16")] = None,
    cols: Annotated[int | None, typer.Option(min=1, max=4096, help="Keys.", show_default="as rows")] = None,
    tile: Annotated[int | None, typer.Option(min=1, help="Side of the tiles that are counted.",
                                             show_default="4; 128 with --at")] = None,
    batch: Annotated[int, typer.Option(min=0, help="Which sequence, from 0.")] = 0,
    head: Annotated[int, typer.Option(min=0, help="Which query head, from 0.")] = 0,
    at: Annotated[int | None, typer.Option(min=1, max=LONGEST_COUNTED, show_default=False,
                                           help="Count only, for so many queries and keys.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw into this file.", show_default=False)] = None,
) -> None:
    """Draw a mask: a row for each query, a column for each key, and how much work is left of full attention.

    Tiles that show nothing are skipped, tiles that show everything run without the mask.

    MASK is made of `full()`, `causal()`, `window(left, right)`, `chunked(size)`, `prefix(n)`, `key_lengths(n)`,
    `documents([0, 0, 1, ...])`, `tree([-1, 0, 0, 1, ...])` and `blocks(layout, size)`, joined with & | ~.

    The layout of blocks is made of `butterfly(n)`, `local(n, blocks)`, `strided(n, stride)`, `global_blocks(n, blocks)`,
    `random_blocks(n, per_row)`, `bigbird(n)` and `axial(rows, cols)`, joined with & |. Its size is a number or
    [queries, keys].

    FILE.py:NAME is a function mask_mod(b, h, q_idx, kv_idx) or a tw.Mask in a Python file, which is run.

    Examples:

    * `tilewise mask "causal() & window(3, 0)"`
    * `tilewise mask "causal() | prefix(4)" --rows 8 --cols 12`
    * `tilewise mask "causal() & blocks(butterfly(8) | local(8, 1), 4)" --rows 32`
    * `tilewise mask "blocks(bigbird(16), [16, 64])" --rows 256 --cols 1024 --tile 16 --png bigbird.png`
    * `tilewise mask my_masks.py:dilated --head 3`
    * `tilewise mask "causal() & window(4095, 0)" --at 131072`
    """
    from tilewise.draw import of_one_head
    from tilewise.mask_text import read_mask
    from tilewise.trace.capture import CaptureError

    with plain_errors(ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, OSError, ImportError, CaptureError):
        wanted = of_one_head(read_mask(text), batch, head)
        if at is None:
            draw_mask(wanted, rows or 16, cols or rows or 16, tile or 4, png)
        elif rows or cols or png:
            raise ValueError("--at: counts tiles and draws nothing: leave out --rows, --cols and --png")
        else:
            count_tiles(wanted, at, tile or 128)


def draw_mask(mask: Mask, rows: int, cols: int, tile: int, png: Path | None) -> None:
    """The mask as text where there is room, as a picture if wanted, and its tiles."""
    from tilewise.draw import check_lengths, shades

    check_lengths(mask, rows, cols)
    shown, classes = shades(mask, rows, cols, tile)
    room = (console.width + 1) // 2 if console.is_terminal else MOST_DRAWN
    if cols <= room and rows <= max(room, MOST_DRAWN):
        draw_cells(shown.tolist())
    elif png is None:
        console.print(f"{rows} queries x {cols} keys are too many to draw as text here: --png FILE makes a picture.",
                      soft_wrap=True)
    if png:
        mask.save_png(png, rows, cols, tile=tile)
        console.print(f"Drawn: {png}", soft_wrap=True, markup=False)
    empty, partial, full = class_counts(classes)
    console.print(f"\n{tile} x {tile} tiles: {empty:,} skipped, {partial:,} masked, {full:,} computed whole: "
                  f"{share(partial + full, classes.numel())} of the work of full attention", soft_wrap=True)


def draw_cells(shown: list[list[int]]) -> None:
    """A row of text per query, and what its colours mean."""
    from rich.text import Text

    cells = [Text(glyph, style) for glyph, style in CELLS]
    for row in shown:
        console.print(Text(" ").join(cells[kind] for kind in row), soft_wrap=True)
    colours = console.is_terminal and not console.no_color
    words = ("hidden", "visible in a masked tile", "visible in a tile computed whole") if colours else ("hidden", "visible")
    legend = [Text.assemble(cell, f" {meaning}") for cell, meaning in zip(cells, words, strict=False)]
    console.print(Text.assemble("\n", Text("   ").join(reversed(legend))), soft_wrap=True)


def count_tiles(mask: Mask, length: int, tile: int) -> None:
    """Shares of the classes of tiles, found without looking at single scores."""
    from time import perf_counter

    from tilewise.draw import check_lengths

    side = -(-length // tile)
    if side > MOST_TILES:
        raise ValueError(f"--tile: expected at most {MOST_TILES} tiles on a side, --tile {-(-length // MOST_TILES)} or more, "
                         f"got {side} of {tile}")
    check_lengths(mask, length, length)
    start = perf_counter()
    classes = mask.classify(1, 1, length, length, tile, tile)
    counts = class_counts(classes)
    seconds = perf_counter() - start
    console.print(f"{length:,} queries x {length:,} keys: {side**2:,} tiles of {tile} x {tile}\n", soft_wrap=True)
    for name, count in zip(("skipped", "masked", "computed whole"), counts, strict=True):
        console.print(f"{name:>14}  {share(count, side**2):>6}  {count:>13,}")
    console.print(f"\n{share(side**2 - counts[0], side**2)} of the work of full attention, found in {seconds:.2g} s without "
                  "looking at single scores", soft_wrap=True)


def class_counts(classes: Tensor) -> list[int]:
    """How many tiles are skipped, masked and computed whole."""
    return [int((classes == kind).sum()) for kind in range(3)]


def share(part: int, whole: int) -> str:
    """A percentage in which next to nothing is not nothing, nor nearly everything everything."""
    percent = 100 * part / whole
    if 0 < part < whole:
        return "<0.1%" if percent < 0.1 else ">99.9%" if percent > 99.9 else f"{percent:.1f}%"
    return f"{percent:.0f}%"


@app.command()
def inspect(
    arch: Annotated[str | None, typer.Option(help="One GPU architecture, such as sm_90.")] = None,
    only: Annotated[str, typer.Option("--filter", help="Kernels whose name contains this.")] = "",
    update: Annotated[bool, typer.Option("--update", help="Compile what is new or changed first; takes long.")] = False,
    store: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("results/gates.json"),
    jobs: Annotated[int, typer.Option(min=1, help="Compilers at the same time.")] = 2,
    model: Annotated[bool, typer.Option("--model", help="Instead, busy cycles of each hardware unit in the Hopper kernels and "
                                                        "the ceiling on speed: a model, not a measurement.")] = False,
) -> None:
    """Compile GPU kernels without a GPU and judge them: registers, spills, shared memory, tensor cores."""
    from tilewise.inspect import matrix, shipped

    if model:
        with plain_errors(ValueError, RuntimeError):
            model_hopper(arch, only)
        return
    if update:
        matrix.run(shipped, store, jobs=jobs, only=only, arch=arch)
    if not store.exists():
        console.print(f"No results in {store} yet: `tilewise inspect --update` makes them.", soft_wrap=True)
        return
    rows = matrix.load(store)
    kept = {name: row for name, row in rows.items() if only in name and arch in (None, row["arch"])}
    with plain_errors(ValueError):
        if not kept:
            known = ", ".join(sorted({row["arch"] for row in rows.values()}))
            raise ValueError(f"--arch, --filter: expected one of {known} and a part of a kernel's name: {store} has none of "
                             f"{arch or 'them'} with {only!r}")
    Console(highlight=False, width=UNBOUNDED).print(matrix.table(kept))     # a row stays one line, whatever it is printed to


def model_hopper(arch: str | None, only: str) -> None:
    """The cost model of the Hopper kernels whose name contains `only`, compiled now; not of decoding, which memory bounds."""
    from tilewise.backends.hopper.aot import ARCH, shipped
    from tilewise.inspect import build
    from tilewise.inspect import model as of_units

    if arch not in (None, ARCH):
        raise ValueError(f"--model: expected --arch {ARCH}, got {arch}")
    modelled = []
    with console.status("") as status:
        for case in shipped():
            if only in case.name and case.direction in of_units.STREAMED:
                status.update(f"compiling {case.name}")
                modelled += [(case, trip) for trip in of_units.trips(build(case), case)]
    console.print(of_units.table(modelled))


@app.command()
def doctor() -> None:
    """What this machine has, which backends work on it, and what is missing."""
    from tilewise import doctor as check
    from tilewise.backends import MODULES

    for name, fact in check.machine().items():
        console.print(f"[bold]{name:>14}[/bold]  {escape(fact)}", soft_wrap=True)
    table = Table("backend", "device", "against fp64", "", box=None, header_style="bold", padding=(0, 2))
    for device in check.devices():
        for backend in MODULES:
            answer = check.check_backend(backend, device)
            words = f"[dim]{escape(answer.reason)}[/dim]" if answer.error is None else "[green]ok[/green]"
            table.add_row(backend, device, "-" if answer.error is None else f"{answer.error:.1e}", words)
        console.print(f"\nAttention on {device} is served by [bold]{check.serving(device)}[/bold].")
    console.print()
    console.print(table)
    for line in check.advice():
        console.print(f"\n[yellow]{escape(line)}[/yellow]")


app.command()(report)

if __name__ == "__main__":
    app()
