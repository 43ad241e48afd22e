"""The demo from beginning to end: prepare -> train both -> generate -> measure both -> Results."""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tilewise.api import attention, explain
from tilewise.demo.measure import Case, Row, measure
from tilewise.demo.results import STANDARD, TILEWISE, Results
from tilewise.demo.settings import Settings, choose
from tilewise.doctor import machine
from tilewise.models import GPT
from tilewise.train import Corpus, Point, load_corpus, train

Progress = Callable[[str, int, int, str], None]     # stage, done, total, a few words


@dataclass(frozen=True)
class Job:
    """A demo whose inputs have been checked."""

    settings: Settings
    corpus: Corpus
    out: Path


def prepare(*, text: str | None = None, out: str = "demo-report", device: str = "auto", steps: int | None = None,
            seed: int = 0, quick: bool = False) -> Job:
    """Checks everything a user may have got wrong, before any work: raises OSError, ValueError or ImportError."""
    settings = choose(device, steps=steps, seed=seed, quick=quick)
    if sys.platform == "win32" and settings.device == "cpu":
        raise OSError("device: on Windows the demo can measure memory on a GPU only")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the report's plots need matplotlib: pip install 'tilewise[plots]'") from error
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"out: cannot write to {folder}: {error.strerror}") from error
    corpus = load_corpus(text, min_bytes=max(1 << 14, 20 * settings.recipe.context))
    return Job(settings, corpus, folder)


def execute(job: Job, progress: Progress) -> Results:
    """Runs the demo and tells `progress` of every step."""
    began = time.perf_counter()
    settings, corpus = job.settings, job.corpus
    facts = machine()
    models = [new_model(settings, backend) for backend in (STANDARD, TILEWISE)]
    standard, tilewise = train_both(models, corpus, settings, progress)
    prompt, sample = write_sample(models[1], corpus, settings, progress)
    parameters = models[1].parameter_count()
    del models
    if settings.device != "cpu":
        torch.cuda.empty_cache()
    rows = list(measure_both(settings, progress))
    return Results(
        settings=settings, machine=facts, parameters=parameters,
        text=f"{len(corpus.train) + len(corpus.val):,} bytes from {corpus.files:,} files of {corpus.source}",
        standard=standard, tilewise=tilewise, prompt=prompt, sample=sample, rows=rows,
        plan=describe_plan(settings, rows[-1].length), seconds=time.perf_counter() - began,
    )


def new_model(settings: Settings, backend: str) -> GPT:
    """The demo's GPT with that attention; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.recipe.seed)
        return GPT(settings.model, partial(attention, causal=True, backend=backend)).to(settings.device)


def train_both(models: list[GPT], corpus: Corpus, settings: Settings, progress: Progress
               ) -> tuple[list[Point], list[Point]]:
    """Both trainings, step by step in turn, so that whatever else the machine does slows both."""
    standard, tilewise = [], []
    for a, b in zip(*(train(model, corpus, settings.recipe) for model in models), strict=True):
        standard.append(a)
        tilewise.append(b)
        note = f"loss {a.loss:.3f} standard, {b.loss:.3f} tilewise"
        progress("Training twice", a.step + 1, settings.recipe.steps, note)
    return standard, tilewise


def write_sample(model: GPT, corpus: Corpus, settings: Settings, progress: Progress) -> tuple[str, str]:
    """A piece of unseen text and what the trained model writes after it."""
    prompt = corpus.val[:64]
    progress("Writing text", 0, 1, "")
    generator = torch.Generator().manual_seed(settings.recipe.seed)
    tokens = model.generate(prompt.long()[None].to(settings.device), settings.sample, temperature=0.7, top_k=40,
                            generator=generator)
    progress("Writing text", 1, 1, f"{settings.sample} bytes")
    words = [bytes(part.tolist()).decode(errors="replace") for part in (prompt, tokens[0, len(prompt):])]
    return words[0], words[1]


def measure_both(settings: Settings, progress: Progress) -> Iterator[Row]:
    """Standard attention and Tilewise at every length, until memory or the time for it runs out.

    On the CPU every measurement has a fresh process, and the two take turns; on a GPU one process each is enough.
    """
    both = (STANDARD, TILEWISE)
    each: list[tuple[int, ...]] = [(length,) for length in settings.lengths]
    groups = each if settings.device == "cpu" else [settings.lengths]
    total, done, end = len(both) * len(settings.lengths), 0, time.perf_counter() + settings.seconds
    pace = dict.fromkeys(both, math.inf)        # best seconds for one query and key
    stopped: set[str] = set()
    for lengths, backend in itertools.product(groups, both):
        if backend in stopped:
            continue
        case = Case(backend, lengths, settings.batch, settings.heads, settings.head_dim, settings.dtype,
                    settings.device, settings.limit)
        for row in measure(case):
            done += 1
            progress("Measuring", done, total, f"{backend}, {row.length:,} tokens")
            yield row
            if not row.refused:
                pace[backend] = min(pace[backend], row.seconds / row.length**2)
            following = pace[backend] * (2 * row.length) ** 2
            if row.refused or case.duration(following) > end - time.perf_counter():
                stopped.add(backend)
                break
    progress("Measuring", total, total, "")


def describe_plan(settings: Settings, length: int) -> str:
    """What Tilewise does at that length, in its own words."""
    shape = (settings.batch, length, settings.heads, settings.head_dim)
    x = torch.zeros(settings.head_dim, dtype=getattr(torch, settings.dtype), device=settings.device).expand(shape)
    return str(explain(x, x, x, causal=True))
