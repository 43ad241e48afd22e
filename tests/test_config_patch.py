"""Rows that measured best, as a patch."""
import subprocess

import pytest

from tilewise.backends.hopper import configs as hopper
from tilewise.backends.triton import configs as triton
from tilewise.bench import config_patch

TABLES = [hopper.TABLE, triton.TABLE]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.parent.name)
def test_git_applies_it(table, tmp_path):
    rows = table.read_text().splitlines()
    better = ["\t".join([*rows[n].split("\t")[:-1], "7"]) for n in (1, len(rows) // 2, len(rows) - 1)]
    copy = tmp_path / table.relative_to(config_patch.ROOT)
    copy.parent.mkdir(parents=True)
    copy.write_text(table.read_text())
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply"], input=config_patch.patch(table, better), cwd=tmp_path, check=True, text=True)
    found = copy.read_text().splitlines()
    assert len(found) == len(rows)
    assert [new for old, new in zip(rows, found, strict=True) if old != new] == better


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.parent.name)
def test_the_tables_own_rows_change_nothing(table):
    assert config_patch.patch(table, table.read_text().splitlines()[1:5]) == ""


@pytest.mark.parametrize("row", ["forward\t64\t64\tplain\t128", "sideways\t64\t64\tplain" + "\t1" * 8, ""])
def test_what_has_no_place_is_refused(row):
    with pytest.raises(ValueError, match="expected a row with the columns"):
        config_patch.patch(TABLES[0], [row])


def test_rows_of_tunings():
    """The fastest over all shapes, as rows of the table that the tuned kernel belongs to."""
    def result(benchmark, part, seconds):
        rows = [{"part": part, "setting": {"head_dim": 64},
                 "contenders": {name: {"state": "timed", "seconds": of[i]} for i, name in enumerate(("(1, 2)", "(3, 4)"))}}
                for of in seconds]
        return {"benchmark": benchmark, "rows": [*rows, {**rows[0], "part": "speed"}]}

    times = [(1.0, 3.0), (1.0, 0.2)]
    assert config_patch.chosen(result("tuning", "forward", times), "sm_90") == (
        triton.TABLE, ["forward\t16\tsm_90\t64\tplain\t3\t4"])
    assert config_patch.chosen(result("hopper tuning", "dq dk", times), "sm_90") == (
        hopper.TABLE, ["dq dk\t64\t64\tplain\t3\t4"])
    assert config_patch.chosen(result("hopper decoding", "variants", times), "sm_90")[1] == ["decode\t64\t64\tplain\t3\t4"]
