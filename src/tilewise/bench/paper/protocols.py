"""All protocols, as `bench.suite` runs them: trials, and the lines of a result."""
from __future__ import annotations

from collections.abc import Sequence

from tilewise.bench.paper import flash_attention, flash_attention_2, flash_decoding
from tilewise.bench.record import Row
from tilewise.bench.suite import Trial, Wanted

PROTOCOLS = flash_attention_2, flash_decoding, flash_attention


def trials(wanted: Wanted) -> list[Trial]:
    """Every cell of the papers' tables that is measured here."""
    return [trial for protocol in PROTOCOLS for trial in protocol.trials(wanted)]


def lines(rows: Sequence[Row], wanted: Wanted) -> list[str]:
    """The tables as the papers print them."""
    found = []
    for protocol in PROTOCOLS:
        if of_protocol := [row for row in rows if row["part"] == protocol.TITLE]:
            found += [*protocol.lines(of_protocol, wanted), ""]
    return found
