"""`tilewise bench`: a command for each benchmark, and all of them in turn. Without typer: python -m tilewise.bench."""
from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewise.terminal import console, plain_errors, stage_bars

if TYPE_CHECKING:
    from tilewise.bench.record import Result

# Options that all benchmarks share
Out = Annotated[Path | None, typer.Option(help="Write the result as JSON, after each case.", show_default=False)]
Quick = Annotated[bool, typer.Option("--quick", help="Small shapes: seconds; they say little about speed.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")]
Seconds = Annotated[float, typer.Option(min=0, help="Begin no further case after so long.", show_default="no limit")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the file of --out: keep rows of this machine and commit.")]
Against = Annotated[Path | None, typer.Option(help="An earlier result to compare with, case by case.", show_default=False)]
Numbers = Annotated[str, typer.Option(show_default="by device")]

app = typer.Typer(
    no_args_is_help=False, rich_markup_mode="markdown",
    help="""Time attention beside every other implementation that this machine has.

Each is first held to the tolerance rule on the inputs that are timed; one that is wrong is not timed. All take turns;
numbers are medians of rounds with quartiles, ratios are taken within a round. What is absent or refused says why.

Alone it runs `tilewise bench attention --quick`. Docs: docs/benchmarking.md.""")


@app.callback(invoke_without_command=True)
def quick_look(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        show(measure("attention", quick=True))
        console.print("\nThat was `tilewise bench attention --quick`. There is more: `tilewise bench --help`; all of it in "
                      "minutes: `tilewise bench all --quick`.", soft_wrap=True)


@app.command()
def attention(
    out: Out = None, quick: Quick = False, device: Device = "auto", seconds: Seconds = math.inf, resume: Resume = False,
    against: Against = None,
    head_dims: Annotated[str, typer.Option(help="Such as 64,128.", show_default="by device")] = "",
    lengths: Annotated[str, typer.Option(help="Such as 1024,4096.", show_default="by device")] = "",
    also: Annotated[list[str] | None, typer.Option(help="A backend of ours beside the one that serves, such as hopper.",
                                                   show_default=False)] = None,
) -> None:
    """Self-attention, forward and backward: on a GPU the protocol of the FlashAttention-2 paper (16k tokens).

    About four minutes on two CPU cores, FlexAttention's compilation included.

    Examples: `tilewise bench attention --quick`, `tilewise bench attention --head-dims 128 --lengths 4096,16384`
    """
    run("attention", against, out=out, quick=quick, device=device, seconds=seconds, resume=resume,
        head_dims=numbers("--head-dims", head_dims), lengths=numbers("--lengths", lengths), also=tuple(also or ()))


HELP = {
    "decode": """One query for each sequence over a long cache, alone and with the append: contiguous and paged, beside SDPA.

    About two minutes on two CPU cores. Bandwidth stands beside a copy's and a sum's.""",
    "sparse": """Blocks (butterfly, local and global, BigBird) and a sliding window, beside full attention times their density.

    About five minutes on two CPU cores.""",
    "masks": """First calls with new mask and score functions, finding their tiles, gradients of the tables that they read.

    About seven minutes on two CPU cores, most of it compilation.""",
    "memory": """Memory beside inputs, outputs and gradients as the sequence grows.

    About two minutes on two CPU cores: every number is that of a new process.""",
    "cpu": """Hold the CPU backend to what it promises: beside SDPA, a matrix product, a copy of memory; compilation.

    About twelve minutes on two CPU cores.""",
    "serving": """Packed sequences of unequal length, prompts in chunks, drafted tokens.

    About two minutes on two CPU cores.""",
    "paper": """The papers' own tables, theirs beside ours: FlashAttention 1 to 3 and Flash-Decoding; on a CPU cut to its size.

    About five minutes on two CPU cores. Figure 3: `python -m tilewise.bench.paper --plot figure3.svg`""",
    "numerics": """Errors against fp64 of all backends and peers, on inputs that are hard in different ways; nothing is timed.

    About two minutes on two CPU cores."""}

HELP |= {
    "overhead": """What tiny calls cost beside their arithmetic, in microseconds, beside PyTorch's attention; on the CPU.

    Half a minute. Where the time goes: `python -m tilewise.bench.overhead`.""",
    "instructions": """Instructions of CPU kernels and of tiny calls, counted: exact where time is noise.

    Needs perf or valgrind. About ten minutes under valgrind."""}


def add(name: str, words: str) -> None:
    """A command with the options that all share."""
    def command(out: Out = None, quick: Quick = False, device: Device = "auto", seconds: Seconds = math.inf,
                resume: Resume = False, against: Against = None) -> None:
        run(name, against, out=out, quick=quick, device=device, seconds=seconds, resume=resume)

    app.command(name, help=f"{words}\n\nExamples: `tilewise bench {name} --quick`, "
                           f"`tilewise bench {name} --out {name}.json --resume`")(command)


for each, help_of_it in HELP.items():
    add(each, help_of_it)


@app.command("show")
def show_file(
    file: Annotated[Path, typer.Argument(help="A result of `tilewise bench ... --out`.", show_default=False)],
    against: Against = None,
) -> None:
    """Print the table of a result, or with --against what became of an earlier one.

    As Markdown or a page: `tilewise report`.

    Examples: `tilewise bench show cpu.json`, `tilewise bench show new.json --against old.json`
    """
    from tilewise.bench import record

    with plain_errors(OSError, ValueError):
        result = record.load(file)
        old = None if against is None else record.load(against)
    if old is not None:
        judge(old, result)
        return
    show(result)


def run(name: str, against: Path | None, **options: Any) -> None:
    """Measures and shows a benchmark, and judges it beside an earlier result."""
    from tilewise.bench import record

    with plain_errors(OSError, ValueError):
        old = None if against is None else record.load(against)
    result = measure(name, **options)
    show(result)
    if old is not None:
        judge(old, result)


def judge(old: Result, new: Result) -> None:
    """Says what became of an earlier result's cases; exit status 1 if one of ours or of others became worse."""
    from tilewise.bench import against

    with plain_errors(ValueError):
        lines, failed = against.lines(old, new), against.failures(against.compare(old, new))
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def measure(name: str, *, out: Path | None = None, quick: bool = False, device: str = "auto", seconds: float = math.inf,
            resume: bool = False, **chosen: Any) -> Result:
    """Runs a benchmark with progress bars. chosen: more fields of `Wanted`."""
    # Threads that wait by spinning lose whole time slices to whatever else runs here: 20 times slower was measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # read when torch is loaded, here and in processes of its own
    from tilewise.bench import suite

    with plain_errors(OSError, RuntimeError, ValueError):
        if resume and out is None:
            raise ValueError("--resume: expected --out, the file to continue")
        where = chosen_device("cpu" if name == "cpu" and device == "auto" else device)
        wanted = suite.Wanted(where, quick, **chosen)
        try:
            with stage_bars() as progress:
                result = suite.run(name, wanted, out=out, seconds=seconds, resume=resume, progress=progress)
        except KeyboardInterrupt:
            if out is not None:
                console.print(f"Not complete: the same command with --resume continues {out}.", soft_wrap=True)
            raise
    return result


def chosen_device(text: str) -> Any:
    """The torch.device; RuntimeError if it does not work here."""
    import torch

    try:
        found = torch.device(text if text != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:     # the latter of a torch that was built without CUDA
        raise RuntimeError(f"device: expected one that works here, got {text}: {str(error).splitlines()[0]}") from None
    return found


def numbers(option: str, text: str) -> tuple[int, ...]:
    """"64,128" -> (64, 128)."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    with plain_errors(ValueError):
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f'{option}: expected numbers such as "64,128", got {text!r}')
    return tuple(map(int, parts))


def show(result: Result) -> None:
    for line in result["lines"]:
        console.print(line, markup=False, soft_wrap=True)
