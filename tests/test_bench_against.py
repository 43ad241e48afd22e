"""Comparing two results: noise is not a change, a change is not noise, and what fails fails."""
import copy
import math

import pytest

from tilewise.bench import against

MACHINE = {"CPU": "abacus, 2 cores", "GPU": "none", "torch": "2.13", "CPU kernels": "3 compiled"}


def timed(seconds, spread=0.02, rounds=9):
    return dict(state="timed", reason="", seconds=seconds, quartiles=[seconds * (1 - spread), seconds * (1 + spread)],
                rounds=rounds)


def row(case, setting=None, **contenders):
    return dict(part="a", case=case, setting=setting or {"seqlen": 64}, contenders=contenders, times_faster={})


def result(*rows, complete=True, machine=MACHINE, commit="abc", device="cpu"):
    return dict(benchmark="attention", device=device, quick=False, complete=complete, machine=machine, commit=commit,
                rows=list(rows), lines=[])


def verdict(old, new):
    (change,) = against.compare(result(row("a", ours=old)), result(row("a", ours=new)))
    return change.verdict


def test_a_result_is_the_same_as_itself():
    one = result(row("a", ours=timed(1.0), other=timed(2.0)), row("b", ours=timed(3.0)))
    changes = against.compare(one, copy.deepcopy(one))
    assert [(change.verdict, change.ratio) for change in changes] == [("same", 1.0)] * 3
    assert against.failures(changes, tolerance=0) == []


@pytest.mark.parametrize("old, new, expected", [
    (timed(1.0), timed(1.03), "same"), (timed(1.0), timed(0.97), "same"),   # the spreads overlap
    (timed(1.0), timed(1.30), "slower"), (timed(1.0), timed(0.70), "faster"),
    (timed(1.0), timed(1.30, spread=0.4), "same"),                          # noise as large as the change
    (timed(1.0, spread=0.4), timed(1.30), "same"),                          # likewise when it was in the old one
    (timed(1.0, spread=0.9, rounds=3), timed(1.0, spread=0.9, rounds=3), "same"),   # a notch that reaches below 0
    (timed(1.0), timed(1.30, rounds=2), "same"),                            # nothing is known of its noise
    (timed(1.0), timed(1.05, rounds=100), "slower"), (timed(1.0), timed(1.05, rounds=3), "same"),
])
def test_only_what_lies_beyond_the_spread_of_both_is_a_change(old, new, expected):
    assert verdict(old, new) == expected


def test_few_rounds_widen_the_interval():
    def width(rounds):
        old, new = (result(row("a", ours=timed(x, rounds=rounds))) for x in (1.0, 1.1))
        (change,) = against.compare(old, new)
        assert change.interval[0] < change.ratio < change.interval[1]
        return change.interval[1] - change.interval[0]
    assert width(2) == math.inf
    assert width(3) > width(5) > width(100) == pytest.approx(width(1000))


def test_tolerance_is_beyond_the_spread():
    changes = against.compare(result(row("a", ours=timed(1.0))), result(row("a", ours=timed(1.1))))
    assert [change.verdict for change in changes] == ["slower"]             # by 1.078 / 1.022 = 1.06 at least
    assert against.failures(changes, tolerance=0.05) == changes
    assert against.failures(changes, tolerance=0.10) == []


@pytest.mark.parametrize("old, new, expected, fails", [
    (timed(1.0), dict(state="wrong", reason="dq: 3 > 1"), "no longer right", True),
    (timed(1.0), dict(state="refused", reason="head dims over 256"), "refused", True),
    (timed(1.0), dict(state="absent", reason="not installed"), "gone", False),
    (dict(state="refused", reason=""), timed(1.0), "new", False),
    (dict(state="wrong", reason=""), timed(1.0), "new", False),
])
def test_what_is_no_longer_timed(old, new, expected, fails):
    changes = against.compare(result(row("a", ours=old)), result(row("a", ours=new)))
    assert [change.verdict for change in changes] == [expected]
    assert bool(against.failures(changes)) == fails


def test_what_was_never_timed_is_no_change():
    refused = dict(state="refused", reason="")
    assert against.compare(result(row("a", ours=refused)), result(row("a", ours=refused))) == []


def test_rows_come_and_go():
    old = result(row("a", ours=timed(1.0)), row("b", ours=timed(1.0)))
    new = result(row("b", ours=timed(1.0)), row("c", ours=timed(1.0)))
    assert [(change.case, change.verdict) for change in against.compare(old, new)] == [
        ("a", "gone"), ("b", "same"), ("c", "new")]
    unfinished = dict(new, complete=False)
    assert [change.case for change in against.compare(old, unfinished)] == ["b", "c"]
    assert "not complete: 1 earlier cases are not measured yet" in against.lines(old, unfinished)


def test_a_case_with_another_setting_is_another_case():
    old, new = (result(row("a", {"seqlen": n}, ours=timed(n))) for n in (64, 128))
    changes = against.compare(old, new)
    assert [change.verdict for change in changes] == ["gone", "new"]


def test_counts_are_exact():
    def counted(n, unit="count"):
        return result(row("a", ours={"state": "timed", "reason": "", unit: n}))
    (change,) = against.compare(counted(1000), counted(1001))
    assert (change.verdict, change.unit, change.interval) == ("slower", "count", (1.001, 1.001))
    assert against.failures([change], tolerance=0) == [change]
    assert [c.verdict for c in against.compare(counted(0, "bytes"), counted(0, "bytes"))] == ["same"]
    assert [c.verdict for c in against.compare(counted(0, "bytes"), counted(8, "bytes"))] == ["slower"]


def test_other_hardware_is_refused_unless_asked_for():
    old, new = result(row("a", ours=timed(1.0))), result(row("a", ours=timed(2.0)), machine=MACHINE | {"GPU": "T4"})
    with pytest.raises(ValueError, match=r"this hardware, got another \(GPU: none, now T4"):
        against.compare(old, new)
    assert against.lines(old, new, anyway=True)[0] == "GPU: none, now T4"
    for other in (dict(device="cuda"), dict(benchmark="decode"), dict(quick=True)):
        with pytest.raises(ValueError, match=f"the same {next(iter(other))}"):
            against.compare(old, old | other, anyway=True)


def test_the_table_says_what_differs_and_puts_the_worst_first():
    old = result(*(row(name, ours=timed(1e-3)) for name in "abcd"))
    new = result(row("a", ours=timed(1e-3)), row("b", ours=timed(2e-3)), row("c", ours=timed(5e-3)),
                 row("d", ours=dict(state="wrong", reason="dq")), machine=MACHINE | {"torch": "2.14", "CPU kernels": "9"},
                 commit="def")
    lines = against.lines(old, new)
    assert lines[:2] == ["torch: 2.13, now 2.14", "commit: abc, now def"]
    assert [line[0] for line in lines[3:7]] == ["d", "c", "b", "a"]
    assert "no longer right (fails): dq" in lines[3]
    assert "1 ms" in lines[4]
    assert "5 ms" in lines[4]
    assert lines[-2:] == ["1 no longer right, 2 slower, 1 same", "3 fail"]
    assert against.lines(old, old)[-1].startswith("none fails")
