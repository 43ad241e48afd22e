"""The command line. Every command imports what it needs when it runs, so that `tilewise --help` answers at once."""

from __future__ import annotations

import os
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    from tilewise.demo.results import Results
    from tilewise.masks import Mask

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown",
    help="Exact attention, computed tile by tile.\n\nStart with `tilewise demo`.",
)
console = Console(highlight=False)


class Precision(str, Enum):
    """Names of the dtypes that attention takes."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


@contextmanager
def plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are the user's to mend: one line, exit status 2, no traceback."""
    try:
        yield
    except kinds as error:
        Console(stderr=True, highlight=False).print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


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


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """Gives a function (stage, done, total, words) that keeps one progress bar per stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:15}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[words]}"))
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, words="")
            bars.update(tasks[stage], completed=done, total=total, words=words)

        yield show


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

    def shaped(length: int, count: int) -> torch.Tensor:
        """[batch, length, count, head_dim] that takes the memory of one head."""
        one = torch.empty(head_dim, dtype=getattr(torch, dtype.value), device=device, requires_grad=backward)
        return one.expand(batch, length, count, head_dim)

    with plain_errors(ValueError, TypeError, RuntimeError, NotImplementedError):
        q = shaped(seqlen_q, heads)
        k = v = shaped(seqlen_q if seqlen_k is None else seqlen_k, kv_heads or heads)
        wanted = mask_of(window, mask)
        console.print(str(explain_attention(q, k, v, causal=causal, mask=wanted, backend=backend)), markup=False,
                      soft_wrap=True)


def mask_of(window: str | None, text: str | None) -> Mask | None:
    """The mask of --window and --mask together."""
    from tilewise.mask_text import parse_mask

    parts = [text] if text else []
    if window:
        parts.append("window({}, {})".format(*window_bounds(window)))
    return parse_mask(" & ".join(f"({part})" for part in parts)) if parts else None


def window_bounds(text: str) -> tuple[int | None, int | None]:
    """"128,0" -> (128, 0); "128,-" -> (128, None)."""
    bounds = [part.strip() for part in text.split(",")]
    if len(bounds) != 2 or not all(bound == "-" or bound.isdecimal() for bound in bounds):
        raise ValueError(f'window: expected "left,right", each a number or -, got {text!r}')
    left, right = (None if bound == "-" else int(bound) for bound in bounds)
    return left, right


@app.command()
def mask(
    text: Annotated[str, typer.Argument(metavar="MASK", help="Masks joined with & | ~.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, max=4096, help="Queries.")] = 16,
    cols: Annotated[int | None, typer.Option(min=1, max=4096, help="Keys.", show_default="as rows")] = None,
    tile: Annotated[int, typer.Option(min=1, help="Side of the tiles that are counted.")] = 4,
    png: Annotated[Path | None, typer.Option(help="Also draw into this file.", show_default=False)] = None,
) -> None:
    """Draw a mask: a row for each query, a column for each key, and how many tiles need no work.

    MASK is made of full(), causal(), window(left, right), chunked(size), prefix(n), key_lengths(n) and
    documents([0, 0, 1, ...]).

    Examples: `tilewise mask "causal() & window(3, 0)"`, `tilewise mask "causal() | prefix(4)" --rows 8 --cols 12`
    """
    from tilewise.mask_text import parse_mask

    cols = rows if cols is None else cols
    with plain_errors(ValueError, IndexError, OSError, ImportError):
        wanted = parse_mask(text)
        console.print(wanted.draw(rows, cols), soft_wrap=True, markup=False)
        classes = wanted.classify(1, 1, rows, cols, tile, tile).flatten().bincount(minlength=3).tolist()
        if png:
            wanted.save_png(png, rows, cols, tile=tile)
            console.print(f"Drawn: {png}", soft_wrap=True)
    console.print(f"\n{tile} x {tile} tiles: {classes[0]} skipped, {classes[1]} masked, {classes[2]} computed whole")


@app.command()
def inspect(
    arch: Annotated[str | None, typer.Option(help="One GPU architecture, such as sm_90.")] = None,
    only: Annotated[str, typer.Option("--filter", help="Kernels whose name contains this.")] = "",
    update: Annotated[bool, typer.Option("--update", help="Compile what is new or changed first; takes long.")] = False,
    store: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("results/gates.json"),
    jobs: Annotated[int, typer.Option(min=1, help="Compilers at the same time.")] = 2,
) -> None:
    """Compile GPU kernels without a GPU and judge them: registers, spills, shared memory, tensor cores."""
    from tilewise.backends.triton.aot import shipped
    from tilewise.inspect import matrix

    if update:
        matrix.run(shipped, store, jobs=jobs)
    if not store.exists():
        console.print(f"No results in {store} yet: `tilewise inspect --update` makes them.", soft_wrap=True)
        return
    kept = {name: row for name, row in matrix.load(store).items()
            if only in name and arch in (None, row["arch"])}
    console.print(matrix.table(kept))


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


@app.command()
def bench(
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON.", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two small shapes, in seconds.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Time attention, forward and backward, beside every other implementation that this machine has.

    Each is first held to the tolerance rule; one that is wrong is not timed. About four minutes on two CPU cores.

    Examples: `tilewise bench --quick`, `tilewise bench --out bench.json`
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # as for demo
    import torch

    from tilewise.bench import run

    with plain_errors(OSError, RuntimeError, ValueError):
        where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.zeros(1, device=where)
        with console.status("") as status:
            result = run.benchmark(run.shapes(where, quick), where, seconds=run.PATIENCE, out=out, progress=status.update)
    for line in result["lines"]:
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
