"""FlexAttention's functions, unchanged: the same objects give the same results in both libraries."""
import pytest
import torch
from support.catalogue import Entry, catalogue, causal, sliding_window
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, or_masks

import tilewise as tw
from tilewise.trace.bounds import EMPTY, FULL

ENTRIES = catalogue(2, 4, 101, 139, torch.Generator().manual_seed(0))
HEAD_DIM = 16
EPS = torch.finfo(torch.float32).eps

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def inputs(entry: Entry) -> list[torch.Tensor]:
    """q, k, v and dout, [B, H, S, D]."""
    generator = torch.Generator().manual_seed(1)
    batch, heads, nq, nk = entry.shape
    return [torch.randn(batch, heads, n, HEAD_DIM, generator=generator) for n in (nq, nk, nk, nq)]


def over_scores(function, entry: Entry, score=None) -> torch.Tensor:
    """A mask or score function for every [b, h, q, k], each index a zero-dimensional tensor as in FlexAttention."""
    scored = () if score is None else (0,)
    for axis in reversed(range(4)):
        function = torch.vmap(function, scored + tuple(0 if d == axis else None for d in range(4)))
    indices = [torch.arange(n) for n in entry.shape]
    return function(*indices) if score is None else function(score, *indices)


def visible(entry: Entry) -> torch.Tensor:
    return torch.tensor(True).expand(entry.shape) if entry.mask is None else over_scores(entry.mask, entry)


def dense(entry: Entry, q, k, v):
    """The definition: the functions applied to the whole matrix of scores."""
    s = q @ k.mT * HEAD_DIM ** -0.5
    if entry.score_mod is not None:
        s = over_scores(entry.score_mod, entry, s)
    s = torch.where(visible(entry), s, -torch.inf)
    pivot = s.detach().amax(-1, keepdim=True)
    p = torch.exp(s - torch.where(pivot == -torch.inf, 0.0, pivot))
    total = p.sum(-1, keepdim=True)
    return p @ v / torch.where(total == 0, 1.0, total)


def flex(entry: Entry, q, k, v):
    block_mask = None if entry.mask is None else create_block_mask(entry.mask, *entry.shape, device="cpu")
    return flex_attention(q, k, v, score_mod=entry.score_mod, block_mask=block_mask)


def ours(entry: Entry, q, k, v, backend: str):
    return tw.attention(q, k, v, mask=entry.mask, score_mod=entry.score_mod, layout="bhsd", backend=backend)


def assert_near(x, truth, standard, factor: int):
    """The rule of `bench/tolerance.py`."""
    error, of_standard = ((y.double() - truth).abs().max().item() for y in (x, standard))
    largest = max(1.0, truth.abs().max().item())
    assert error <= factor * of_standard + 4 * EPS * largest


@each_entry
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_forward_is_flex_attentions(entry, backend, small_tiles):
    q, k, v, _ = inputs(entry)
    out, standard = ours(entry, q, k, v, backend), flex(entry, q, k, v)
    assert_near(out, dense(entry, q.double(), k.double(), v.double()), standard, factor=2)
    hidden = ~visible(entry).any(-1)
    assert not standard[hidden].any()
    assert not out[hidden].any()


def gradients(function, entry: Entry, dtype: torch.dtype):
    *leaves, dout = [x.to(dtype) for x in inputs(entry)]
    leaves = [x.requires_grad_() for x in leaves]
    return torch.autograd.grad(function(entry, *leaves), leaves, dout)


@each_entry
def test_gradients_are_those_of_the_dense_computation(entry, small_tiles):
    found = gradients(lambda *args: ours(*args, backend="tiled"), entry, torch.float32)
    truth, standard = gradients(dense, entry, torch.float64), gradients(dense, entry, torch.float32)
    for x, exact, rounded in zip(found, truth, standard, strict=True):
        assert_near(x, exact, rounded, factor=3)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.mask is not None], ids=lambda entry: entry.name)
def test_masks_and_their_tiles(entry):
    """What a mask shows is what its function says, and no tile said EMPTY or FULL is anything else."""
    mask = tw.mask_mod(entry.mask)
    shown = visible(entry)
    assert torch.equal(mask.dense(*entry.shape), shown)
    classes = mask.classify(*entry.shape, 16, 16)
    classes = classes.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :shown.shape[2], :shown.shape[3]]
    assert not shown[classes == EMPTY].any()
    assert shown[classes == FULL].all()


@pytest.mark.parametrize("combine", [and_masks, or_masks])
def test_masks_combined_by_torch(combine):
    entry = Entry(combine.__name__, combine(causal, sliding_window(20)), None, ENTRIES[0].shape)
    q, k, v, _ = inputs(entry)
    truth = dense(entry, q.double(), k.double(), v.double())
    assert_near(ours(entry, q, k, v, "tiled"), truth, flex(entry, q, k, v), factor=2)


def test_the_catalogue_has_rows_without_keys():
    assert any(not visible(entry).any(-1).all() for entry in ENTRIES)
