"""eval.mt_bench: published means from real GPT-4 judgements, prompts equal to FastChat's own, judges that fail."""

import gzip
import hashlib
import http.server
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import MODEL, Fault
from scipy import stats

from eval import fastchat, mt_bench
from eval.intervals import bootstrap_interval
from eval.judge import parse_rating
from eval.records import read_scores

ROOT = Path(__file__).resolve().parents[2]
# README of jxiw/MambaInLlama, commit 60d64dc66a9e, in two decimals; the four are from the same judgements.
PUBLISHED = {
    "mamba_0_5_dpo_ep1": 7.1219, "mamba_0_5_dpo_ep3": 7.3125, "mamba_0_75_dpo_ep1": 7.0344,
    "mamba_0_75_dpo_ep3": 6.5812, "mamba_0_875_dpo_ep1": 6.3875, "mamba_0_875_dpo_ep3": 6.3688,
}  # fmt: skip
TOY = [  # category, two turns
    ("math", ("What is 2 + 3?", "And twice that {braces}?")),
    ("writing", ("Name a color.", "Name another one.")),
    ("stem", ("What falls?", "Why?")),
]
PROMPTS = [
    {"name": f"single{kind}-v1{end}", "system_prompt": f"S{kind}{end}", "prompt_template": text}
    for kind, ref in (("", ""), ("-math", "R:{ref_answer_1} "))
    for end, text in (
        ("", ref + "Q:{question} A:{answer}"),
        (
            "-multi-turn",
            ref + ("R2:{ref_answer_2} " if ref else "") + "Q1:{question_1} A1:{answer_1} Q2:{question_2} A2:{answer_2}",
        ),
    )
]


@pytest.fixture(scope="module")
def data() -> Path:
    """The folder of real MT-Bench files; skips where it is absent."""
    folder = Path(os.environ.get("NCA_TEST_DATA", ROOT.parent / "shared" / "data")) / "mt_bench"
    if not folder.exists():
        pytest.skip(f"{folder} is absent; set NCA_TEST_DATA to the folder of real data")
    return folder


def judgements_of(data: Path, run: str) -> str:
    return gzip.decompress((data / run / "model_judgment" / "gpt-4_single.jsonl.gz").read_bytes()).decode()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Real judgements


def test_means_are_the_published_ones(data, run, tmp_path) -> None:
    """Six models' means over 960 real judgements, to the fourth decimal; by category they average to the whole."""
    path = tmp_path / "judgements.jsonl"
    path.write_text(judgements_of(data, "run_mamba_zephyr"))
    words = ("scores", "--judgements", path, "--questions", data / "question.jsonl", "--scale", "published")
    done = run(mt_bench.main, *words, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = {(s.policy, s.metric): s for s in read_scores(tmp_path / "out" / "scores.jsonl")}
    for model, mean in PUBLISHED.items():
        assert found[model, "score"].value == pytest.approx(mean, abs=6e-5)
        assert found[model, "score"].n == 80
        parts = [found[model, f"score_{category}"] for category in fastchat.TEMPERATURES]
        assert [part.n for part in parts] == [10] * 8
        assert sum(part.value for part in parts) / 8 == pytest.approx(mean, abs=6e-5)
        halves = [found[model, f"score_turn_{turn}"].value for turn in (1, 2)]
        assert sum(halves) / 2 == pytest.approx(mean, abs=6e-5)
    assert {score.judge for score in found.values()} == {"gpt-4 (judgements given)"}


def test_scores_of_minus_one_and_repeats(data, run, tmp_path) -> None:
    """A real file with four scores of -1 and ten repeated judgements: FastChat's means, and the counts; with the
    repeats taken out, four judgements are missing and the score is refused."""
    path, out = tmp_path / "judgements.jsonl", tmp_path / "out"
    path.write_text(judgements_of(data, "run_edge_cases"))
    words = ("scores", "--judgements", path, "--scale", "published", "--out", out)
    done = run(mt_bench.main, *words)
    assert done.code == 0, done.err
    normal, griffin = (f"Meta-Llama-3-8B-Instruct-{name}" for name in ("Normal", "Griffin"))
    found = {(s.policy, s.metric): s.value for s in read_scores(out / "scores.jsonl")}
    assert [found[normal, name] for name in ("score_turn_1", "score_turn_2", "score")] == pytest.approx(
        [8.3837, 7.2625, 7.8434], abs=6e-5
    )
    assert found[griffin, "score"] == pytest.approx(2.7)
    facts = json.loads((out / "manifest.json").read_text())["identity"]["facts"]
    assert facts[normal] == {"judgements": 170, "without_rating": 4, "repeated": 10, "missing": 0}
    assert facts[griffin] == {"judgements": 160, "without_rating": 0, "repeated": 0, "missing": 0}

    firsts = {}
    for line in lines(path.read_text()):
        firsts.setdefault((line["model"], line["question_id"], line["turn"]), line)
    write(path, list(firsts.values()))
    assert f"4 of 160 judgements of {normal} are missing" in run(mt_bench.main, *words).refusal
    assert run(mt_bench.main, *words, "--allow-missing").code == 0
    assert {s.policy: s.n for s in read_scores(out / "scores.jsonl") if s.metric == "score_turn_1"}[normal] == 76


def test_ratings_are_read_as_in_the_real_judgements(data) -> None:
    """The rating found in each real reply is the score that was recorded for it; none in what failed."""
    checked = Counter()
    for name in ("run_mamba_zephyr", "run_llama2_tuned", "run_edge_cases"):
        for line in lines(judgements_of(data, name)):
            assert parse_rating(line["judgment"]) == (None if line["score"] == -1 else line["score"])
            checked[line["score"] == -1] += 1
    assert checked == {False: 2086, True: 4}


def test_the_judge_is_asked_what_fastchat_asked(data) -> None:
    """Our prompts for real questions, references and answers are, byte for byte, those in 960 real judgements."""
    questions = fastchat.read_questions(data / "question.jsonl", data / "reference_answer" / "gpt-4.jsonl")
    templates = fastchat.read_judge_prompts(data / "judge_prompts.jsonl")
    asked = {}
    for line in lines(judgements_of(data, "run_mamba_zephyr")):
        asked[line["model"], str(line["question_id"]), line["turn"]] = line["user_prompt"]
    for model in PUBLISHED:
        text = gzip.decompress((data / "run_mamba_zephyr" / "model_answer" / f"{model}.jsonl.gz").read_bytes())
        answers = {}
        for line in lines(text.decode()):
            for turn, answer in enumerate(line["choices"][0]["turns"], start=1):
                answers[str(line["question_id"]), turn] = answer
        for question in questions:
            for turn in (1, 2):
                request = mt_bench.to_request(question, answers, turn, 0, templates)
                assert request.messages[1]["content"] == asked.pop((model, question.id, turn))
                assert (request.max_tokens, request.temperature) == (2048, 0.0)
    assert not asked


def test_prompts_have_fastchats_temperatures(data, run, tmp_path) -> None:
    """80 two-turn prompts: 20 at 0.7 (writing, roleplay), 20 at 0.1 (stem, humanities), 40 without chance."""
    out = tmp_path / "prompts.jsonl"
    assert run(mt_bench.main, "prompts", "--questions", data / "question.jsonl", "--out", out).code == 0
    prompts = lines(out.read_text())
    assert Counter(prompt["temperature"] for prompt in prompts) == {0.7: 20, 0.1: 20, 0.0: 40}
    real = [json.loads(line)["turns"] for line in (data / "question.jsonl").read_text().splitlines()]
    assert [[p["prompt"][0]["content"], *p["follow_ups"]] for p in prompts] == real


def test_known_digests_are_those_of_the_real_files(data) -> None:
    """What a download is checked against are the public files."""
    places = {"questions": "question.jsonl", "references": "reference_answer/gpt-4.jsonl",
              "judge_prompts": "judge_prompts.jsonl"}  # fmt: skip
    for name, place in places.items():
        assert fastchat.FILES[name][1] == hashlib.sha256((data / place).read_bytes()).hexdigest()


# A judge on this machine


@pytest.fixture
def files(tmp_path: Path) -> list[Any]:
    """Command-line words for toy questions, references and judge prompts."""
    questions = [{"question_id": i, "category": category, "turns": list(turns)}
                 for i, (category, turns) in enumerate(TOY)]  # fmt: skip
    references = [{"question_id": 0, "choices": [{"turns": ["five", "ten"]}]}]
    return [
        "--questions", write(tmp_path / "questions.jsonl", questions),
        "--references", write(tmp_path / "references.jsonl", references),
        "--judge-prompts", write(tmp_path / "judge_prompts.jsonl", PROMPTS),
    ]  # fmt: skip


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Answers to both turns of the toy questions, with a manifest, written without the project's code."""
    folder = tmp_path / "answers"
    write(folder / "answers.jsonl", [
        {"id": str(i), "decoding": "prescribed", "sample": 0, "turn": turn, "response": f"a{i}.{turn} {{x}}",
         "tokens": 1, "finished": True}
        for i in range(len(TOY)) for turn in (1, 2)
    ])  # fmt: skip
    digest = hashlib.sha256(b"{}").hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"hash": digest, "identity": {}}))
    return folder


@pytest.fixture
def judge(run, files, answers, tmp_path) -> Callable[..., Any]:
    """Run the judge command against a server."""

    def call(server: Any, *more: Any) -> Any:
        words = ("judge", "--answers", answers, "--out", tmp_path / "judged", "--policy", "nca-hard", "--scale", "tiny")
        asked = ("--judge-url", server.url, "--judge-model", "alias")
        return run(mt_bench.main, *words, *files, *asked, *more)

    return call


def rate(body: dict[str, Any], n: int) -> str:
    """A rating that depends on the prompt and on how often it was asked."""
    return f"Fine. Rating: [[{1 + (len(body['messages'][1]['content']) + n) % 10}]]"


def test_single_answer_grading(judge, judge_server, tmp_path) -> None:
    """Each turn is asked once, turn 2 with the whole conversation, math with its references; braces in texts stay.
    Scores are the means of the ratings, and every record names the model that the server returned."""
    server = judge_server(rate)
    done = judge(server)
    assert done.code == 0, done.err
    asked = sorted((body["messages"][0]["content"], body["messages"][1]["content"]) for body in server.calls)
    assert asked == sorted([
        ("S-math", "R:five Q:What is 2 + 3? A:a0.1 {x}"),
        ("S-math-multi-turn", "R:five R2:ten Q1:What is 2 + 3? A1:a0.1 {x} Q2:And twice that {braces}? A2:a0.2 {x}"),
        ("S", "Q:Name a color. A:a1.1 {x}"),
        ("S-multi-turn", "Q1:Name a color. A1:a1.1 {x} Q2:Name another one. A2:a1.2 {x}"),
        ("S", "Q:What falls? A:a2.1 {x}"),
        ("S-multi-turn", "Q1:What falls? A1:a2.1 {x} Q2:Why? A2:a2.2 {x}"),
    ])  # fmt: skip
    ratings = [1 + len(text) % 10 for _, text in asked]
    scores = {score.metric: score for score in read_scores(tmp_path / "judged" / "scores.jsonl")}
    assert scores["score"].value == pytest.approx(sum(ratings) / 6)
    assert set(scores) == {"score", "score_turn_1", "score_turn_2", "score_math", "score_writing", "score_stem"}
    assert {score.judge for score in scores.values()} == {MODEL}
    assert {score.decoding for score in scores.values()} == {"prescribed"}
    judge(server)
    assert len(server.calls) == 6  # done already


def test_missing_judgements(judge, judge_server, tmp_path) -> None:
    """A judge that will not rate one turn: no score, unless asked for; the next run asks for this one alone."""
    stubborn = {"now": True}

    def say(body: dict[str, Any], n: int) -> str | Fault:
        return "I cannot." if stubborn["now"] and "Why?" in body["messages"][1]["content"] else rate(body, 0)

    server = judge_server(say)
    assert "1 of 6 judgements are missing" in judge(server).refusal
    assert not (tmp_path / "judged" / "scores.jsonl").exists()
    done = judge(server, "--allow-missing")
    assert done.code == 0, done.err
    assert "1 missing" in done.out
    scores = {score.metric: score for score in read_scores(tmp_path / "judged" / "scores.jsonl")}
    assert (scores["score"].n, scores["score_turn_2"].n) == (3, 2)
    stubborn["now"], before = False, len(server.calls)
    assert judge(server).code == 0
    assert len(server.calls) == before + 1


def test_passes_show_the_judges_noise(judge, judge_server, tmp_path) -> None:
    """Three passes are three replies to each prompt; the interval over passes is Student's t of their means."""
    server = judge_server(rate)
    assert judge(server, "--passes", 3).code == 0
    assert sorted(Counter(body["messages"][1]["content"] for body in server.calls).values()) == [3] * 6
    judged = lines((tmp_path / "judged" / "judgements.jsonl").read_text())
    means = [sum(line["rating"] for line in judged if line["pass_number"] == k) / 6 for k in range(3)]
    found = {score.metric: score for score in read_scores(tmp_path / "judged" / "scores.jsonl")}
    over = found["score_over_passes"]
    interval = stats.t.interval(0.95, 2, loc=sum(means) / 3, scale=stats.sem(means))
    assert (over.n, over.value) == (3, pytest.approx(sum(means) / 3))
    assert (over.low, over.high) == pytest.approx(interval)
    assert found["score"].value == pytest.approx(sum(means) / 3)


def test_dry_run_asks_nobody(judge, judge_server, tmp_path) -> None:
    """--dry-run says what would be asked; nothing is sent and nothing written."""
    server = judge_server(rate)
    done = judge(server, "--passes", 2, "--dry-run")
    assert done.out.startswith("12 calls to make (0 in the cache)")
    assert not server.calls
    assert not (tmp_path / "judged").exists()


def test_interval_is_the_bootstrap_over_questions() -> None:
    """Where nothing is missing it is the interval of the questions' means (eval.intervals)."""
    ratings = [(i % 10 + 1, (7 * i) % 10 + 1) for i in range(80)]
    judgements = [fastchat.Judgement(str(i), turn + 1, 0, float(pair[turn]), "j", "") for i, pair in enumerate(ratings)
                  for turn in (0, 1)]  # fmt: skip
    n, value, low, high = mt_bench.mean(judgements)
    means = [sum(pair) / 2 for pair in ratings]
    assert (n, value) == (80, pytest.approx(sum(means) / 80))
    assert (low, high) == pytest.approx(bootstrap_interval(means), abs=0.03)


def test_bad_input_is_refused(run, judge, judge_server, files, answers, tmp_path) -> None:
    """An answer or a reference missing, an unknown category, a prompt missing, bad judgements: one line each."""
    server = judge_server(rate)
    for path, change, reason in (
        (answers / "answers.jsonl", lambda found: found[:-1], "no answer to turn 2 of question 2"),
        (answers / "answers.jsonl", lambda found: [*found, found[0]], "two first answers to question 0"),
        (answers / "answers.jsonl", lambda found: [{**found[0], "id": "z"}, *found], "answers to other questions"),
        (files[3], lambda found: [{**found[0], "question_id": 9}], "no reference answer to question 0"),
        (files[1], lambda found: [{**found[0], "category": "cooking"}], "unknown category 'cooking'"),
        (files[1], lambda found: [{**found[0], "turns": ["one"]}], "two turns"),
        (files[1], lambda found: [found[0], found[0]], "question 0 stands twice"),
        (files[5], lambda found: found[:3], "no judge prompt single-math-v1-multi-turn"),
        (files[5], lambda found: [{**line, "prompt_template": "{oops}"} for line in found], "cannot be filled in"),
    ):
        before = path.read_text()
        write(path, change(lines(before)))
        assert reason in judge(server).refusal, reason
        path.write_text(before)
    assert not server.calls
    good = {"question_id": 81, "model": "m", "judge": ["gpt-4", "single-v1"], "score": 5, "turn": 1}
    for line, reason in (
        ({**good, "score": 11}, "with score 11"),
        ({**good, "turn": 3}, "turn 3"),
        ({"model": "m"}, ":1: a judgement has"),
        (good, "1 of 2 judgements of m are missing"),
    ):
        path = write(tmp_path / "judgements.jsonl", [line])
        words = ("scores", "--judgements", path, "--scale", "x", "--out", tmp_path / "out")
        assert reason in run(mt_bench.main, *words).refusal


# Downloads


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web site on this machine, and the folder it shows."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, directory=str(folder), **options)

        def log_message(self, *words: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_downloads_are_checked(site, run, monkeypatch, tmp_path) -> None:
    """A file with the known digest is fetched once; another one, and a dead address, are refused in one line."""
    url, folder = site
    text = json.dumps({"question_id": 1, "category": "math", "turns": ["a", "b"]}).encode()
    (folder / "question.jsonl").write_bytes(text)
    monkeypatch.setattr(fastchat, "SOURCE", url)
    known = hashlib.sha256(text).hexdigest()
    monkeypatch.setitem(fastchat.FILES, "questions", ("question.jsonl", known))
    words = ("prompts", "--data", tmp_path / "data", "--out", tmp_path / "prompts.jsonl")
    assert run(mt_bench.main, *words).code == 0
    monkeypatch.setattr(fastchat, "SOURCE", "http://127.0.0.1:9")
    assert run(mt_bench.main, *words).code == 0  # it is there
    (tmp_path / "data" / "question.jsonl").write_bytes(text + b"\n")
    assert f"SHA-256 is not {known[:12]}" in run(mt_bench.main, *words).refusal
    (tmp_path / "data" / "question.jsonl").unlink()
    refusal = run(mt_bench.main, *words).refusal
    assert "no download" in refusal
    assert refusal.endswith(f"put the file at {tmp_path}/data/question.jsonl")
    assert not list((tmp_path / "data").iterdir())
