"""Programs that import flash_attn find Tilewise in its place, unchanged, after tilewise.compat.install()."""
import importlib
import importlib.metadata
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.backends import AVAILABLE

import tilewise as tw
from tilewise import compat

pytestmark = [pytest.mark.skipif(AVAILABLE == ["triton"], reason="in the interpreter's process only Triton runs"),
              pytest.mark.usefixtures("one_thread")]
NAMES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding", "flash_attn.layers",
         "flash_attn.layers.rotary", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn_interface")
PROGRAM = Path(__file__).parent / "programs" / "gpt_with_flash_attn.py"


@pytest.fixture
def installed():
    compat.install()
    yield
    compat.uninstall()


def test_a_program_for_flash_attn_runs(installed):
    program = runpy.run_path(str(PROGRAM))
    model, losses = program["train"]()
    assert losses[0] > 2.5
    assert losses[-1] < 0.5 * losses[0]
    prompt = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    grown = model.generate(prompt, 8)
    whole = model.loss(grown, torch.ones_like(grown, dtype=torch.bool))
    assert whole.isfinite()
    ends = torch.tensor([0, 14, 28], dtype=torch.int32)      # token by token and all at once agree
    logits = model(model.embed(grown).flatten(0, 1), cu_seqlens=ends, max_seqlen=14).unflatten(0, (2, 14))
    assert torch.equal(logits[:, 5:-1].argmax(-1), grown[:, 6:])


def version_of_flash_attn():
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_modules(name, installed):
    found = importlib.import_module(name)
    assert found is importlib.import_module(f"tilewise.compat.{name}")
    assert importlib.util.find_spec(name) is not None


def test_every_module_of_the_package_is_one_object(installed):
    """A second copy under the other name would have other functions."""
    for name in sys.modules:
        if name.split(".")[0] in ("flash_attn", "flash_attn_interface"):
            assert sys.modules[name] is sys.modules[f"tilewise.compat.{name}"]


def test_names_as_programs_import_them(installed):
    import flash_attn
    from flash_attn.cute import flash_attn_func as fourth
    from flash_attn_interface import flash_attn_func as third
    assert len({fourth, third, flash_attn.flash_attn_func, flash_attn.flash_attn_interface.flash_attn_func}) == 3
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.modules"):
        importlib.import_module("flash_attn.modules.mha")


def test_versions_as_programs_ask_for_them(installed):
    import flash_attn
    assert flash_attn.__version__ == f"2.8.3+tilewise.{tw.__version__}"
    for name in ("flash_attn", "flash-attn"):
        assert importlib.metadata.version(name) == flash_attn.__version__
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert importlib.metadata.metadata("flash-attn")["Summary"] == "Tilewise in the place of flash-attn"
    assert importlib.metadata.version("torch") == torch.__version__.split("+")[0] or "+" in importlib.metadata.version("torch")


def test_uninstall():
    before = version_of_flash_attn()
    compat.install()
    compat.install()
    compat.uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]
    assert version_of_flash_attn() == before
    compat.uninstall()


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface", "flash_attn.flash_attn_interface"])
def test_refuses_where_flash_attn_is_imported(name, monkeypatch):
    real = ModuleType(name)
    real.__file__ = "/site-packages/flash_attn/__init__.py"
    monkeypatch.setitem(sys.modules, name, real)
    with pytest.raises(RuntimeError, match=rf"install: {name} has been imported from /site-packages/flash_attn/__init__\.py"):
        compat.install()
    assert sys.modules[name] is real
    compat.uninstall()
    assert sys.modules[name] is real


def test_an_installed_flash_attn_is_hidden_and_comes_back(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '2.7.0'\n")
    described = tmp_path / "flash_attn-2.7.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.7.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    compat.install()
    assert importlib.import_module("flash_attn").__version__.startswith("2.8.3+tilewise")
    assert importlib.metadata.version("flash-attn").startswith("2.8.3+tilewise")
    compat.uninstall()
    assert importlib.import_module("flash_attn").__version__ == "2.7.0"
    assert importlib.metadata.version("flash-attn") == "2.7.0"
    del sys.modules["flash_attn"]


ALONE = """
import importlib, sys
import tilewise.compat
print([name for name in sys.modules if name.startswith("tilewise.compat.flash")])
for name in {names}:
    for loaded in [name for name in sys.modules if name.startswith("tilewise.compat.")]:
        del sys.modules[loaded]
    importlib.import_module(f"tilewise.compat.{name}")
"""


def test_modules_are_imported_when_asked_for_in_any_order():
    done = subprocess.run([sys.executable, "-c", ALONE.replace("{names}", repr(NAMES))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
