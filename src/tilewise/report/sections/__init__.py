"""The sections of a report, in order: each a function of all files, which gives blocks where they hold something for it."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tilewise.report.blocks import Block, Section
from tilewise.report.results import File
from tilewise.report.sections import (
    comparisons,
    decode,
    memory,
    numbers,
    numerics,
    origin,
    paper,
    promises,
    roofline,
    slower,
    sparse,
    speed,
    summary,
    traffic,
)


class Kind(NamedTuple):
    """command: what makes the files that a section needs."""
    slug: str
    title: str
    build: Callable[[Sequence[File]], list[Block]]
    command: str = ""


KINDS = [
    Kind("summary", "In short", summary.build),
    Kind("slower", "Where Tilewise is slower", slower.build),
    Kind("speed", "Speed", speed.build, "tilewise bench attention --out attention.json"),
    Kind("memory", "Memory", memory.build, "tilewise bench memory --out memory.json"),
    Kind("decode", "Decoding", decode.build, "tilewise bench decode --out decode.json"),
    Kind("serving", "Packed batches and chunks", comparisons.of("serving"), "tilewise bench serving --out serving.json"),
    Kind("sparse", "Sparse blocks", sparse.build, "tilewise bench sparse --out sparse.json"),
    Kind("masks", "Masks and score functions", comparisons.of("masks"), "tilewise bench masks --out masks.json"),
    Kind("cpu", "The CPU backend", comparisons.cpu, "tilewise bench cpu --out cpu.json"),
    Kind("promises", "Promised, and met or not", promises.build, "tilewise bench cpu --out cpu.json"),
    Kind("overhead", "Overhead of a call", numbers.overhead, "tilewise bench overhead --out overhead.json"),
    Kind("traffic", "Memory traffic against theory", traffic.build, "tilewise traffic table --out traffic.json"),
    Kind("roofline", "Roofline", roofline.build,
         "tilewise traffic roofline --of attention.json --device cpu --out roofline.json"),
    Kind("instructions", "Instructions", numbers.instructions, "tilewise bench instructions --out instructions.json"),
    Kind("paper", "The papers' tables", paper.build, "tilewise bench paper --out paper.json"),
    Kind("numerics", "Errors against fp64", numerics.numerics, "tilewise bench numerics --out numerics.json"),
    Kind("rounding", "Where errors come from", numerics.rounding),
    Kind("others", "Other results", comparisons.unknown),
    Kind("refused", "Who was not timed, and why", origin.refused),
    Kind("origin", "Where these numbers come from", origin.build),
]
SLUGS = [kind.slug for kind in KINDS]


def build(files: Sequence[File], wanted: Sequence[str] = ()) -> list[Section]:
    """The sections that these files have something for, all or those of `wanted`."""
    found = []
    for kind in KINDS:
        if not wanted or kind.slug in wanted:
            blocks = kind.build(files)
            if blocks:
                found.append(Section(kind.slug, kind.title, blocks))
    return found


def missing(sections: Sequence[Section], files: Sequence[File]) -> list[tuple[str, str]]:
    """Titles of the sections that no file is for, and what makes such a file."""
    there = {section.slug for section in sections} | {file.benchmark for file in files}
    return [(kind.title, kind.command) for kind in KINDS if kind.command and kind.slug not in there]
