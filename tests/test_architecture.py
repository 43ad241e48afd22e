"""The layout that DESIGN.md promises: imports point downward, optional packages stay optional, names are public on purpose."""
import ast
import functools
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import tilewise

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tilewise"

# Rooms from the bottom up: a module imports from its own row or rows above it in this table, never below.
LAYERS = [
    ["trace"],
    ["rng", "mask_tables", "state", "packing", "rotary", "fp8", "costs", "patterns"],
    ["masks", "score_mods", "block_sparse"],
    ["draw", "kv_cache", "paged_cache", "statistics"],
    ["problem"],
    ["sequences", "sharding", "widening"],
    ["backends"],
    ["reference", "baselines"],
    ["plan", "derivatives"],
    ["ops"],
    ["known", "found"],
    ["calls"],
    ["steps"],
    ["api"],
    ["__init__"],
    ["models", "inspect", "devices", "doctor", "compat", "pages", "terminal"],
    ["train", "bench"],
    ["demo", "mask_text", "report", "traffic"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
VOCABULARY = [room for row in LAYERS[:LEVEL["backends"]] for room in row]
EXCEPTIONS = {("masks", "draw")}        # `tilewise.Mask.save_png` draws on request; drawing knows masks


@functools.cache
def imports(path):
    """Modules that a file imports when it is loaded or later, as dotted names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found += [f"tilewise.{alias.name}" for alias in node.names] if node.module == "tilewise" else [node.module]
    return found


def room_of(module):
    part = module.removeprefix("tilewise").removeprefix(".").split(".")[0]
    return part if part in LEVEL else "__init__"


FILES = sorted(SOURCE.rglob("*.py"))


def test_every_room_has_a_level():
    rooms = {p.stem if p.parent == SOURCE else p.relative_to(SOURCE).parts[0] for p in FILES}
    assert rooms == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downward(path):
    relative = path.relative_to(SOURCE)
    here = relative.parts[0] if len(relative.parts) > 1 else path.stem
    for module in imports(path):
        if module == "tilewise" or module.startswith("tilewise."):
            there = room_of(module)
            allowed = LEVEL[there] <= LEVEL[here] or (here, there) in EXCEPTIONS
            assert allowed, f"{relative} ({here}) imports {module} ({there}), which is above it"


def test_backends_do_not_know_each_other_or_what_is_above():
    for path in (SOURCE / "backends").rglob("*.py"):
        here = path.relative_to(SOURCE / "backends").parts[0].removesuffix(".py")
        for module in imports(path):
            if module.startswith("tilewise.backends.") and here != "__init__":
                assert module.split(".")[2] in (here, "gpu_math"), f"{path.name} imports {module}"


def test_baselines_are_for_study():
    """They know the vocabulary and the arithmetic of tiles, and only rooms that compare know them."""
    for path in FILES:
        here = path.relative_to(SOURCE).parts[0]
        for module in imports(path):
            if here == "baselines" and module.startswith("tilewise") and not module.startswith("tilewise.baselines"):
                inside = room_of(module) in VOCABULARY or module.startswith("tilewise.backends.gpu_math")
                assert inside, f"{path.name} imports {module}"
            elif module.startswith("tilewise.baselines"):
                assert here in ("baselines", "traffic", "bench", "report"), f"{path.name} imports {module}"


def test_only_torch_below_the_backends():
    allowed = {"torch", "tilewise", "matplotlib", *sys.stdlib_module_names}
    for room in VOCABULARY:
        for path in [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").exists() else (SOURCE / room).glob("*.py"):
            for module in imports(path):
                assert module.split(".")[0] in allowed, f"{path.name} imports {module}"


def test_public_names_exist_and_are_all_there_is():
    for name in tilewise.__all__:
        exported = getattr(tilewise, name)
        assert (exported.__name__ if isinstance(exported, ModuleType) else exported.__module__).startswith("tilewise.")
    assert tilewise.__all__ == sorted(tilewise.__all__, key=lambda name: (not name[0].isupper(), name))


WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys({refused}))  # importing them fails, as if they were not there
import torch, tilewise as tw
q = torch.randn(1, 9, 2, 8, requires_grad=True)
tw.attention(q, q, q, causal=True).sum().backward()
print(tw.explain(q, q, q))
from tilewise.bench import cases, tolerance
assert all(v.ok for v in tolerance.check(cases.draw(cases.CASES[2], torch.float32), 'tiled'))
"""


def run_without(refused, path):
    code = WITHOUT_EXTRAS.replace("{refused}", repr(refused))
    environment = {"PYTHONPATH": str(path), "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_attention_needs_torch_alone():
    refused = {"triton", "typer", "rich", "matplotlib", "hypothesis", "pytest", "click"}
    done = run_without(refused, SOURCE.parent)
    assert done.returncode == 0, done.stderr
    assert "not triton: inputs are on cpu" in done.stdout


def test_wheel_is_small_and_serves_attention(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("tilewise-*.whl")
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {"tilewise/demo/page.html", "tilewise/report/page.html", "tilewise/pages/style.css"} <= names
        assert {f"tilewise/bench/paper/data/flash_{name}.csv" for name in ("attention", "attention_2", "decoding")} <= names
        archive.extractall(tmp_path / "site")
    done = run_without({"triton"}, tmp_path / "site")
    assert done.returncode == 0, done.stderr


def test_words_that_do_not_belong():
    forbidden = ("utils.py", "common.py")
    assert not [p for p in FILES if p.name in forbidden]
