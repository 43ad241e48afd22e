"""The masks and score functions that FlexAttention's users write, written as they write them: a table of test cases.

The catalogue follows that of attention-gym. Functions are plain Python over torch, indexed with absolute indices, and close
over small tensors; a factory takes what its function closes over. Nothing here knows Tilewise.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Entry:
    """A mask, a score function or both, and the (B, H, S_q, S_k) that their tensors are made for."""
    name: str
    mask: Callable | None
    score_mod: Callable | None
    shape: tuple[int, int, int, int]


# ---- masks of text --------------------------------------------------------------------------------------------------

def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding_window(width: int) -> Callable:
    def mask(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx <= width)
    return mask


def dilated_window(reach: int, dilation: int) -> Callable:
    def mask(b, h, q_idx, kv_idx):
        offset = q_idx - kv_idx
        return (offset.abs() <= reach) & (offset % dilation == 0)
    return mask


def first_and_window(first: int, width: int) -> Callable:
    """StreamingLLM: the first tokens stay visible."""
    def mask(b, h, q_idx, kv_idx):
        recent = q_idx - kv_idx <= width
        return causal(b, h, q_idx, kv_idx) & torch.logical_or(recent, kv_idx < first)
    return mask


def chunked(size: int) -> Callable:
    def mask(b, h, q_idx, kv_idx):
        return (q_idx // size == kv_idx // size) & (q_idx >= kv_idx)
    return mask


def prefix_lm(lengths: Tensor) -> Callable:
    def mask(b, h, q_idx, kv_idx):
        return (kv_idx < lengths[b]) | (q_idx >= kv_idx)
    return mask


def padding(lengths: Tensor) -> Callable:
    """Queries of the padding see nothing."""
    def mask(b, h, q_idx, kv_idx):
        return (q_idx < lengths[b]) & (kv_idx < lengths[b])
    return mask


def documents(ids: Tensor) -> Callable:
    """ids [B, N], those of padding negative."""
    def mask(b, h, q_idx, kv_idx):
        return (ids[b, q_idx] == ids[b, kv_idx]) & (ids[b, kv_idx] >= 0)
    return mask


def both(*masks: Callable) -> Callable:
    def mask(b, h, q_idx, kv_idx):
        result = b.new_ones((), dtype=torch.bool)
        for one in masks:
            result = result & one(b, h, q_idx, kv_idx)
        return result
    return mask


def global_and_window(is_global: Tensor, reach: int) -> Callable:
    """Longformer: some tokens see all and are seen by all."""
    def mask(b, h, q_idx, kv_idx):
        near = (q_idx - kv_idx).abs() <= reach
        return near | is_global[q_idx] | is_global[kv_idx]
    return mask


def kept_blocks(kept: Tensor, size: int) -> Callable:
    """BigBird: a table of blocks for each head, kept [H, blocks, blocks]."""
    def mask(b, h, q_idx, kv_idx):
        return kept[h, q_idx // size, kv_idx // size]
    return mask


def window_of_head(widths: Tensor) -> Callable:
    def mask(b, h, q_idx, kv_idx):
        distance = q_idx - kv_idx
        return (distance >= 0) & (distance <= widths[h])
    return mask


def tree(ancestors: Tensor, context: int) -> Callable:
    """Speculative decoding: drafts see the context, themselves and the drafts above them; ancestors [S_q, S_q]."""
    def mask(b, h, q_idx, kv_idx):
        draft = torch.clamp(kv_idx - context, min=0)
        return torch.where(kv_idx < context, True, ancestors[q_idx, draft])
    return mask


# ---- masks of images, and of images with text -----------------------------------------------------------------------

def neighbourhood(height: int, width: int, radius: int) -> Callable:
    """NATTEN: a square of pixels around each, moved inside at the border so that all see as many."""
    def mask(b, h, q_idx, kv_idx):
        row = (q_idx // width).clamp(radius, height - 1 - radius)
        col = (q_idx % width).clamp(radius, width - 1 - radius)
        return ((kv_idx // width - row).abs() <= radius) & ((kv_idx % width - col).abs() <= radius)
    return mask


def tiled_neighbourhood(width: int, side: int, radius: int) -> Callable:
    """Tokens in the order of side x side patches, so that neighbours are near each other in memory too."""
    def place(index):
        patch, inside = index // (side * side), index % (side * side)
        across = width // side
        return patch // across * side + inside // side, patch % across * side + inside % side

    def mask(b, h, q_idx, kv_idx):
        (row, col), (k_row, k_col) = place(q_idx), place(kv_idx)
        return torch.maximum((row - k_row).abs(), (col - k_col).abs()) <= radius
    return mask


def sliding_tiles(width: int, side: int) -> Callable:
    """Sliding tile attention: patches of pixels see the patches around them."""
    def mask(b, h, q_idx, kv_idx):
        rows = q_idx // width // side - kv_idx // width // side
        cols = q_idx % width // side - kv_idx % width // side
        return (rows >= -1) & (rows <= 1) & (cols >= -1) & (cols <= 1)
    return mask


def axial(width: int) -> Callable:
    def mask(b, h, q_idx, kv_idx):
        same_row = q_idx // width == kv_idx // width
        same_col = q_idx % width == kv_idx % width
        return same_row | same_col
    return mask


def flamingo(image_of_text: Tensor, tokens_per_image: int) -> Callable:
    """Text sees the image that it follows; image_of_text [B, S_q], -1 before the first."""
    def mask(b, h, q_idx, kv_idx):
        return image_of_text[b, q_idx] == kv_idx // tokens_per_image
    return mask


def transfusion(images: Tensor) -> Callable:
    """Causal text, images that see all of themselves; images [B, N], -1 for text."""
    def mask(b, h, q_idx, kv_idx):
        same_image = images[b, q_idx].eq(images[b, kv_idx]) & images[b, q_idx].ge(0)
        return same_image | causal(b, h, q_idx, kv_idx)
    return mask


# ---- score functions ------------------------------------------------------------------------------------------------

def causal_score(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score, -float("inf"))


def alibi(slopes: Tensor) -> Callable:
    def score_mod(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx).abs()
    return score_mod


def alibi_by_formula(heads: int) -> Callable:
    def score_mod(score, b, h, q_idx, kv_idx):
        slope = torch.exp2(-((h + 1) * 8.0 / heads))
        return score + slope * (kv_idx - q_idx)
    return score_mod


def softcap(cap: float) -> Callable:
    def score_mod(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)
    return score_mod


def relative(table: Tensor, n: int) -> Callable:
    """table [H, 2 n - 1]: one bias for each head and offset."""
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + table[h, q_idx - kv_idx + n - 1]
    return score_mod


def relative_2d(rows: Tensor, cols: Tensor, height: int, width: int) -> Callable:
    """As in Swin and SAM: rows [H, 2 height - 1], cols [H, 2 width - 1]."""
    def score_mod(score, b, h, q_idx, kv_idx):
        down = q_idx // width - kv_idx // width + height - 1
        right = q_idx % width - kv_idx % width + width - 1
        return score + rows[h, down] + cols[h][right]
    return score_mod


def t5(weights: Tensor, exact: int, longest: int) -> Callable:
    """weights [buckets, H]: near offsets have a bucket each, far ones share buckets that grow with the distance.

    No distance but `exact` itself may lie on a bucket's border: there the rounding of log would decide.
    """
    buckets = weights.shape[0]

    def score_mod(score, b, h, q_idx, kv_idx):
        distance = torch.clamp(q_idx - kv_idx, min=0)
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(longest / exact)
        far = exact + (growth * (buckets - exact)).to(torch.int32)
        bucket = torch.where(distance < exact, distance, torch.minimum(far, torch.full_like(far, buckets - 1)))
        return score + weights[bucket, h]
    return score_mod


def pair_bias(bias: Tensor) -> Callable:
    """bias [B, N, N], in bf16 as models keep it."""
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[b, q_idx, kv_idx]
    return score_mod


def graph_distance(weights: Tensor, hops: Tensor) -> Callable:
    """Graphormer: weights [H, hops], hops [N, N] in 8 bits."""
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + weights[h, hops[q_idx, kv_idx].int()]
    return score_mod


def depth_difference(weights: Tensor, depths: Tensor) -> Callable:
    """Nodes of a tree: weights [H], depths [N] in 8 bits, whose difference needs more."""
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + weights[h] * (depths[q_idx].int() - depths[kv_idx].int())
    return score_mod


def log_n(trained: int) -> Callable:
    """Scores grow with the number of keys in sight, so that the softmax stays as sharp as at the trained length."""
    def score_mod(score, b, h, q_idx, kv_idx):
        return score * (torch.log(1 + q_idx) / math.log(trained))
    return score_mod


def temperature_of_head(temperatures: Tensor) -> Callable:
    """Heads of odd number look at distances too."""
    def score_mod(score, b, h, q_idx, kv_idx):
        sharp = score / temperatures[h]
        return torch.where(h % 2 == 0, sharp, sharp - 0.05 * (q_idx - kv_idx) ** 2 / (1.0 + kv_idx))
    return score_mod


def checkerboard(score, b, h, q_idx, kv_idx):
    odd = (q_idx + kv_idx) % 2 == 1
    return torch.where(odd, score * 0.5, torch.where(q_idx == kv_idx, score * 2, score))


def gaussian(widths: Tensor) -> Callable:
    def score_mod(score, b, h, q_idx, kv_idx):
        distance = (q_idx - kv_idx) / widths[h]
        return score + torch.exp(-0.5 * distance.square())
    return score_mod


def in_order(*mods: Callable) -> Callable:
    def score_mod(score, b, h, q_idx, kv_idx):
        for one in mods:
            score = one(score, b, h, q_idx, kv_idx)
        return score
    return score_mod


# ---- the table ------------------------------------------------------------------------------------------------------

class Draw(NamedTuple):
    """What the tensors of a catalogue are drawn from."""
    generator: Generator

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.generator.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def packed(self, batch: int, n: int, pieces: int) -> Tensor:
        """Ids of consecutive pieces."""
        return self.whole(0, pieces, batch, n).sort(-1).values


def catalogue(batch: int, heads: int, seqlen_q: int, seqlen_k: int, generator: Generator) -> list[Entry]:
    """Every entry, with tensors on the generator's device.

    seqlen_q tokens see themselves; where queries and keys differ, seqlen_q queries see seqlen_k >= seqlen_q keys.
    """
    draw = Draw(generator)
    square, cross = (batch, heads, seqlen_q, seqlen_q), (batch, heads, seqlen_q, seqlen_k)
    return [*_text(draw, square), *_images(draw, square), *_unequal(draw, cross), *_scores(draw, square),
            *_combinations(draw, square)]


def _padded_documents(draw: Draw, batch: int, n: int) -> Tensor:
    ids = draw.packed(batch, n, 4).int()
    ids[-1, n - n // 8:] = -1
    return ids


def _text(draw: Draw, shape: tuple[int, int, int, int]) -> list[Entry]:
    batch, heads, n, _ = shape
    ids = _padded_documents(draw, batch, n)
    blocks = -(-n // 20)
    masks = {
        "causal": causal,
        "sliding window": sliding_window(n // 5),
        "dilated sliding window": dilated_window(n // 3, 3),
        "first tokens and window": first_and_window(4, n // 6),
        "chunked": chunked(n // 4),
        "prefix-LM": prefix_lm(draw.whole(1, n, batch)),
        "padding": padding(draw.whole(n // 2, n, batch)),
        "documents": documents(ids),
        "documents, causal": both(documents(ids), causal),
        "global tokens and window": global_and_window(draw.whole(0, n // 3, n) == 0, n // 10),
        "table of blocks": kept_blocks(draw.whole(0, 3, heads, blocks, blocks) == 0, 20),
        "window of each head": window_of_head(draw.whole(1, n, heads)),
    }
    return [Entry(name, mask, None, shape) for name, mask in masks.items()]


def _images(draw: Draw, shape: tuple[int, int, int, int]) -> list[Entry]:
    batch, _, n, _ = shape
    width = 12
    images = draw.packed(batch, n, 7)
    masks = {
        "neighbourhood": neighbourhood(-(-n // width), width, 2),
        "neighbourhood in tiled order": tiled_neighbourhood(width, 4, 2),
        "sliding tiles": sliding_tiles(width, 3),
        "axial": axial(width),
        "transfusion": transfusion(torch.where(images % 2 == 0, -1, images)),
    }
    return [Entry(name, mask, None, shape) for name, mask in masks.items()]


def _unequal(draw: Draw, shape: tuple[int, int, int, int]) -> list[Entry]:
    """Queries and keys of different lengths."""
    batch, _, nq, nk = shape
    images = 4
    parents = [int(draw.whole(-1, max(i, 1), 1)) for i in range(nq)]
    ancestors = torch.eye(nq, dtype=torch.bool)
    for i, parent in enumerate(parents):
        if 0 <= parent < i:
            ancestors[i] |= ancestors[parent]
    return [Entry("cross attention to images", flamingo(draw.packed(batch, nq, images + 1) - 1, -(-nk // images)), None, shape),
            Entry("tree", tree(ancestors.to(draw.generator.device), nk - nq), None, shape)]


def _scores(draw: Draw, shape: tuple[int, int, int, int]) -> list[Entry]:
    batch, heads, n, _ = shape
    width = 12
    height = -(-n // width)
    mods = {
        "causal by score": causal_score,
        "ALiBi": alibi(0.5 ** (1.0 + draw.whole(0, 8, heads))),
        "ALiBi by formula": alibi_by_formula(heads),
        "softcap": softcap(1.5),
        "relative": relative(draw.normal(heads, 2 * n - 1), n),
        "relative 2-D": relative_2d(draw.normal(heads, 2 * height - 1), draw.normal(heads, 2 * width - 1), height, width),
        "T5": t5(draw.normal(16, heads), 8, 90),
        "pair bias": pair_bias(draw.normal(batch, n, n).bfloat16()),
        "graph distance": graph_distance(draw.normal(heads, 6), draw.whole(0, 6, n, n).byte()),
        "depth difference": depth_difference(0.1 * draw.normal(heads), draw.whole(0, 9, n).byte()),
        "log n": log_n(32),
        "temperature of each head": temperature_of_head(0.5 + draw.normal(heads).abs()),
        "checkerboard": checkerboard,
        "gaussian": gaussian(1.0 + draw.whole(0, n, heads)),
    }
    return [Entry(name, None, mod, shape) for name, mod in mods.items()]


def _combinations(draw: Draw, shape: tuple[int, int, int, int]) -> list[Entry]:
    batch, heads, n, _ = shape
    slopes = 0.5 ** (1.0 + draw.whole(0, 8, heads))
    capped = in_order(softcap(2.0), relative(draw.normal(heads, 2 * n - 1), n))
    return [Entry("documents with ALiBi", documents(_padded_documents(draw, batch, n)), alibi(slopes), shape),
            Entry("causal with softcap, then relative", causal, capped, shape)]
