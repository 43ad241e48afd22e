"""Who is who among contenders: ours, standard attention, other implementations, and rulers that measure the machine."""
from __future__ import annotations

from typing import Any

from tilewise.report.results import Entry, Ratio, Row

OURS = ("tilewise", "hopper", "triton", "cpu", "tiled", "pages", "chunks")        # first words; pages: a paged cache
OURS_TOO = ("the same again", "without its gradient", "one by one")                # other ways to do it with Tilewise
STANDARD = ("standard", "reference")
RULERS = {"copy": "a copy of memory", "sum": "a sum over memory", "sgemm": "an fp32 matrix product", "full": "full attention",
          "full x density": "full attention × density"}
PLAIN = {"standard": "standard attention", "reference": "standard attention", "tilewise": "Tilewise", "flex": "FlexAttention",
         "flash_attn": "flash-attn"}
APART = ("decode", "packed", "compiling", "butterfly", "sparse", "masks")     # parts of the CPU benchmark
MODES = {"both": "forward + backward", "fwd+bwd": "forward + backward", "forward+backward": "forward + backward"}
MODE_ORDER = ("forward", "backward", "forward + backward")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def kind(name: str) -> str:
    """"ours", "standard", "ruler" or "peer", by the name alone."""
    first = name.split()[0] if name.split() else ""
    if first in OURS or name in OURS_TOO:
        return "ours"
    return "standard" if first in STANDARD else "ruler" if name in RULERS else "peer"


def role(entry: Entry) -> str:
    """The same of an entry, whose file may call it a yardstick."""
    return "ruler" if entry.yardstick else kind(entry.name)


def standard(row: Row) -> Entry | None:
    """Standard attention in a row."""
    return next((e for e in row.entries.values() if role(e) == "standard"), None)


def title(name: str) -> str:
    """A contender in words."""
    if name in PLAIN or name in RULERS:
        return (PLAIN | RULERS)[name]
    if kind(name) == "ours" and name not in OURS_TOO:
        return f"Tilewise {name.removeprefix('tilewise').strip(' -_')}"
    return name.replace("sdpa", "SDPA").replace("flash_attn", "flash-attn")


def peers(row: Row) -> dict[str, Entry]:
    """Other implementations that were timed, fastest first; standard attention is none of them."""
    found = {name: e for name, e in row.timed().items() if role(e) == "peer"}
    return dict(sorted(found.items(), key=lambda item: item[1].seconds or 0.0))


def best_peer(row: Row) -> tuple[str, Ratio] | None:
    """The fastest other implementation, and how many times faster ours is."""
    for name in peers(row):
        found = row.faster(name)
        if found is not None:
            return name, found
    return None


def best_standard(row: Row) -> tuple[str, Ratio] | None:
    """Standard attention, and how many times faster ours is."""
    entry = standard(row)
    found = row.faster(entry.name) if entry else None
    return (entry.name, found) if entry and found else None


def is_attention(row: Row) -> bool:
    """Attention of a sequence to itself, with one mask: what else a file measures has sections of its own."""
    return bool(mode(row) and length(row)) and row.part not in APART


def case(row: Row) -> str:
    """What a row is about, in words."""
    tokens, dim = length(row), row.setting.get("head_dim")
    found = [mode(row), f"{tokens:,} tokens" if tokens else "", f"head dim {dim}" if dim else "", dtype(row),
             mask(row) if "mask" in row.setting or "causal" in row.setting else ""]
    return ", ".join(filter(None, found)) or row.case


def mode(row: Row) -> str:
    """"forward", "backward", "forward + backward", or as the file says; nothing if it does not."""
    found = str(row.setting.get("mode", ""))
    return MODES.get(found, found)


def mask(row: Row) -> str:
    """"full", "causal", "window 512", or as the file says."""
    setting = row.setting
    if "mask" not in setting and "causal" in setting:
        return "causal" if setting["causal"] else "full"
    found = str(setting.get("mask") or "full")
    return f"window {setting['window']}" if found == "window" and setting.get("window") else found


def dtype(row: Row) -> str:
    """"bf16" for "bfloat16", and so on."""
    found = str(row.setting.get("dtype", ""))
    return DTYPES.get(found, found)


def length(row: Row) -> int | None:
    """Keys of the longest sequence, under whichever name the setting has."""
    found: list[Any] = [row.setting.get(name) for name in ("seqlen", "seqlen_k", "context", "longest", "seqlen_q")]
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
