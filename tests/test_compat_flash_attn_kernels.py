"""flash-attn's functions with every argument on Triton's kernels, in the interpreter: the tables of the files named below."""
import pytest
import test_compat_flash_attn as second
import test_compat_flash_attn_cache as caches
import test_compat_flash_attn_later as later
from support.backends import INTERPRETING
from support.flash import TABLE

pytestmark = [pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's process"),
              pytest.mark.usefixtures("one_thread", "poisoned")]


@pytest.mark.parametrize("asked", TABLE, ids=str)
def test_dense(asked):
    second.test_dense(asked, (33, 21), "triton")


@pytest.mark.parametrize("asked", TABLE, ids=str)
def test_packed(asked):
    second.test_packed(asked, "triton")


@pytest.mark.parametrize("asked", TABLE, ids=str)
@pytest.mark.parametrize("module, adapted", [(later.flash3, later.three), (later.flash4, later.four)], ids=["third", "fourth"])
def test_later_generations(module, adapted, asked):
    later.every_argument(module, adapted, asked, "triton")


@pytest.mark.parametrize("asked", caches.TABLE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "padded pages of 4"])
def test_reading_a_cache(asked, layout):
    caches.test_reading(asked, layout, "triton")
