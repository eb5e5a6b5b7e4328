"""The commands on real data: counts that were taken from the files by other means.

The files are public; they are not part of the repository (see `real_data` in conftest.py).
"""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from layouts import facts, original, read_lines, released_pair

from data_prep.rows import read_rows

Records = list[dict[str, Any]]


def math_rm8(read: Callable[[str], Any]) -> Records:
    """60 MATH prompts with 8 solutions and reward-model scores."""
    return [
        original(one["question"], [(text, *score) for text, score in zip(one["code"], one["pred_score"], strict=True)])
        for one in read("k_rewards/math_rm8/rows_000_059.jsonl.gz")
    ]


def wildbench8(read: Callable[[str], Any]) -> Records:
    """150 sessions with 8 responses and scores as text; the source has no prompts, the session stands for it."""
    models = (
        "gemma-2b-it", "gemma-7b-it", "gpt-3.5-turbo-0125", "reka-flash-20240226", "reka-edge", "reka-core-20240501",
        "Phi-3-mini-128k-instruct", "Qwen1.5-72B-Chat-greedy",
    )  # fmt: skip
    sessions = defaultdict(list)
    for model in models:
        for one in read(f"k_rewards/wildbench_score8/{model}.jsonl.gz"):
            sessions[one["session_id"]].append((one["model_output"], one["score"]))
    return [original(session, scored) for session, scored in sessions.items()]


def mt_bench6(read: Callable[[str], Any]) -> Records:
    """80 first turns with the answers of 6 models, scored 1 to 10."""
    folder = "mt_bench/run_mamba_zephyr"
    scores = {
        (one["model"], one["question_id"]): one["score"]
        for one in read(f"{folder}/model_judgment/gpt-4_single.jsonl.gz")
        if one["turn"] == 1
    }
    answers = defaultdict(list)
    for model in sorted({model for model, _ in scores}):
        for one in read(f"{folder}/model_answer/{model}.jsonl.gz"):
            text = one["choices"][0]["turns"][0]
            answers[one["question_id"]].append((text, scores[model, one["question_id"]]))
    return [original(q["turns"][0], answers[q["question_id"]]) for q in read("mt_bench/question.jsonl")]


def vicuna5(read: Callable[[str], Any]) -> Records:
    """80 questions with 5 answers; each review scores one model's answer beside that of vicuna-13b."""
    folder = "k_rewards/vicuna_gpt4_reviews"
    questions = read(f"{folder}/question.jsonl")
    scored = defaultdict(list)
    for model in ("alpaca-13b", "bard", "gpt35", "llama-13b"):
        reviews = {r["question_id"]: r for r in read(f"{folder}/review/review_{model}_vicuna-13b.jsonl")}
        for one in read(f"{folder}/answer/answer_{model}.jsonl"):
            scored[one["question_id"]].append((one["text"], reviews[one["question_id"]]["score"][0]))
    for one in read(f"{folder}/answer/answer_vicuna-13b.jsonl"):  # with its score in the last of the files
        scored[one["question_id"]].append((one["text"], reviews[one["question_id"]]["score"][1]))
    return [original(q["text"], scored[q["question_id"]]) for q in questions]


def magpie5(read: Callable[[str], Any]) -> Records:
    """5 prompts with 5 responses and ArmoRM scores."""
    return [
        original(
            one["instruction"],
            list(zip(one["responses"], [r["score"] for r in one["rewards_armorm"]], strict=True)),
        )
        for one in read("k_rewards/magpie_armorm5.json")
    ]


SETS = {
    math_rm8: (60, 8),
    wildbench8: (150, 8),
    mt_bench6: (80, 6),
    vicuna5: (80, 5),
    magpie5: (5, 5),
}


def ultrafeedback_pairs(read: Callable[[str], Any]) -> Records:
    """1,000 real UltraFeedback pairs, in the layout of the released preference set."""
    return [
        released_pair(
            one["prompt"],
            (one["chosen"], one["metadata"]["score_chosen"]),
            (one["rejected"], one["metadata"]["score_rejected"]),
        )
        for one in read("ultrafeedback_binarized_sample/train_clean.jsonl.gz")
    ]


def multi_turn_pairs(read: Callable[[str], Any]) -> Records:
    """200 real multi-turn pairs without scores, in the layout of UltraInteract."""
    return [
        {
            "task": "chat",
            "trajectory": one["conversations"],
            "chosen": one["chosen"]["value"],
            "rejected": one["rejected"]["value"],
        }
        for one in read("preference_pairs/dpo_en_demo_000_199.json.gz")
    ]


@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
def test_sets_of_k_responses(make, real_data, command, write, tmp_path) -> None:
    """Real sets with K = 8, 6 and 5: each response is a row's or counted, with the source's scores in its order."""
    prompts, size = SETS[make]
    records, out = make(real_data), tmp_path / "out"
    assert len(records) == prompts
    done = command("data_prep.ultrafeedback", "--input", write("records.jsonl", records), "--out", out)
    assert done.returncode == 0, done.stderr
    files = [path for path in (out / "train.jsonl", out / "test.jsonl") if path.exists()]
    rows = {row["prompt"][0]["content"]: row for path in files for row in read_lines(path)}
    assert len(rows) == facts(out)["records"]["kept"]
    lost = 0
    for record in records:
        usable = [(c["response"], float(c["overall_score"])) for c in record["completions"] if c["response"].strip()]
        lost += size - len(usable)
        row = rows[record["instruction"]]
        assert list(zip(row["responses"], row["rewards"], strict=True)) == usable
    assert facts(out)["responses"].get("empty_response", 0) == lost
    assert facts(out)["responses"]["read"] == prompts * size

    for path in files:
        paired = tmp_path / f"pairs-{path.stem}"
        command("data_prep.pairs", path, "--out", paired, "--strategy", "all-pairs")
        strict = sum(
            a[1] != b[1] and a[0] != b[0]
            for row in read_lines(path)
            for a, b in itertools.combinations(zip(row["responses"], row["rewards"], strict=True), 2)
        )
        assert len(read_lines(paired / "rows.jsonl")) == strict > 0


def test_real_ultrafeedback_pairs(real_data, command, write, tmp_path) -> None:
    """Of 1,000 real pairs 2 have an empty side, 4 two equal texts and 111 two equal scores; each is counted."""
    path = write("train_prefs.jsonl", ultrafeedback_pairs(real_data))
    out, paired = tmp_path / "out", tmp_path / "pairs"
    done = command("data_prep.ultrafeedback", "--released", "preference", "--input", path, "--out", out)
    assert done.returncode == 0, done.stderr
    assert facts(out)["train"] == {
        "records": {"read": 1000, "fewer_than_2_usable_responses": 2, "kept": 998},
        "responses": {"read": 2000, "empty_response": 2, "in_dropped_record": 2, "kept": 1996},
    }
    assert facts(out)["outputs"]["train.jsonl"]["rows_with_tied_best"] == 111
    assert facts(out)["outputs"]["train.jsonl"]["rows_with_identical_responses"] == 4
    done = command("data_prep.pairs", out / "train.jsonl", "--out", paired, "--strategy", "best-vs-random")
    assert done.returncode == 0, done.stderr
    # One of the four equal texts has equal scores too: it is among the ties.
    assert facts(paired)["rows_dropped"] == {"all_tied": 111, "identical": 3}
    assert len(read_lines(paired / "rows.jsonl")) == 1000 - 2 - 111 - 3


def test_real_multi_turn_pairs(real_data, command, write, tmp_path) -> None:
    """Of 200 real multi-turn pairs two stand there twice; all turns of the others survive in their order."""
    records, out = multi_turn_pairs(real_data), tmp_path / "out"
    done = command("data_prep.ultrainteract", "--input", write("pairs.jsonl", records), "--out", out)
    assert done.returncode == 0, done.stderr
    assert facts(out)["records"] == {"read": 200, "duplicate": 2, "kept": 198}
    turns = Counter(sum(turn["from"] == "human" for turn in record["trajectory"]) for record in records)
    assert max(turns) > 3
    rows = read_lines(out / "rows.jsonl")
    texts = [[turn["value"] for turn in record["trajectory"]] for record in records]
    for row in rows:
        assert [message["content"] for message in row["prompt"]] in texts
    assert {row["prompt"][0]["role"] for row in rows} == {"system", "user"}


def test_published_example(real_data, command, write, tmp_path) -> None:
    """The record in UltraFeedback's README has one of four completions and no overall score: dropped, counted.

    With its four responses, which the README prints as text, and ratings for the other three it is a row, and its
    first reward is the mean of the printed ratings 2, 3, 3, 3.
    """
    record, out = real_data("ultrafeedback_schema_example/readme_example.json"), tmp_path / "out"
    done = command("data_prep.ultrafeedback", "--input", write("one.jsonl", [record]), "--out", out)
    assert done.returncode == 2
    assert '"missing_score": 1' in done.stderr
    readme = real_data("ultrafeedback_schema_example/readme_sections.txt")
    texts = re.findall(r"^> \*\*Assisstant \d \(.*?\):\*\* (.*)$", readme, re.MULTILINE)
    assert len(texts) == 4
    assert texts[0][:200] == record["completions"][0]["response"][:200]
    others = [
        {"response": text, "annotations": {"honesty": {"Rating": rating}}}
        for text, rating in zip(texts[1:], ["5", "4", "N/A"], strict=True)
    ]
    path = write("four.jsonl", [{**record, "completions": record["completions"] + others}])
    done = command("data_prep.ultrafeedback", "--input", path, "--out", out, "--score", "fine-grained")
    assert done.returncode == 0, done.stderr
    (row,) = read_lines(next(out.glob("t*.jsonl")))
    assert row["rewards"] == [2.75, 5.0, 4.0]
    assert facts(out)["responses"]["missing_score"] == 1


def test_rows_of_each_real_set_train(real_data, command, write, tmp_path) -> None:
    """A tiny model takes NCA steps on rows from each real set, K from 2 to 8, with finite log-probs throughout."""
    models = pytest.importorskip("train.engine.models", exc_type=ImportError)
    rows = []
    for make in (*SETS, ultrafeedback_pairs, multi_turn_pairs):
        path, out = write("train.jsonl", make(real_data)), tmp_path / make.__name__
        if make is multi_turn_pairs:
            done = command("data_prep.ultrainteract", "--input", path, "--out", out)
        else:
            released = ["--released", "preference"] if make is ultrafeedback_pairs else []
            done = command("data_prep.ultrafeedback", *released, "--input", path, "--out", out)
        assert done.returncode == 0, done.stderr
        built = read_rows(next(path for path in out.glob("*.jsonl") if path.stem != "test"))
        shortest = sorted(built, key=lambda row: sum(map(len, row.responses)) + len(str(row.prompt)))[:2]
        rows += [dataclasses.asdict(row) for row in shortest]
    assert {len(row["responses"]) for row in rows} >= {2, 5, 6, 8}

    tokenizer = models.new_tokenizer((text for row in rows for text in row["responses"]), 400)
    policy = models.new_mistral(
        tokenizer, hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=32, positions=8192, seed=0
    )
    policy.save_pretrained(tmp_path / "mu")
    tokenizer.save_pretrained(tmp_path / "mu")
    path, run = write("all.jsonl", rows), tmp_path / "run"
    done = command(
        "train.nca", "--recipe", "train/recipes/tiny/hard.yaml", "--model", tmp_path / "mu", "--rows", path,
        "--eval-rows", path, "--out", run, "--epochs", 1, "--global-batch", 7, "--micro-batch", 1,
        "--max-prompt-tokens", 4096, "--max-response-tokens", 64, "--evaluate-every", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trend = [json.loads(line) for line in (run / "trend.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in trend) == len(rows) // 7
    numbers = [value for record in trend for value in _numbers(record)]
    assert numbers
    assert all(map(math.isfinite, numbers))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [n for v in (value.values() if isinstance(value, dict) else value) for n in _numbers(v)]
    return [value] if isinstance(value, int | float) else []
