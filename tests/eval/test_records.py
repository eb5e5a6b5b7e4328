"""eval.records and eval.collect: pooling over seeds, pairing, and records that say where they come from."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic import by_seed_end, by_seed_score, student, write_results

from data_prep.files import InputError
from eval import collect
from eval.records import Results, pool, read_scores

values_of_seeds = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@given(values_of_seeds)
def test_interval_over_seeds_is_students(values: list[float]) -> None:
    """With two seeds or more the interval is scipy's one-sample t interval; the values of the seeds are kept."""
    estimate = pool(values, within=(-1.0, 1.0))
    with pytest.MonkeyPatch.context() as patch:  # scipy warns of values that are all equal
        patch.setattr("warnings.warn", lambda *_, **__: None)
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    scale = 1e-9 * max(1.0, *map(abs, values))
    assert estimate.value == pytest.approx(sum(values) / len(values), abs=scale)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e3 * scale)
    assert estimate.seeds == tuple(values)


def test_three_seeds_by_hand() -> None:
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027."""
    estimate = pool([1.0, 2.0, 3.0])
    assert (estimate.low, estimate.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    assert estimate.show(2) == "2.00 [-0.48, 4.48]"


def test_one_seed() -> None:
    """One seed has its own interval over prompts, or none, which is shown as none."""
    assert pool([0.4], within=(0.3, 0.6)).show(1) == "0.4 [0.3, 0.6]"
    alone = pool([0.4])
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert alone.show(1) == "0.4"


def test_results_are_those_of_the_files(tmp_path) -> None:
    """Scores, end points, and both differences are what pandas and scipy make of the same files."""
    folder = write_results(tmp_path)
    results = Results.read(folder)
    score = ("sampled", "all", "reward")
    expected = student(by_seed_score(folder, "nca-hard", *score))
    found = results.score("nca-hard", *score)
    assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-9)
    for path in (("chosen", "log_ratio"), ("kl",)):
        found = results.end("nca-hard", *path)
        assert (found.value, found.low, found.high) == pytest.approx(
            student(by_seed_end(folder, "nca-hard", *path)), rel=1e-9
        )
        other = results.end_difference("nca-hard", "dpo-hard", *path)
        paired = by_seed_end(folder, "nca-hard", *path) - by_seed_end(folder, "dpo-hard", *path)
        assert (other.value, other.low, other.high) == pytest.approx(student(paired), rel=1e-9)
    found = results.difference("nca-hard", "mu", *score)
    paired = by_seed_score(folder, "nca-hard", *score) - by_seed_score(folder, "mu", *score)
    assert (found.value, found.low, found.high) == pytest.approx(student(paired), rel=1e-9)
    assert results.seeds == (0, 1, 2)
    assert results.work["nca-hard"]["responses_seen"] == len("nca-hard")  # of the first seed


def test_differences_are_paired(tmp_path) -> None:
    """What all methods of a seed share cancels: seeds far apart, yet a difference known exactly."""

    def number(*key: Any) -> float:
        return 100.0 * key[5 if key[0] == "score" else 4] + (1.5 if key[1].startswith("nca-") else 0.0)

    results = Results.read(write_results(tmp_path, number=number))
    for found in (
        results.difference("nca-hard", "dpo-hard", "greedy", "all", "reward"),
        results.end_difference("nca-hard", "dpo-hard", "chosen", "log_ratio"),
    ):
        assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5), abs=1e-9)
    alone = results.score("nca-hard", "greedy", "all", "reward")
    assert alone.high - alone.low > 100


def test_order_of_lines_does_not_matter(tmp_path) -> None:
    """Seeds are matched by number, not by their place in the file."""
    folder = write_results(tmp_path)
    before = Results.read(folder).end_difference("nca-hard", "dpo-hard", "kl")
    path = folder / "trend.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    dpo_first = sorted(range(len(lines)), key=lambda i: (records[i]["method"] == "nca", -records[i]["seed"]))
    path.write_text("".join(lines[i] for i in dpo_first))
    assert Results.read(folder).end_difference("nca-hard", "dpo-hard", "kl") == before


def test_what_is_missing_is_none(tmp_path) -> None:
    """A policy without records has no score, end point or difference."""
    results = Results.read(write_results(tmp_path, without=["nca-hard"]))
    score = ("sampled", "all", "reward")
    assert results.score("nca-hard", *score) is None
    assert results.end("nca-hard", "kl") is None
    for one, other in (("nca-hard", "dpo-hard"), ("dpo-hard", "nca-hard")):
        assert results.difference(one, other, *score) is None
        assert results.end_difference(one, other, "kl") is None


@pytest.mark.parametrize("file", ["scores", "trend"])
def test_seeds_that_only_one_side_has_are_never_paired(file, tmp_path) -> None:
    """A seed that one of the two policies lacks is refused in one line, or left out: never paired with another."""
    folder = write_results(tmp_path)
    path = folder / f"{file}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lacking = {"nca-hard": 0, "dpo-hard": 2}
    kept = [record for record in records if lacking.get(record["policy"]) != record["seed"]]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    results = Results.read(folder)
    try:
        if file == "scores":
            found = results.difference("nca-hard", "dpo-hard", "sampled", "all", "reward")
        else:
            found = results.end_difference("nca-hard", "dpo-hard", "kl")
    except InputError:
        return
    if file == "scores":
        ours, theirs = (by_seed_score(folder, f"{m}-hard", "sampled", "all", "reward") for m in ("nca", "dpo"))
    else:
        ours, theirs = (by_seed_end(folder, f"{m}-hard", "kl") for m in ("nca", "dpo"))
    assert found is None or found.seeds == pytest.approx([ours[1] - theirs[1]], abs=1e-12)


def test_no_scores(tmp_path) -> None:
    """A folder without scores is refused."""
    folder = write_results(tmp_path)
    (folder / "scores.jsonl").write_text("")
    with pytest.raises(InputError, match="no scores"):
        Results.read(folder)


SCORE = {
    "scale": "tiny", "seed": 0, "policy": "mu", "decoding": "greedy", "benchmark": "all", "metric": "reward",
    "judge": "truth 1", "n": 9, "value": 0.123456789, "low": 0.1, "high": 0.2, "manifest": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"value": "0.1"}, "value"),
        ({"value": float("nan")}, "finite"),
        ({"high": float("inf")}, "finite"),
        ({"low": 0.3}, "low"),
        ({"n": 0}, "n = 0"),
        ({"seed": True}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"policy": None}, "policy"),
        ({"extra": 1}, "extra"),
    ],
)
def test_bad_scores_are_refused(change, named, tmp_path) -> None:
    """A score of another type, not finite, with low above high or with other fields: file, line and reason."""
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(SCORE) + "\n" + json.dumps({**SCORE, **change}) + "\n")
    with pytest.raises(InputError, match=f"scores.jsonl:2: .*{named}"):
        read_scores(path)
    path.write_text(json.dumps({key: value for key, value in SCORE.items() if key != "judge"}))
    with pytest.raises(InputError, match=r"scores.jsonl:1: .*judge"):
        read_scores(path)


def write_stage(folder: Path, cost: dict[str, Any] | None = None, settings: dict[str, Any] | None = None) -> str:
    """A finished stage with a manifest, written without the project's code; returns the manifest's hash."""
    folder.mkdir(parents=True)
    identity = {"module": folder.name, "facts": {}, "text": "größer", "settings": settings or {}}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    around = {"commit": "c0ffee", "dirty": False, "wall_s": 1.5, "cpu_s": 1.25, "peak_mb": 300.0}
    manifest = {"hash": digest, "identity": identity, "command": "python -m x", "circumstances": around | (cost or {})}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return digest


@pytest.fixture
def runs(tmp_path) -> Path:
    """The working folder of two seeds: a run with its trend, and scores. Seed 2 is not asked for."""
    for seed in (0, 1, 2):
        root = tmp_path / "runs" / f"seed-{seed}"
        write_stage(root / "scores")
        (root / "scores" / "scores.jsonl").write_text(json.dumps({**SCORE, "seed": seed}) + "\n")
        write_stage(root / "runs" / "dpo_x3-hard", {"wall_s": 10.0 + seed})
        trend = [{"step": step, "split": "heldout", "chosen": {"log_ratio": 1 / 3}, "n": step} for step in (0, 2)]
        text = "".join(json.dumps(record) + "\n" for record in trend)
        (root / "runs" / "dpo_x3-hard" / "trend.jsonl").write_text(text)
        unfinished = root / "runs" / "kto-hard"
        unfinished.mkdir()
        (unfinished / "trend.jsonl").write_text(text)
    return tmp_path / "runs"


def test_collect(run, runs, tmp_path) -> None:
    """Scores as they are; trend records of finished runs with seed, policy, method and regime, at 6 decimals; a
    manifest line for each stage; a cost line for each stage."""
    out = tmp_path / "out"
    assert run(collect.main, "--runs", runs, "--seeds", 0, 1, "--out", out).code == 0
    lines = {name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
             for name in ("scores", "trend", "manifests")}  # fmt: skip
    assert lines["scores"] == [SCORE, {**SCORE, "seed": 1}]
    hashes = {(line["seed"], line["stage"]): line["hash"] for line in lines["manifests"]}
    assert set(hashes) == {(seed, stage) for seed in (0, 1) for stage in ("scores", "runs/dpo_x3-hard")}
    assert lines["trend"] == [
        {
            "seed": seed, "policy": "dpo_x3-hard", "method": "dpo_x3", "regime": "hard", "step": step,
            "split": "heldout", "chosen": {"log_ratio": 0.333333}, "n": step,
            "manifest": hashes[seed, "runs/dpo_x3-hard"],
        }
        for seed in (0, 1) for step in (0, 2)
    ]  # fmt: skip
    for line in lines["manifests"]:
        text = json.dumps(line["identity"], sort_keys=True, ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == line["hash"]
        assert (line["commit"], line["dirty"], line["command"]) == ("c0ffee", False, "python -m x")
    assert (out / "cost.csv").read_text().splitlines() == [
        "seed,stage,wall_s,cpu_s,peak_mb",
        "0,runs/dpo_x3-hard,10.0,1.25,300.0",
        "0,scores,1.5,1.25,300.0",
        "1,runs/dpo_x3-hard,11.0,1.25,300.0",
        "1,scores,1.5,1.25,300.0",
    ]


def test_collect_any_folders(run, tmp_path) -> None:
    """Everything below the named folders, with the seed of a stage's settings (or of its recipe or decoding); NAME=DIR
    names a run's policy; a stage with scores is about their policy. What there is none of leaves no file."""
    trend = json.dumps({"step": 1, "split": "heldout", "chosen": {"log_ratio": 0.5}}) + "\n"
    run_hash = write_stage(tmp_path / "runs" / "nca-K3", settings={"recipe": {"seed": 42}})
    (tmp_path / "runs" / "nca-K3" / "trend.jsonl").write_text(trend)
    write_stage(tmp_path / "judged" / "a b" / "mt_bench", settings={"seed": 7, "policy": {"x": 1}})
    (tmp_path / "judged" / "a b" / "mt_bench" / "scores.jsonl").write_text(
        json.dumps({**SCORE, "policy": "kto"}) + "\n"
    )
    write_stage(tmp_path / "judged" / "answers", settings={"decoding": {"seed": 5}})
    write_stage(tmp_path / "judged" / "check")
    (tmp_path / "judged" / "scores.jsonl").write_text("a summary, without a manifest\n")
    out = tmp_path / "out"
    words = ("--folders", f"nca-reward-k3={tmp_path}/runs/nca-K3", tmp_path / "judged", "--out", out)
    assert run(collect.main, *words).code == 0
    lines = {name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
             for name in ("scores", "trend", "manifests")}  # fmt: skip
    assert lines["scores"] == [{**SCORE, "policy": "kto"}]
    (found,) = lines["trend"]
    assert [found[key] for key in ("seed", "policy", "method", "regime", "manifest")] == [
        42, "nca-reward-k3", "nca", "reward-k3", run_hash
    ]  # fmt: skip
    assert [(line["seed"], line["stage"], line["policy"]) for line in lines["manifests"]] == [
        (42, "nca-reward-k3", "nca-reward-k3"), (7, "judged/a b/mt_bench", "kto"), (5, "judged/answers", "answers"),
        (None, "judged/check", "check"),
    ]  # fmt: skip
    assert run(collect.main, "--folders", tmp_path / "judged" / "check", "--out", out).code == 0
    assert sorted(path.name for path in out.iterdir()) == ["cost.csv", "manifests.jsonl"]
    (tmp_path / "empty").mkdir()
    assert "no finished stage" in run(collect.main, "--folders", tmp_path / "empty", "--out", out).refusal
    assert "--folders" in run(collect.main, "--out", out).refusal


def test_collect_refuses(run, runs, tmp_path) -> None:
    """An edited manifest, or a seed without scores, is refused in one line."""
    words = ("--runs", runs, "--out", tmp_path / "out", "--seeds")
    assert "no such file" in run(collect.main, *words, 0, 7).refusal
    path = runs / "seed-1" / "scores" / "manifest.json"
    path.write_text(path.read_text().replace('"facts": {}', '"facts": {"n": 1}'))
    assert str(path) in run(collect.main, *words, 0, 1).refusal
