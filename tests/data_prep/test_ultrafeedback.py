"""UltraFeedback's own records to rows."""

import hashlib
import itertools
import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import completion, facts, generated, original, read_lines, released_reward

from data_prep.rows import Row
from data_prep.ultrafeedback import (
    TEST_SHARE,
    build_rows,
    hashed_split,
    original_prompt,
    parse_score,
    read_score,
)

SCORES = st.sampled_from([1, 2.0, 7.5, 10, "8", " 6.5 ", None, "", "N/A", math.nan, math.inf, "nan", True, 10**400])
RESPONSES = st.sampled_from(["a", "b", "c", "d", "", " \n", None, "naïve ☃"])
RECORDS = st.lists(
    st.builds(
        original,
        st.sampled_from(["p1", "p2", "p3", "p4", ""]),
        st.lists(st.tuples(RESPONSES, SCORES), max_size=5),
        st.sampled_from(["sharegpt", "flan_v2_cot", "truthful_qa"]),
    ),
    max_size=8,
)


def build(records: list[dict[str, Any]], truthfulqa: str = "drop") -> tuple[list[Row], dict[str, dict[str, int]]]:
    prompts = [original_prompt(record, f"f:{i}", "overall") for i, record in enumerate(records)]
    return build_rows(prompts, truthfulqa=truthfulqa, repeated="drop")


def content(rows: list[Row]) -> dict[str, Any]:
    """Rows without the order of rows and of responses."""
    return {row.id: (row.prompt, row.source, Counter(zip(row.responses, row.rewards, strict=True))) for row in rows}


@given(RECORDS)
def test_what_leaves_can_be_trained_on(records: list[dict[str, Any]]) -> None:
    """Every row has K >= 2 non-empty responses, as many finite rewards, and an id of its own."""
    rows, _ = build(records)
    for row in rows:
        assert len(row.responses) == len(row.rewards) >= 2
        assert all(text.strip() for text in row.responses)
        assert all(isinstance(reward, float) and math.isfinite(reward) for reward in row.rewards)
    assert len({row.id for row in rows}) == len(rows)


@given(RECORDS, st.sampled_from(["drop", "keep"]))
def test_nothing_is_lost_uncounted(records: list[dict[str, Any]], truthfulqa: str) -> None:
    """Records and responses read are those kept plus those dropped, reason by reason."""
    rows, counts = build(records, truthfulqa)
    for kind, read in (
        ("records", len(records)),
        ("responses", sum(len(record["completions"]) for record in records)),
    ):
        assert counts[kind]["read"] == read
        assert sum(counts[kind].values()) == 2 * read
        assert all(count >= 0 for count in counts[kind].values())
    assert counts["records"].get("kept", 0) == len(rows)
    assert counts["responses"].get("kept", 0) == sum(len(row.responses) for row in rows)


@given(RECORDS, st.randoms())
def test_order_of_the_input_is_the_order_of_the_output(records: list[dict[str, Any]], random: Any) -> None:
    """Permuting records and completions permutes rows and responses, and changes nothing else."""
    rows, counts = build(records)
    shuffled = [{**record, "completions": random.sample(record["completions"], len(record["completions"]))}
                for record in random.sample(records, len(records))]  # fmt: skip
    rows_again, counts_again = build(shuffled)
    assert content(rows) == content(rows_again)
    assert counts == counts_again


def test_reasons() -> None:
    """Each record and each response of a worked example is dropped under its own reason."""
    records = [
        original("kept", [("a", 1), ("b", "7.5"), ("", 3), ("d", "N/A"), ("e", None), (None, 2)]),
        original("one left", [("a", 1), ("b", math.nan)]),
        original("asked by TruthfulQA", [("a", 1), ("b", 2)], "truthful_qa"),
        original("asked by TruthfulQA", [("c", 3), ("d", 4)], "evol_instruct"),
        original(" ", [("a", 1), ("b", 2)]),
        original("twice", [("a", 1), ("b", 2)]),
        original("twice", [("a", 1), ("b", 2)]),
    ]
    rows, counts = build(records)
    assert [(row.prompt[0]["content"], row.responses, row.rewards) for row in rows] == [
        ("kept", ["a", "b"], [1.0, 7.5]),
        ("twice", ["a", "b"], [1.0, 2.0]),
    ]
    assert counts == {
        "records": {
            "read": 7,
            "contaminated": 2,
            "duplicate_prompt": 1,
            "empty_prompt": 1,
            "fewer_than_2_usable_responses": 1,
            "kept": 2,
        },
        "responses": {
            "read": 18,
            "empty_response": 2,
            "in_dropped_record": 9,
            "kept": 4,
            "missing_score": 1,
            "unparsable_score": 2,
        },
    }
    assert len(build(records, "keep")[0]) == 3


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (7, 7.0),
        ("7.5", 7.5),
        (None, "missing_score"),
        ("", "missing_score"),
        ("N/A", "unparsable_score"),
        ("8/10", "unparsable_score"),
        (math.nan, "unparsable_score"),
        (math.inf, "unparsable_score"),
        (True, "unparsable_score"),
        ([7], "unparsable_score"),
    ],
)
def test_parse_score(value: Any, score: float | str) -> None:
    """Numbers and numbers as text are scores; all else has a reason."""
    assert parse_score(value) == score


@pytest.mark.parametrize(
    ("score", "ratings", "overall", "repaired", "fine"),
    [
        (10, "1111", 10.0, 1.0, 1.0),
        (10, "2222", 10.0, 1.0, 2.0),
        (10, "2223", 10.0, "doubtful_10", 2.25),
        (10, "4444", 10.0, "doubtful_10", 4.0),
        (10, "4445", 10.0, 10.0, 4.25),
        (10, ["5", "N/A", "4", "N/A"], 10.0, 10.0, 4.5),
        (10, ["N/A"] * 4, 10.0, "doubtful_10", "missing_score"),
        (9.5, "1111", 9.5, 9.5, 1.0),
        ("N/A", "5555", "unparsable_score", "unparsable_score", 5.0),
    ],
)
def test_choice_of_score(score: Any, ratings: Any, overall: Any, repaired: Any, fine: Any) -> None:
    """The three scores of one completion, at the edges of the rule in OpenBMB/UltraFeedback's README."""
    one = completion("a", score, ratings)
    assert read_score(one, "overall") == overall
    assert read_score(one, "overall-repaired") == repaired
    assert read_score(one, "fine-grained") == fine


def test_ids_are_the_released_prompt_ids() -> None:
    """The id of a row is the SHA-256 of its prompt, as prompt_id in the authors' scripts."""
    (row,), _ = build([original("Why is the sky blue?", [("a", 1), ("b", 2)])])
    assert row.id == hashlib.sha256(b"Why is the sky blue?").hexdigest()


def test_hashed_split() -> None:
    """The split depends on prompt and seed alone and takes the right share (within 5 standard deviations)."""
    prompts = [[{"role": "user", "content": str(i)}] for i in range(20_000)]
    splits = [hashed_split(prompt, 0) for prompt in prompts]
    expected = TEST_SHARE * len(prompts)
    assert abs(splits.count("test") - expected) < 5 * math.sqrt(expected)
    assert [hashed_split(prompt, 1) for prompt in prompts] != splits


def test_more_rows_move_no_prompt(command, write, tmp_path) -> None:
    """A prompt stays in its split, with the same bytes, when records are added around it."""
    records = generated(400, words=3)
    for name, part in (("few", records[100:300]), ("all", records)):
        done = command("data_prep.ultrafeedback", "--input", write(f"{name}.jsonl", part), "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    moved = 0
    for split in ("train", "test"):
        few, everything = ((tmp_path / name / f"{split}.jsonl").read_text() for name in ("few", "all"))
        assert set(few.splitlines()) <= set(everything.splitlines())
        moved += len(few.splitlines())
    assert moved == 200


def test_same_input_same_bytes(command, write, tmp_path) -> None:
    """Two builds, one from JSON lines and one from Parquet, have the same digests of all row files."""
    import pyarrow
    import pyarrow.parquet

    records = generated(150, words=3)
    table = tmp_path / "records.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), table)
    for path, name in ((write("records.jsonl", records), "a"), (table, "b")):
        assert command("data_prep.ultrafeedback", "--input", path, "--out", tmp_path / name).returncode == 0
    for split in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / split).read_bytes() == (tmp_path / "b" / split).read_bytes()


def test_command_is_done_once(command, write, tmp_path) -> None:
    """A second run says that it is up to date; damaged output, another score or another input is built again."""
    path, out = write("records.jsonl", generated(60, words=3)), tmp_path / "out"
    run = ["data_prep.ultrafeedback", "--input", path, "--out", out]
    assert "up to date" not in command(*run).stdout
    good = (out / "train.jsonl").read_bytes()
    assert "up to date" in command(*run).stdout
    (out / "train.jsonl").write_bytes(good[:100])
    assert "up to date" not in command(*run).stdout
    assert (out / "train.jsonl").read_bytes() == good
    assert "up to date" not in command(*run, "--score", "fine-grained").stdout
    write("records.jsonl", generated(61, words=3))
    assert "up to date" not in command(*run, "--score", "fine-grained").stdout


def test_split_like_the_released_set(command, write, tmp_path) -> None:
    """With --split-like every prompt stands in the released split, and prompts outside of it are counted."""
    records = generated(30, words=3)
    scored = {r["instruction"]: [(c["response"], c["overall_score"]) for c in r["completions"]] for r in records}
    split = {"train": list(scored)[:20], "test": list(scored)[20:25]}
    inputs = [
        write(f"{name}_prefs.jsonl", [released_reward(prompt, scored[prompt]) for prompt in prompts])
        for name, prompts in split.items()
    ]
    released, out = tmp_path / "released", tmp_path / "out"
    done = command("data_prep.ultrafeedback", "--released", "reward", "--input", *inputs, "--out", released)
    assert done.returncode == 0, done.stderr
    path = write("records.jsonl", records)
    done = command("data_prep.ultrafeedback", "--input", path, "--out", out, "--split-like", released)
    assert done.returncode == 0, done.stderr
    for name, prompts in split.items():
        rows = read_lines(out / f"{name}.jsonl")
        assert [row["prompt"][0]["content"] for row in rows] == prompts
        for row, theirs in zip(rows, read_lines(released / f"{name}.jsonl"), strict=True):
            assert theirs["rewards"] == sorted(row["rewards"], reverse=True)
            assert sorted(theirs["responses"]) == sorted(row["responses"])
    assert facts(out)["records"] == {"read": 30, "kept": 25, "not_in_the_released_set": 5}


def test_released_sets_keep_what_was_released(command, write, tmp_path) -> None:
    """Ties and repeated prompts of a released set stay; placeholders, empty ones and exact copies go, counted."""
    same = [("a", 3.0), ("b", 3.0), ("c", 1.0), ("d", 1.0)]
    other = [("a", 2.0), ("b", 3.0), ("c", 1.0), ("d", 1.0)]
    records = [
        released_reward("tied", same),
        released_reward("tied", other),
        released_reward("tied", same),
        released_reward("placeholder", [("N/A", 0.0)] * 4),
        released_reward("one empty", [("a", 4.0), ("", 3.0), ("c", 2.0), ("d", 1.0)]),
    ]
    out = tmp_path / "out"
    path = write("train_prefs.jsonl", records)
    done = command("data_prep.ultrafeedback", "--released", "reward", "--input", path, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = read_lines(out / "train.jsonl")
    assert [len(row["responses"]) for row in rows] == [4, 4, 3]
    assert len({row["id"] for row in rows}) == 3
    assert rows[0]["id"].split("-")[0] == rows[1]["id"].split("-")[0] == hashlib.sha256(b"tied").hexdigest()
    assert facts(out)["train"]["records"] == {"read": 5, "duplicate_prompt": 1, "kept": 3, "placeholder": 1}
    assert facts(out)["train"]["responses"] == {"read": 20, "empty_response": 1, "in_dropped_record": 8, "kept": 11}
    assert facts(out)["outputs"]["train.jsonl"]["rows_with_tied_best"] == 1


def test_options_that_do_not_go_together(command, tmp_path) -> None:
    """--released takes neither a score nor a split of its own."""
    for option in (["--score", "fine-grained"], ["--truthfulqa", "keep"], ["--seed", "3"]):
        done = command("data_prep.ultrafeedback", "--released", "reward", "--out", tmp_path / "out", *option)
        assert done.returncode == 2
        assert option[0] in done.stderr


def test_volume(command, write, tmp_path) -> None:
    """6,400 records of realistic length take under a tenth of 2 minutes and well under 4 GB."""
    path, out = write("records.jsonl", generated(6_400, words=200)), tmp_path / "out"
    done = command("data_prep.ultrafeedback", "--input", path, "--out", out)
    assert done.returncode == 0, done.stderr
    circumstances = json.loads((out / "manifest.json").read_text())["circumstances"]
    assert circumstances["cpu_s"] < 12
    assert circumstances["peak_mb"] < 1000
    rows = list(itertools.chain(*(read_lines(out / f"{split}.jsonl") for split in ("train", "test"))))
    assert len(rows) == 6_400
