"""scripts/table2.py and eval.truth_judge: judged by the truth through the client of a paid judge, end to end."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep.manifest import read_manifest
from data_prep.miniature import world
from eval import fastchat, generate, mt_bench
from eval.alpaca import RANKING, annotate
from eval.judge import Endpoint, Judge, parse_rating
from eval.records import read_scores
from eval.truth_judge import JUDGE_PROMPTS, TruthJudge

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "table2.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# The script with two methods in one regime in place of sixteen policies.
SMALL = """
import sys
sys.path.insert(0, {folder!r})
import table2
from data_prep.files import run_command
table2.METHODS, table2.REGIMES = {{"dpo": "DPO", "nca": "NCA"}}, ("hard",)
run_command(table2.main)
"""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve test prompts of the miniature, with their truths."""
    folder = tmp_path_factory.mktemp("world")
    world.build(folder, n_demonstrations=4, n_train=3, n_heldout=3, n_test=12)
    return folder / "prompts-test.jsonl"


@pytest.fixture
def judge(prompts: Path) -> Iterator[TruthJudge]:
    """A running judge."""
    judge = TruthJudge([prompts])
    judge.start()
    yield judge
    judge.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def post(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def works(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# The judge


def test_ratings_are_the_truth(judge, prompts, tmp_path) -> None:
    """Through the client of a paid judge: the rating of each turn is the reward of its own answer to its own task."""
    items = lines(prompts)
    texts = [item["prompt"][0]["content"] for item in items]
    answers = {(str(i), turn): answer for i in range(0, 12, 2)
               for turn, answer in ((1, "List: red, blue. #### 7"), (2, "def f(x):\n    return x"))}  # fmt: skip
    questions = [fastchat.Question(str(i), "math", (texts[i], texts[i + 1]), ("r", "r")) for i in range(0, 12, 2)]
    templates = {prompt["name"]: prompt for prompt in JUDGE_PROMPTS}
    requests = [mt_bench.to_request(q, answers, turn, 0, templates) for q in questions for turn in (1, 2)]
    replies = Judge(Endpoint(judge.url, "any"), tmp_path / "cache.jsonl").ask(requests, parse_rating)
    rewards = set()
    for i in range(0, 12, 2):
        for turn in (1, 2):
            reward = world.score(items[i + turn - 1]["truth"], answers[str(i), turn])
            assert parse_rating(replies[f"{i}/{turn}/0"].text) == pytest.approx(reward, abs=1e-4)
            rewards.add(reward)
    assert len(rewards) > 3
    assert {reply.model for reply in replies.values()} == {judge.model}


def test_rankings_are_the_truth(judge, prompts, tmp_path) -> None:
    """Through the alpaca_eval package: the answer with the higher reward is preferred, on either side."""
    items = lines(prompts)
    good = [world.FAMILIES[item["source"]].demonstrate(item["truth"], random.Random(0), 0.0)
            for item in items]  # fmt: skip
    pairs = [
        {"id": str(i), "index": i, "instruction": item["prompt"][0]["content"],
         "output_1": "no idea" if i % 2 else good[i], "output_2": good[i] if i % 2 else "no idea"}
        for i, item in enumerate(items)
    ]  # fmt: skip
    asked = Judge(Endpoint(judge.url, "any"), tmp_path / "cache.jsonl").ask
    found = annotate(pairs, RANKING, asked)
    assert [judgement["preference"] for judgement in found] == [2.0 if i % 2 else 1.0 for i in range(12)]


def test_what_cannot_be_judged_is_refused(judge, prompts) -> None:
    """Other prompts, unknown questions and what is no chat request get status 400 and a reason."""
    template = JUDGE_PROMPTS[0]["prompt_template"]
    for content, reason in (("Hello!", "neither"), (template.format(question="Who?", answer="I"), "unknown question")):
        status, reply = post(judge.url, json.dumps({"messages": [{"role": "user", "content": content}]}).encode())
        assert status == 400
        assert reason in reply["error"]["message"]
    for body in (b"{", b"[]", b'{"messages": []}', b'{"messages": [{"content": 5}]}'):
        assert post(judge.url, body)[0] == 400
    assert judge.url.startswith("http://127.0.0.1:")


def test_the_command_serves(prompts, judge) -> None:
    """`python -m eval.truth_judge --port 0` prints its address and answers there; a port in use is refused."""
    command = [sys.executable, "-m", "eval.truth_judge", "--prompts", str(prompts), "--port"]
    child = subprocess.Popen([*command, "0"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        url = child.stdout.readline().strip()
        question = lines(prompts)[0]["prompt"][0]["content"]
        content = JUDGE_PROMPTS[0]["prompt_template"].format(question=question, answer="no idea")
        status, reply = post(url, json.dumps({"messages": [{"role": "user", "content": content}]}).encode())
        assert status == 200
        assert parse_rating(reply["choices"][0]["message"]["content"]) is not None
    finally:
        child.terminate()
    assert child.wait() == 143
    taken = subprocess.run([*command, str(judge.port)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert taken.returncode == 2
    assert taken.stderr == f"error: --port {judge.port}: cannot be listened on; choose another, or 0 for any\n"


# The table


@pytest.fixture
def runs(policies, prompts, run, tmp_path) -> Path:
    """Runs as scripts/reproduce.py leaves them, in a path with spaces: mu, DPO and NCA, here with random weights."""
    runs = tmp_path / "my runs"
    seed = runs / "seed-0"
    (seed / "world").mkdir(parents=True)
    (seed / "world" / prompts.name).write_bytes(prompts.read_bytes())
    for name, folder, policy in (("mu", "sft", 0), ("dpo-hard", "runs/dpo-hard", 0), ("nca-hard", "runs/nca-hard", 1)):
        target = seed / folder / "policy"
        target.mkdir(parents=True)
        for path in policies[policy].iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        words = ("--policy", target, "--prompts", seed / "world" / prompts.name, "--out", seed / "answers" / name)
        assert run(generate.main, *words, "--greedy", "--max-new-tokens", 8).code == 0
    return runs


def test_end_to_end(runs) -> None:
    """Killed by SIGKILL amid the judging and started again, it makes the table: all records, from the local judge;
    wins against oneself are draws. A third run asks nobody and changes nothing."""
    command = [sys.executable, "-c", SMALL.format(folder=str(ROOT / "scripts")), "--scale", "tiny", "--runs", str(runs)]
    log = open(runs / "log", "w")  # noqa: SIM115
    child = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    out = runs / "table2"
    while child.poll() is None and not list(out.glob("seed-0/mt_bench/*/judge.jsonl")):
        time.sleep(0.02)
    stages = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, (runs / "log").read_text()
    deadline = time.monotonic() + 20
    while any(map(works, stages)):  # none goes on by itself
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (out / "table2.md").exists()

    def again() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)

    done = again()
    assert done.returncode == 0, done.stderr[-2000:]
    ran = re.findall(r"^\[(\d+)/10\] ", done.stdout, re.MULTILINE)
    assert len(ran) < 10  # 1 prompts file, 3 answers, 3 + 2 + 1 judged; some were done before the kill
    scores = {(s.policy, s.benchmark, s.metric): s for s in read_scores(out / "scores.jsonl")}
    assert {key[:2] for key in scores} == {
        *((name, "mt_bench") for name in ("mu", "dpo-hard", "nca-hard")),
        ("dpo-hard", "alpaca_eval_1"), ("nca-hard", "alpaca_eval_1"), ("nca-hard", "vs_dpo"),
    }  # fmt: skip
    assert scores["dpo-hard", "alpaca_eval_1", "win_rate"].value == 0.5  # the weights of mu
    truth = {item["prompt"][0]["content"]: item["truth"] for item in lines(runs / "seed-0/world/prompts-test.jsonl")}
    questions = {q["question_id"]: q for q in lines(out / "seed-0" / "questions.jsonl")}
    for name in ("mu", "nca-hard"):
        answers = lines(out / "seed-0" / "answers-mt_bench" / name / "answers.jsonl")
        assert len(answers) == 2 * len(questions) == 12
        rewards = [world.score(truth[questions[a["id"]]["turns"][a["turn"] - 1]], a["response"]) for a in answers]
        assert scores[name, "mt_bench", "score"].value == pytest.approx(sum(rewards) / 12, abs=1e-4)
        manifest = read_manifest(out / "seed-0" / "answers-mt_bench" / name)
        assert scores[name, "mt_bench", "score"].manifest == manifest["hash"]
    table = (out / "table2.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == ["| mu", "| dpo-hard", "| nca-hard"]
    done = again()
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.findall(r"^\[", done.stdout, re.MULTILINE)
    assert (out / "table2.md").read_text() == table


def plan(*more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, more)], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True, check=False, timeout=300)  # fmt: skip


def test_policies_that_are_absent(tmp_path) -> None:
    """Without policies one line says which command makes them."""
    done = plan("--scale", "tiny", "--runs", tmp_path / "none at all", "--seeds", 2)
    assert done.returncode == 2
    assert done.stderr.endswith(f"bash scripts/reproduce.sh --seeds 2 --runs '{tmp_path}/none at all'\n")
    assert done.stderr.count("\n") == 1


def test_plan_of_the_papers_scale(tmp_path) -> None:
    """--dry-run: each of nine policies answers and is judged by 3 x 160 and 805 calls, all but DPO by 805 more; the
    money is calls by tokens by prices. Nothing is written."""
    prices = ("--judge-price-in", 10, "--judge-price-out", 20, "--passes", 3)
    done = plan("--scale", "mistral-7b", "--dry-run", "--runs", tmp_path / "my runs", *prices)
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^  python -m (\S+)", done.stdout, re.MULTILINE)
    assert {name: commands.count(name) for name in set(commands)} == {
        "eval.generate": 18, "eval.mt_bench": 10, "eval.win_rate": 17,
    }  # fmt: skip
    calls = 3 * 9 * 160 + 9 * 805 + 8 * 805
    usd = (3 * 9 * 160 * (787 * 10 + 196 * 20) + 9 * 805 * (873 * 10 + 40 * 20) + 8 * 805 * (990 * 10 + 40 * 20)) / 1e6
    assert f"{calls:,} calls" in done.stdout
    assert f"about {usd:.0f} USD" in done.stdout
    for word in ("H100-hours", "Disk:", "train_mistral7b.sh", "prepare_data.sh", "--dtype bfloat16"):
        assert word in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_papers_scale_needs_a_commit() -> None:
    """Without --dry-run the commit of the SFT model is needed; several seeds are refused."""
    assert "--model-revision is needed" in plan("--scale", "mistral-7b").stderr
    assert "--seeds and --quick" in plan("--scale", "mistral-7b", "--dry-run", "--seeds", 2).stderr
