"""`tilewise report`, and `tilewise bench all`, which ends with one."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from tilewise.bench.cli import Device, Quick, Resume, Seconds, chosen_device, measure, show
from tilewise.terminal import console, plain_errors


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="What `tilewise bench ... --out` wrote.",
                                                show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for index.html and report.md.")] = Path("report"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead; write nothing.")] = False,
    section: Annotated[list[str] | None, typer.Option(help="With --markdown: only this section; may be given again.",
                                                      show_default=False)] = None,
    part: Annotated[list[str] | None, typer.Option(help="With --section: only cases of this part; may be given again.",
                                                   show_default=False)] = None,
    pictures: Annotated[str | None, typer.Option(metavar="FOLDER", help="With --section: also write its pictures there as SVG, "
                                                 "and show them.", show_default=False)] = None,
) -> None:
    """Make one HTML page of any result files: how fast, how much memory, on what machine, and where Tilewise is slower.

    Ratios are taken within one file, never across machines. The page needs nothing else and works on phones and paper.

    Examples:

    * `tilewise report bench-report/*.json --out report`
    * `tilewise report attention.json --markdown --section headline --section speed`
    """
    with plain_errors(OSError, ValueError, ImportError):
        if section and not markdown:
            raise ValueError("--section: expected only with --markdown, the page has all sections")
        for name, given in (("pictures", pictures), ("part", part)):
            if given and not section:
                raise ValueError(f"--{name}: expected only with --section, the page has all of them")
        if markdown:
            typer.echo(as_markdown(files, section or [], part or [], pictures), nl=False)
        else:
            from tilewise.report.page import write

            console.print(f"Written: {write(files, out)}", soft_wrap=True, markup=False)


def everything(
    out: Annotated[Path, typer.Option(help="Folder for the results and the report.")] = Path("bench-report"),
    quick: Quick = False, device: Device = "auto", seconds: Seconds = math.inf, resume: Resume = False,
) -> None:
    """Every benchmark of this device in turn, a file each, and a report of all.

    About two minutes on two CPU cores with --quick, an hour without. --seconds holds for each.

    Examples: `tilewise bench all --quick`, `tilewise bench all --out results --resume`
    """
    from tilewise import devices
    from tilewise.bench import record
    from tilewise.bench.suite import BENCHMARKS
    from tilewise.traffic import commands, paper

    with plain_errors(RuntimeError):
        left_out = {"cpu": chosen_device(device).type != "cpu", "instructions": quick}
    files = []
    for name in BENCHMARKS:
        if not left_out.get(name):
            console.print(f"[bold]{name}[/bold]")
            files.append(out / f"{name}.json")
            show(measure(name, out=files[-1], quick=quick, device=device, seconds=seconds, resume=resume))
    made = {"traffic": paper.table(devices.device("A100-40"))}
    at_most, rows = devices.serving(chosen_device(device)), record.load(out / "attention.json")["rows"]
    if at_most is not None and commands.passes(rows):       # a GPU that the table of devices knows, or a CPU
        made["roofline"] = commands.estimates_of(rows, at_most)
    for name, result in made.items():
        files.append(out / f"{name}.json")
        record.write(files[-1], result)
    report(files, out)


def as_markdown(files: list[Path], wanted: list[str], parts: list[str], pictures: str | None) -> str:
    """All of it, or the sections of these names without their titles, and of these parts alone."""
    from tilewise.report import markdown, results, sections

    known = ["headline", *sections.SLUGS]
    for name in wanted:
        if name not in known:
            raise ValueError(f"--section: expected one of {', '.join(known)}, got {name!r}")
    found = results.read(files)
    if not wanted:
        return markdown.whole(found, sections.build(found))
    if parts:
        found = results.only(found, parts)
    texts = [markdown.headlines(found)] if "headline" in wanted else []
    made = {one.slug: one for one in sections.build(found, [name for name in wanted if name != "headline"] or ["none"])}
    for name in wanted:
        if name != "headline" and name not in made:
            raise ValueError(f"--section: {name}: these files hold nothing for it")
    texts += [markdown.blocks(made[name].blocks, markdown.Pictures(pictures, name) if pictures else None)
              for name in wanted if name in made]
    return "\n\n".join(texts) + "\n"
