"""Other ways to attend on a CPU, where they run: standard attention, our own `tiled`, FlexAttention compiled."""
from __future__ import annotations

from tilewise.bench.cpu.dense import Setting, drawn, ours
from tilewise.bench.cpu.figures import FASTER, Ratio, ratios
from tilewise.bench.cpu.race import Entrant, Rival, entrant, race
from tilewise.bench.masks import causal
from tilewise.bench.peers import Contender, flex
from tilewise.bench.peers import ours as on_backend
from tilewise.bench.serving.contest import Row

TITLE = "other implementations"


def settings(quick: bool = False) -> list[Setting]:
    return [Setting("forward", 128 if quick else 2048, 8, 64, "float32", "causal", seconds=0.2 if quick else 20.0)]


def measure(setting: Setting) -> Row:
    peers = [on_backend("reference")._replace(name="standard"), on_backend("tiled"), flex()]
    absent = {peer.name: {"state": "absent", "reason": peer.reason} for peer in peers if peer.attend is None}
    field = {peer.name: of_peer(peer, setting) for peer in peers if peer.attend is not None}
    rows, timed = race({"tilewise": entrant(ours(setting), setting.mode)} | field, {}, setting.seconds)
    return {"contenders": rows | absent, "figures": ratios([Ratio(FASTER, name, name, "tilewise") for name in field], timed)}


def of_peer(peer: Contender, setting: Setting) -> Entrant:
    """FlexAttention refuses inputs that require gradients, even where none are wanted."""
    attend = peer.attend
    assert attend is not None
    return entrant(Rival(*drawn(setting), mask=causal, attend=lambda q, k, v: attend(q.detach(), k.detach(), v.detach(), True)),
                   setting.mode)
