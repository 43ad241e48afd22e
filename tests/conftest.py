import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from support.backends import INTERPRETING

if INTERPRETING:
    from tilewise.inspect import interpreter
    interpreter.install()

UNINITIALISED = ("empty", "empty_like", "empty_permuted", "empty_strided")


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, as it may: what is never written, or read before it is, shows."""
    def poison(create):
        def created(*args, **kwargs):
            x = create(*args, **kwargs)
            return x.fill_(torch.nan) if x.dtype.is_floating_point else x
        return created

    for name in UNINITIALISED:
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture
def small_tiles(monkeypatch):
    """The tiled backend cuts even short sequences into several tiles."""
    from tilewise.backends.tiled import walk as tiled
    monkeypatch.setattr(tiled, "LONGEST_TILE", 32)
    monkeypatch.setattr(tiled, "SHORTEST_TILE", 16)


@pytest.fixture
def threads():
    """One thread; and sets how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Work this small only waits for its threads, and long where others use the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forgetful():
    """No call is known from before, nor afterwards, as where tile sizes are others meanwhile."""
    from tilewise import known
    known.forget()
    yield
    known.forget()
