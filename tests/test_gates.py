"""Every shipped kernel configuration has passed the gates with its present sources (results/gates.json)."""
from pathlib import Path

import pytest
from support.backends import INTERPRETING

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("the interpreter cannot compile", allow_module_level=True)

import triton

from tilewise.backends.triton import configs
from tilewise.backends.triton.aot import OF_DIRECTIONS, example, shipped
from tilewise.inspect import build, examine, failing, failures, missing
from tilewise.inspect import shipped as shipped_by_all
from tilewise.problem import MAX_HEAD_DIM

STORE = Path(__file__).parents[1] / "results" / "gates.json"
JUDGED_WITH = "3.6.0"


@pytest.mark.skipif(triton.__version__ != JUDGED_WITH, reason=f"results/gates.json is of triton {JUDGED_WITH}")
def test_every_shipped_configuration_is_judged_and_passes():
    cases = list(shipped_by_all())
    assert missing(cases, STORE) == [], "run make gates"
    assert failing(cases, STORE) == {}


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_a_forward_and_a_backward_compile_now(arch):
    """The stored rows are not taken on trust: a few are compiled again here."""
    chosen = [c for c in shipped() if c.arch == arch and c.name.endswith("d128 16 plain") and c.direction != "tangent"]
    assert {"forward", "backward"} <= {c.direction for c in chosen}
    for case in chosen:
        assert failures(examine(build(case), case), case) == []


def test_the_common_head_dims_are_shipped_everywhere():
    rows = configs.table()
    for arch in configs.ARCHITECTURES:
        for head_dim in (64, 128):
            for kernel in ("forward", "preprocess", "key_gradients", "query_gradients"):
                assert configs.Key(kernel, "16", arch, head_dim, "plain") in rows
                assert configs.Key(kernel, "16", arch, head_dim, "rich") in rows


def test_the_docs_say_what_is_shipped():
    docs = (STORE.parents[1] / "docs" / "kernels.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in docs.splitlines() if line.startswith("|")]
    said = {row[0]: row[1:] for row in rows if row[0].split(" ")[0] in configs.WIDTHS}
    assert len(said) == 12
    for inputs, limits in said.items():
        width, features, *cache = inputs.split(" ")
        for arch, limit in zip(configs.ARCHITECTURES, limits, strict=True):
            shipped_dims = [d for d in configs.HEAD_DIMS if (cache or d <= MAX_HEAD_DIM) and all(
                configs.missing(example(width, d, features, variant)[0], arch) is None
                for variant in (("decode pages", "prefill pages") if cache else ("",)))]
            assert max(shipped_dims, default="none") == (int(limit) if limit.isdigit() else limit), (inputs, arch)


def test_the_docs_say_which_derivatives_are_shipped():
    docs = (STORE.parents[1] / "docs" / "derivatives.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in docs.splitlines() if line.startswith("|")]
    said = {row[0]: row[1:] for row in rows if row[0].split(" ")[0] in configs.WIDTHS}
    assert set(said) == {f"{width} {features}" for width in ("16", "ieee") for features in ("plain", "rich")}
    for inputs, limits in said.items():
        width, features = inputs.split(" ")
        for arch, limit in zip(configs.ARCHITECTURES, limits, strict=True):
            shipped_dims = [d for d in configs.HEAD_DIMS if d <= MAX_HEAD_DIM and all(
                configs.missing_tangents(example(width, d, of, OF_DIRECTIONS[of])[0], arch) is None
                for of in ((features, "listed") if features == "plain" else (features,)))]
            assert max(shipped_dims) == int(limit), (inputs, arch)


def test_tiles_carry_dropout_bits():
    assert all(config.BLOCK_N % 32 == 0 for key, config in configs.table().items() if key.kernel != "preprocess")
