"""`tilewise traffic`: the commands of this room. Each imports what it needs when it runs."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewise.terminal import console, plain_errors

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown",
                  help="FLOPs, and bytes between slow and fast memory: by formula, counted, measured.\n\n"
                       "What is counted: docs/traffic.md.")

Png = Annotated[Path | None, typer.Option("--png", help="Also draw into this PNG file.", show_default=False)]
Svg = Annotated[Path | None, typer.Option("--svg", help="Also draw into this SVG file.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Also write the result as JSON.", show_default=False)]
OnDevice = Annotated[str, typer.Option("--device", help="A device of the table, or cpu: this machine's, measured.")]
Queries = Annotated[int, typer.Option("--seqlen-q", min=1, help="Queries.")]
Keys = Annotated[int, typer.Option("--seqlen-k", min=0, help="Keys; 0: as many as queries.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences.")]
Heads = Annotated[int, typer.Option(min=1, help="Query heads.")]
KvHeads = Annotated[int, typer.Option("--kv-heads", min=0, help="Key and value heads; 0: as heads.")]
HeadDim = Annotated[int, typer.Option("--head-dim", min=1, help="Channels of one head.")]
Dtype = Annotated[str, typer.Option(help="float16, bfloat16 or float32.")]
Causal = Annotated[bool, typer.Option("--causal", help="Causal, the last query on the last key.")]
MaskText = Annotated[str, typer.Option("--mask", help="A mask as in `tilewise mask`.", show_default=False)]
Splits = Annotated[int, typer.Option(min=1, help="Shares of the keys, merged afterwards (Flash-Decoding).")]
OfFile = Annotated[Path | None, typer.Option("--of", help="Instead, each case of this result of `tilewise bench attention`.",
                                             show_default=False)]
Backward = Annotated[bool, typer.Option("--backward", help="With the backward pass.")]


def show(make: Callable[[], dict[str, Any]], png: Path | None, svg: Path | None, out: Path | None) -> None:
    """Prints a result, draws it, writes it; an error that is the user's to mend is one line and exit status 2."""
    with plain_errors(ValueError, TypeError, RuntimeError, LookupError, NotImplementedError, OSError, ImportError):
        for path, suffix in ((png, ".png"), (svg, ".svg")):
            if path is not None and path.suffix.lower() != suffix:
                raise ValueError(f"--{suffix[1:]}: expected a file that ends in {suffix}, got {path}")
        with console.status(""):
            found = make()
            from tilewise.bench import record

            record.write(out, found)
            for path in (png, svg):
                if path is not None:
                    from tilewise.traffic import draw

                    draw.save(found, path)
    for line in found["lines"]:
        console.print(line, markup=False, soft_wrap=True)


@app.command()
def table(device: OnDevice = "A100-40", png: Png = None, svg: Svg = None, out: Out = None) -> None:
    """Attention in GPT-2 medium, forward and backward: bytes that each implementation moves, beside the published numbers.

    Standard attention is also counted operation by operation. The device gives M and tile sizes.
    """
    def make() -> dict[str, Any]:
        from tilewise import devices
        from tilewise.traffic import paper

        return paper.table(devices.device(device))

    show(make, png, svg, out)


@app.command()
def figure2(device: OnDevice = "A100-40", png: Png = None, svg: Svg = None, out: Out = None) -> None:
    """Figure 2 of FlashAttention: the table; traffic and time against the block size; block-sparse cost against density.

    Times are a roofline's.
    """
    def make() -> dict[str, Any]:
        from tilewise import devices
        from tilewise.traffic import paper

        return paper.figure2(devices.device(device))

    show(make, png, svg, out)


@app.command()
def memory(png: Png = None, svg: Svg = None, out: Out = None) -> None:
    """Memory against the sequence length, standard attention and Tilewise, beside the paper's Table 21.

    Nothing is allocated: standard attention's peak is counted on tensors without memory.
    """
    def make() -> dict[str, Any]:
        from tilewise.traffic import paper

        return paper.memory()

    show(make, png, svg, out)


@app.command()
def slopes(quick: Annotated[bool, typer.Option("--quick", help="A smaller grid.")] = False, png: Png = None, svg: Svg = None,
           out: Out = None) -> None:
    """IO complexity: exponents of N, d and M fitted from counts of our kernels, against the theorems' N² d² / M.

    The kernels run in Triton's interpreter: about a minute, with --quick twenty seconds.
    """
    def make() -> dict[str, Any]:
        from tilewise.traffic import commands

        return commands.exponents(quick)

    show(make, png, svg, out)


@app.command()
def count(seqlen_q: Queries = 128, seqlen_k: Keys = 0, batch: Batch = 1, heads: Heads = 1, kv_heads: KvHeads = 0,
          head_dim: HeadDim = 64, dtype: Dtype = "float16", causal: Causal = False, mask: MaskText = "", splits: Splits = 1,
          backward: Backward = False, tiles: Annotated[str, typer.Option(help='"queries,keys" of a tile.')] = "64,64",
          png: Png = None, svg: Svg = None, out: Out = None) -> None:
    """Run one problem through the real Triton kernels in Triton's interpreter and count what they move and compute.

    By kernel and tensor, exact, beside the closed forms. No GPU is needed; a thousand tiles take about two seconds.

    Examples: `tilewise traffic count --backward`, `tilewise traffic count --seqlen-q 4 --seqlen-k 512 --splits 4`
    """
    def make() -> dict[str, Any]:
        from tilewise.traffic import commands
        from tilewise.traffic.shapes import Shape, tiles_of

        shape = Shape(seqlen_q, seqlen_k, batch, heads, kv_heads, head_dim, dtype, causal, mask, splits)
        shape.described()               # its errors are the user's, before another process meets them
        return commands.count(shape, tiles_of(tiles), backward)

    show(make, png, svg, out)


@app.command()
def roofline(seqlen_q: Queries = 4096, seqlen_k: Keys = 0, batch: Batch = 1, heads: Heads = 16, kv_heads: KvHeads = 0,
             head_dim: HeadDim = 128, dtype: Dtype = "float16", causal: Causal = False, mask: MaskText = "", splits: Splits = 1,
             backward: Backward = False, device: OnDevice = "H200", of: OfFile = None, png: Png = None, svg: Svg = None,
             out: Out = None) -> None:
    """The least time of a problem on a device, and what bounds it: products, exponentials, other arithmetic, slow memory.

    With --device cpu also each cache as a fast memory of its own.

    Examples: `tilewise traffic roofline --seqlen-q 8192`, `tilewise traffic roofline --of attention.json --device cpu`
    """
    def make() -> dict[str, Any]:
        from tilewise import devices
        from tilewise.bench import record
        from tilewise.traffic import commands
        from tilewise.traffic.shapes import Shape

        if of is not None:
            return commands.estimates_of(record.load(of)["rows"], devices.device(device))
        shape = Shape(seqlen_q, seqlen_k, batch, heads, kv_heads, head_dim, dtype, causal, mask, splits)
        return commands.estimate(shape, devices.device(device), backward)

    show(make, png, svg, out)


@app.command("draw")
def draw_file(file: Annotated[Path, typer.Argument(help="What one of these commands wrote with --out.", show_default=False)],
              png: Png = None, svg: Svg = None) -> None:
    """Draw a result again, without computing it.

    Example: `tilewise traffic draw results/traffic_slopes.json --svg slopes.svg`
    """
    def make() -> dict[str, Any]:
        from tilewise.bench import record

        return dict(record.load(file))

    show(make, png, svg, None)


@app.command()
def measure(seqlen_q: Queries = 4096, seqlen_k: Keys = 0, batch: Batch = 1, heads: Heads = 16, kv_heads: KvHeads = 0,
            head_dim: HeadDim = 128, dtype: Dtype = "float16", causal: Causal = False, mask: MaskText = "",
            backward: Backward = False, out: Out = None) -> None:
    """DRAM traffic of one call on this machine's NVIDIA GPU, by Nsight Compute (`ncu`). Not yet run on a GPU."""
    def make() -> dict[str, Any]:
        from tilewise.traffic import commands
        from tilewise.traffic.shapes import Shape

        return commands.measured(Shape(seqlen_q, seqlen_k, batch, heads, kv_heads, head_dim, dtype, causal, mask), backward)

    show(make, None, None, out)
