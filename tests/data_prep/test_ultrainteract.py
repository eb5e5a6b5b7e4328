"""UltraInteract pairs to rows."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from layouts import facts, read_lines

from data_prep.ultrainteract import build_rows


def record(trajectory: list[tuple[str, str]], chosen: Any, rejected: Any, task: str = "Coding") -> dict[str, Any]:
    return {
        "task": task,
        "dataset": "some",
        "trajectory": [{"from": role, "value": text} for role, text in trajectory],
        "chosen": chosen,
        "rejected": rejected,
        "id": "7",
        "parent_id": "3",
    }


TWO_TURNS = [("user", "Add 2 and 2."), ("assistant", "Step 1: 5"), ("user", "Observation: wrong")]
TEXTS = st.sampled_from(["a", "b", "", " ", "naïve"])
RECORDS = st.lists(
    st.builds(
        record,
        st.sampled_from([[("user", "q")], TWO_TURNS, TWO_TURNS[:2], [("human", "q")], []]),
        TEXTS,
        TEXTS,
        st.sampled_from(["Coding", "Logic"]),
    ),
    max_size=8,
)


def test_boundaries(command, write, tmp_path) -> None:
    """The prompt is the trajectory turn by turn, the answers follow it, and the task is the source."""
    path, out = write("pairs.jsonl", [record(TWO_TURNS, "Step 1: 4", "Step 1: 6", "Math_CoT")]), tmp_path / "out"
    done = command("data_prep.ultrainteract", "--input", path, "--out", out)
    assert done.returncode == 0, done.stderr
    (row,) = read_lines(out / "rows.jsonl")
    assert row["prompt"] == [
        {"role": "user", "content": "Add 2 and 2."},
        {"role": "assistant", "content": "Step 1: 5"},
        {"role": "user", "content": "Observation: wrong"},
    ]
    assert (row["responses"], row["rewards"], row["source"]) == (["Step 1: 4", "Step 1: 6"], [1, 0], "Math_CoT")
    assert facts(out)["rows_by_user_turns"] == {"2": 1}
    assert "up to date" in command("data_prep.ultrainteract", "--input", path, "--out", out).stdout


def test_reasons() -> None:
    """Each dropped record of a worked example is counted under its own reason."""
    question = [("user", "q")]
    records = [
        record(question, "a", "b"),
        record([("human", "q")], "a", "b"),
        record(question, "a", "a"),
        record(question, "a", " "),
        record([], "a", "b"),
        record([*question, ("gpt", "so")], "a", "b"),
    ]
    rows, counted = build_rows((f"f:{i}", one) for i, one in enumerate(records))
    assert len(rows) == 1
    assert counted["records"] == {
        "read": 6,
        "duplicate": 1,
        "empty_response": 1,
        "empty_trajectory": 1,
        "identical_responses": 1,
        "kept": 1,
        "nothing_to_answer": 1,
    }


@given(RECORDS, st.integers(0, 1000))
def test_counts_and_order(records: list[dict[str, Any]], seed: int) -> None:
    """Nothing is lost uncounted, ids are unique, and permuted records give the same rows."""
    rows, counted = build_rows(("f", one) for one in records)
    assert counted["records"]["read"] == len(records)
    assert sum(counted["records"].values()) == 2 * len(records)
    assert counted["records"].get("kept", 0) == len(rows) == len({row.id for row in rows})
    shuffled = random.Random(seed).sample(records, len(records))
    again, counted_again = build_rows(("f", one) for one in shuffled)
    assert {row.id: row for row in again} == {row.id: row for row in rows}
    assert counted_again == counted
