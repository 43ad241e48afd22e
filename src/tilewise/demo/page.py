"""The demo's report: one HTML file that needs nothing else, for screens, phones and paper."""

from __future__ import annotations

import statistics
from html import escape
from pathlib import Path
from string import Template

from tilewise.demo.plots import loss_plot, memory_plot, time_plot
from tilewise.demo.results import STANDARD, TILEWISE, Results
from tilewise.pages import STYLE
from tilewise.pages.svg import inline
from tilewise.pages.words import duration, ratio, size
from tilewise.train import bits_per_byte

TEMPLATE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def write(results: Results, folder: Path) -> Path:
    """Writes index.html and results.json into `folder`; returns the page's path."""
    page = folder / "index.html"
    page.write_text(render(results), encoding="utf-8")
    (folder / "results.json").write_text(results.to_json(), encoding="utf-8")
    return page


def render(results: Results) -> str:
    """The page as text."""
    settings, headline = results.settings, results.headline()
    recipe, model = settings.recipe, settings.model
    return TEMPLATE.substitute(
        style=STYLE,
        device=escape(results.machine["CPU" if settings.device == "cpu" else "GPU"]),
        cards="".join(card(number, words) for number, words in headline_words(results)),
        loss=inline(loss_plot(results), "loss", "Loss of both trainings at each step, one curve on the other"),
        time=inline(time_plot(results), "time", "Time of a forward and backward pass against context length"),
        memory=inline(memory_plot(results), "memory", "Peak memory against context length, with the limit"),
        steps=recipe.steps, difference=f"{headline.loss_difference:.2g}",
        model=f"{results.parameters / 1e6:.2f} million parameters, {model.layers} layers of {model.heads} heads, "
              f"context {recipe.context}, batch {recipe.batch}, seed {recipe.seed}",
        text=escape(results.text), final=final_losses(results), step_times=step_times(results),
        seen=f"{recipe.steps * recipe.batch * recipe.context:,}",
        layer=f"batch {settings.batch}, {settings.heads} heads of {settings.head_dim}, {settings.dtype}, causal",
        limit=size(settings.limit), ending=escape(ending(results)), rows=table_rows(results),
        prompt=escape(results.prompt), sample=escape(results.sample), plan=escape(results.plan),
        machine="".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in results.machine.items()),
        seconds=f"{results.seconds:.0f}",
    )


def headline_words(results: Results) -> list[tuple[str, str]]:
    """The page's first numbers, each with what it means."""
    headline = results.headline()
    at = f"at {headline.length:,} tokens, the longest standard attention could do"
    return [
        (f"{ratio(headline.longest / headline.length)} longer", f"context under the same memory limit: "
         f"{headline.longest:,} tokens against {headline.length:,}"),
        (f"{ratio(headline.memory)} less memory", at),
        (f"{ratio(headline.speedup)} the speed", f"forward and backward, {at}"),
        (f"{headline.loss_difference:.2g} apart", f"at most, in nats per byte, are the two loss curves over "
         f"{len(results.standard)} training steps"),
    ]


def ending(results: Results) -> str:
    """Why each line stops where it stops."""
    refused = results.refused(STANDARD)
    words = f"Standard attention ran out of memory at {refused:,} tokens. " if refused else ""
    refused = results.refused(TILEWISE)
    return words + (f"Tilewise ran out of memory at {refused:,} tokens." if refused else
                    "Tilewise did not run out of memory: the demo ends where its time does.")


def table_rows(results: Results) -> str:
    """One table row for each length."""
    standard, tilewise = results.measured(STANDARD), results.measured(TILEWISE)
    lines = []
    for length in sorted({row.length for row in results.rows}):
        a, b = standard.get(length), tilewise.get(length)
        gone = "out of memory" if length == results.refused(STANDARD) else "–"
        cells = [f"{length:,}", duration(a.seconds) if a else gone, duration(b.seconds) if b else "–",
                 ratio(a.seconds / b.seconds) if a and b else "", size(a.bytes) if a else gone,
                 size(b.bytes) if b else "–", ratio(a.bytes / max(1, b.bytes)) if a and b else ""]
        lines.append("<tr><th scope=row>" + cells[0] + "".join(f"<td>{cell}" for cell in cells[1:]))
    return "\n".join(lines)


def final_losses(results: Results) -> str:
    """Both last validation losses, in bits per byte."""
    a, b = results.standard[-1].val_loss, results.tilewise[-1].val_loss
    assert a is not None
    assert b is not None
    return f"{bits_per_byte(a):.4f} bits per byte with standard attention, {bits_per_byte(b):.4f} with Tilewise"


def step_times(results: Results) -> str:
    """Both median times of a training step of the whole model."""
    a, b = (statistics.median(point.seconds for point in run) for run in (results.standard, results.tilewise))
    return f"{duration(a)} with standard attention, {duration(b)} with Tilewise (median)"


def card(number: str, words: str) -> str:
    """One headline number."""
    return f"<li><strong>{escape(number)}</strong> {escape(words)}</li>\n"
