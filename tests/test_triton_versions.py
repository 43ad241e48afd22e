"""GPU kernels compile with every Triton from the oldest to the newest that they are written for."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow           # each is downloaded, some 250 MB

SOURCE = Path(__file__).parents[1] / "src"
ONLY = {"hopper": "hopper", "triton": "d128 16 plain"}


@pytest.fixture(scope="module", params=["3.7.1", "3.8.0", "3.9.0"])
def installed(request, tmp_path_factory):
    """A folder with one version of Triton."""
    folder = tmp_path_factory.mktemp("triton")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"triton=={request.param}"],
                   check=True)
    return folder


@pytest.mark.parametrize("backend", ONLY)
def test_kernels_compile(installed, backend, tmp_path):
    store = tmp_path / "gates.json"
    program = "from tilewise.cli import app; app()"
    arguments = "inspect", "--update", "--arch", "sm_90", "--filter", ONLY[backend], "--store", store
    settings = dict(PYTHONPATH=f"{installed}{os.pathsep}{SOURCE}", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, env=os.environ | settings)
    rows = json.loads(store.read_text())
    assert len(rows) > 4
    # all other gates hold; how registers are assigned and instructions ordered is judged with the version of results/gates.json
    failed = {name: row["failures"] for name, row in rows.items()
              if not all("spills" in text or "overlap with wgmma" in text for text in row["failures"])}
    assert not failed
