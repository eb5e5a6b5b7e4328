"""How far two sets of rows agree."""

import dataclasses
import json

from data_prep.compare import compare
from data_prep.rows import Row


def row(prompt: str, scored: dict[str, float], name: str = "") -> Row:
    return Row(name or prompt, [{"role": "user", "content": prompt}], list(scored), list(scored.values()), "test")


def test_a_worked_example(command, write) -> None:
    """All counts of two small sets, worked by hand; printed by the command as JSON."""
    a = [
        row("both", {"w": 4.0, "x": 3.0, "y": 3.0, "z": 1.0}),
        row("equal", {"x": 1.0, "y": 2.0}),
        row("only a", {"x": 1.0, "y": 2.0}),
    ]
    b = [
        row("both", {"z": 2.0, "x": 3.0, "w": 2.5, "v": 9.0}),
        row("equal", {"y": 2.0, "x": 1.0 + 1e-9}),
    ]
    expected = {
        "prompts": {"in_both": 2, "only_in_a": 1, "only_in_b": 0},
        "responses": {"in_both": 5, "only_in_a": 1, "only_in_b": 1},
        "scores": {"different": 2, "equal": 3},
        # "both": w > x becomes w < x; w > z and x > z stay. "equal": one pair.
        "orders": {"reversed": 1, "same": 3},
        "best": {"different_best": 1, "same_best": 1},
    }
    assert compare(a, b) == expected
    paths = [write(f"{name}.jsonl", [dataclasses.asdict(one) for one in rows]) for name, rows in (("a", a), ("b", b))]
    assert json.loads(command("data_prep.compare", *paths).stdout) == expected


def test_ties() -> None:
    """A tie on one side only is neither agreement nor reversal."""
    tied, ordered = [row("p", {"x": 1.0, "y": 1.0})], [row("p", {"x": 1.0, "y": 2.0})]
    assert compare(tied, ordered)["orders"] == {"tied_only_in_a": 1}
    assert compare(ordered, tied)["orders"] == {"tied_only_in_b": 1}
    assert compare(tied, tied)["orders"] == {"tied_in_both": 1}


def test_rows_of_one_prompt_are_taken_together() -> None:
    """Pairs of a prompt, in several rows, compare like the one row they were made from."""
    whole = [row("p", {"x": 3.0, "y": 2.0, "z": 1.0})]
    pairs = [row("p", {"x": 3.0, "y": 2.0}, "1"), row("p", {"x": 3.0, "z": 1.0}, "2")]
    assert compare(whole, pairs) == compare(whole, whole)


def test_a_text_that_stands_twice() -> None:
    """The highest of a text's rewards counts, wherever it stands."""
    single = [row("p", {"x": 3.0, "y": 2.0})]
    for rewards in ([3.0, 1.0, 2.0], [1.0, 3.0, 2.0]):
        double = [Row("p", [{"role": "user", "content": "p"}], ["x", "x", "y"], rewards, "test")]
        assert compare(single, double)["scores"] == {"equal": 2}
