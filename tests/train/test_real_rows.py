"""Training on real text with real scalar rewards, through the command line.

Real files are found and read as in tests/data_prep, where it is tested how they become rows.
"""

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.rows import Row, read_rows
from train.engine.models import new_mistral, new_tokenizer

BESIDE = Path(__file__).resolve().parents[1] / "data_prep"
RECIPE = "train/recipes/tiny/hard.yaml"
PROMPT, RESPONSE = 700, 40  # limits in tokens; a byte-level tokenizer makes many of them


def beside(name: str) -> Any:
    """A module of tests/data_prep. Its own helpers are imported by bare names."""
    sys.path.insert(0, str(BESIDE))
    try:
        spec = importlib.util.spec_from_file_location(f"data_prep_{name}", BESIDE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BESIDE))
    return module


shared, real_sets = beside("conftest"), beside("test_real_sets")
command, real_data, write = shared.command, shared.real_data, shared.write  # fixtures


@pytest.fixture
def rows_of(real_data, command, write, tmp_path) -> Callable[..., list[Row]]:
    """Build rows from records with data_prep.ultrafeedback and return the shortest ones."""

    def build(records: list[dict[str, Any]], count: int, *options: str) -> list[Row]:
        out = tmp_path / "built"
        done = command("data_prep.ultrafeedback", *options, "--input", write("train.jsonl", records), "--out", out)
        assert done.returncode == 0, done.stderr
        rows = read_rows(next(path for path in sorted(out.glob("t*.jsonl"), reverse=True)))
        short = [row for row in rows if len(str(row.prompt).encode()) < PROMPT - 100]
        return sorted(short, key=lambda row: (sum(map(len, row.responses)), row.id))[:count]

    return build


@pytest.fixture
def train(command, tmp_path) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Train a tiny model with random weights on rows; return the trend and the manifest's facts."""

    def run(method: str, rows: list[Row], steps: int, batch: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        path, mu, out = tmp_path / "rows.jsonl", tmp_path / "mu", tmp_path / "run"
        path.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")
        tokenizer = new_tokenizer((text for row in rows for text in row.responses), 400)
        model = new_mistral(
            tokenizer, hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=32, positions=2048, seed=0
        )
        model.save_pretrained(mu)
        tokenizer.save_pretrained(mu)
        assert len(rows) // batch == steps
        done = command(
            f"train.{method}", "--recipe", RECIPE, "--model", mu, "--rows", path, "--eval-rows", path, "--out", out,
            "--epochs", 1, "--global-batch", batch, "--micro-batch", batch // 2, "--max-prompt-tokens", PROMPT,
            "--max-response-tokens", RESPONSE, "--evaluate-every", 1, "--learning-rate", 0.01, "--warmup-ratio", 0,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        trend = [json.loads(line) for line in (out / "trend.jsonl").read_text().splitlines()]
        facts = json.loads((out / "manifest.json").read_text())["identity"]["facts"]
        assert facts["work"]["steps"] == steps
        assert facts["work"]["responses_seen"] == sum(len(row.responses) for row in rows)
        cut = sum(len(tokenizer(text).input_ids) + 1 > RESPONSE for row in rows for text in row.responses)
        assert facts["rows"]["responses_cut"] == cut > 0
        return [record for record in trend if record["split"] == "heldout"], facts

    return run


def check_trend(trend: list[dict[str, Any]], rows: list[Row], steps: int) -> None:
    """One record for each step, all numbers finite; each rank holds the rewards that the rows have at it; pi = mu at
    the start and no longer at the end, and training draws chosen and rejected apart."""
    assert [record["step"] for record in trend] == list(range(steps + 1))
    assert all(map(math.isfinite, itertools.chain.from_iterable(map(real_sets._numbers, trend))))
    ordered = [sorted(row.rewards, reverse=True) for row in rows if len(set(row.rewards)) > 1]
    K = max(map(len, ordered))
    for record in trend:
        assert (record["prompts"], record["excluded"]) == (len(ordered), len(rows) - len(ordered))
        assert [rank["rank"] for rank in record["ranks"]] == list(range(1, K + 1))
        for i, rank in enumerate(record["ranks"]):
            found = [rewards[i] for rewards in ordered if len(rewards) > i]
            assert rank["n"] == len(found)
            assert rank["reward"] == pytest.approx(sum(found) / len(found), rel=1e-9)
        assert record["chosen"]["reward"] == pytest.approx(record["ranks"][0]["reward"])
        worse = [[value for value in rewards if value < rewards[0]] for rewards in ordered]
        mean = sum(sum(values) / len(values) for values in worse) / len(worse)
        assert record["rejected"]["reward"] == pytest.approx(mean, rel=1e-9)
    assert max(abs(rank["log_ratio"]) for rank in trend[0]["ranks"]) < 1e-3
    assert trend[0]["accuracy"] == pytest.approx(0.5, abs=1e-9)
    assert abs(trend[-1]["chosen"]["log_ratio"]) > 1e-3
    assert trend[-1]["margin"] > trend[0]["margin"] + 1e-3
    assert trend[-1]["accuracy"] > 0.5


def test_nca_on_eight_scored_solutions(real_data, rows_of, train) -> None:
    """NCA on MATH prompts with K = 8 solutions and a reward model's scores, and on the K = 3 row that the example in
    UltraFeedback's README gives: ragged K, eight ranks."""
    rows = rows_of(real_sets.math_rm8(real_data), 11)
    assert {len(row.responses) for row in rows} == {8}
    example = real_data("ultrafeedback_schema_example/readme_example.json")
    completion = example["completions"][0]
    texts = [completion["response"][:n] for n in (200, 120, 60)]  # its other texts are elsewhere in the README
    scored = [{**completion, "response": text, "overall_score": n} for n, text in enumerate(texts, start=5)]
    ragged = [*rows, *rows_of([{**example, "completions": scored, "instruction": "Help me."}], 1)]
    assert [len(row.responses) for row in ragged] == [8] * 11 + [3]
    trend, _ = train("nca", ragged, steps=3, batch=4)
    check_trend(trend, ragged, steps=3)
    assert len(trend[-1]["ranks"]) == 8


def test_nca_on_six_scored_answers(real_data, rows_of, train) -> None:
    """NCA on MT-Bench answers of K = 6 models with GPT-4's scores, many of them tied."""
    rows = rows_of(real_sets.mt_bench6(real_data), 8)
    assert {len(row.responses) for row in rows} == {6}
    assert any(len(set(row.rewards)) < 6 for row in rows)
    trend, _ = train("nca", rows, steps=2, batch=4)
    check_trend(trend, rows, steps=2)
    assert len(trend[-1]["ranks"]) == 6


def test_dpo_on_real_pairs(real_data, rows_of, train) -> None:
    """DPO on UltraFeedback pairs with both scores; among them a pair with equal scores, counted as excluded."""
    built = rows_of(real_sets.ultrafeedback_pairs(real_data), 400, "--released", "preference")
    tied = next(row for row in built if row.rewards[0] == row.rewards[1])
    rows = [*[row for row in built if row.rewards[0] != row.rewards[1]][:11], tied]
    trend, _ = train("dpo", rows, steps=3, batch=4)
    check_trend(trend, rows, steps=3)
    assert trend[-1]["excluded"] == 1
