"""docs/gallery.md: its code runs, in both libraries, and the pictures and numbers below are those of the code."""
import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tilewise as tw

SCRIPT = Path(__file__).parents[1] / "scripts" / "gallery"


def load_script():
    spec = importlib.util.spec_from_loader("gallery", SourceFileLoader("gallery", str(SCRIPT)))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gallery = load_script()
PAGE = gallery.PAGE.read_text()
SECTIONS = dict(gallery.sections(PAGE))

pytestmark = pytest.mark.usefixtures("one_thread")
each_section = pytest.mark.parametrize("title", SECTIONS)


def test_the_page_is_what_the_script_writes():
    assert gallery.rewritten(PAGE) == PAGE
    assert len(SECTIONS) == PAGE.count("```python") >= 12


@each_section
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_code_runs_in_both_libraries(title):
    n, heads = gallery.DRAWN, gallery.HEADS
    mask, score_mod = gallery.run(SECTIONS[title], n)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, n, 8, generator=generator) for _ in range(3))
    out = tw.attention(q, k, v, mask=mask, score_mod=score_mod, layout="bhsd", backend="tiled")
    if isinstance(mask, tw.Mask):  # combined by operators that FlexAttention does not have
        visible = mask.dense(1, heads, n, n)
        mask = lambda b, h, q_idx, kv_idx: visible[b, h, q_idx, kv_idx]  # noqa: E731
    block_mask = None if mask is None else create_block_mask(mask, 1, heads, n, n, device="cpu")
    torch.testing.assert_close(out, flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask), atol=1e-5, rtol=1e-5)


@each_section
def test_classes_of_tiles_are_exact(title):
    """As the page says."""
    n, tile = gallery.DRAWN, gallery.DRAWN_TILE
    mask = gallery.run(SECTIONS[title], n).mask
    if mask is None:
        return
    mask = gallery.as_mask(mask)
    blocks = mask.dense(1, gallery.HEADS, n, n).unflatten(3, (-1, tile)).unflatten(2, (-1, tile))
    exact = blocks.any(5).any(3).byte() + blocks.all(5).all(3).byte()
    assert torch.equal(mask.classify(1, gallery.HEADS, n, n, tile, tile), exact)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    for title, code in SECTIONS.items():
        gallery.draw(title, code, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in gallery.PAGE.with_suffix("").iterdir()}
    assert all(path.stat().st_size < 12_000 for path in tmp_path.iterdir())
