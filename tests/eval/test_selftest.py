"""eval.selftest: every scorer is there, all checks pass, and a wrong scorer is found out."""

import pytest

from eval import selftest
from eval.checks import Check
from eval.tasks import docs, scoring


@pytest.mark.parametrize(("expected", "found", "passed"), [(100, 100.0, True), (0, 0.0, True), (100, 99.9, False)])
def test_check(expected, found, passed) -> None:
    """A check passes if the scorer gave what is known."""
    assert Check("c", expected, found).passed is passed


def test_all_scorers_are_checked(run) -> None:
    """Right answers 100, wrong and empty ones 0, by each metric of each benchmark; exit code 0."""
    done = run(selftest.main)
    assert done.code == 0, done.out
    checked = {tuple(line.split(": ")[0].split(", ")) for line in done.out.split("\n") if ": right answers" in line}
    metrics = {
        "gsm8k": ("strict-match", "flexible-extract"), "math": ("exact_match", "boxed", "math_verify"),
        "theoremqa": ("boxed", "answer"), "bbh": ("substring", "exact_match"),
        **dict.fromkeys(("gsm_plus", "svamp", "asdiv"), ("boxed", "math_verify")),
    }  # fmt: skip
    assert checked == {(task, metric) for task, names in metrics.items() for metric in names}
    assert set(metrics) == set(docs.TASKS) - {"arithmetic"}  # that is GSM8K's scorer


def test_a_wrong_scorer_fails(run, monkeypatch) -> None:
    """A scorer that takes every answer for right is found out: exit code 1, and the check is named."""
    monkeypatch.setattr(scoring, "equivalent", lambda found, gold: True)
    monkeypatch.setattr(selftest, "QUESTIONS", {"svamp": selftest.QUESTIONS["svamp"]})
    monkeypatch.setattr(selftest, "ELSEWHERE", ("eval.no_such_module",))
    done = run(selftest.main)
    assert done.code == 1
    failed = [line for line in done.out.split("\n") if line.endswith("FAILED")]
    assert [line.split("  ")[0] for line in failed] == ["svamp, boxed: wrong answers", "svamp, boxed: empty answers"]
    assert "eval.no_such_module" in done.out
    assert "not checked" in done.out
