"""eval.generate: complete answers in order, the policy's own distribution, and interruptions that leave no trace."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from data_prep.rows import Row
from eval import generate
from train.engine.models import Checkpoint
from train.engine.tokens import Encoder

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 24  # tokens of an answer
DECODING = generate.Decoding(True, 3, 1.0, 512, LONGEST, 4, 0)
CHATS = {
    "p0": [{"role": "user", "content": "How many pens are left?"}],
    "p1": [{"role": "user", "content": "x"}],
    "p2": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe? 🙂 <s>"}],
    "p3": [
        {"role": "user", "content": "List two colors."},
        {"role": "assistant", "content": "red-blue"},
        {"role": "user", "content": "One more, in small letters."},
    ],
    "p4": [{"role": "user", "content": "Write f(x): add 3, then square it."}],
    "p5": [{"role": "user", "content": "\n  and\ttabs \n"}],
    "p6": [{"role": "user", "content": ""}],
}


def draw(policy: Path, prompts: Path, part: Path) -> None:
    """Answer all prompts with DECODING, without the end of the command that removes the part file."""
    engine = generate.transformers_engine(Checkpoint(str(policy)), "float32", DECODING)
    generate.generate(*engine, generate.read_tasks(prompts), DECODING, part)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file with the prompts above; further keys are allowed."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": name, "prompt": chat, "source": "t"}) + "\n"
                            for name, chat in CHATS.items()))  # fmt: skip
    return path


@pytest.fixture
def answer(run, policies, prompts, tmp_path):
    """Run eval.generate into a folder and return its answers file."""

    def call(out: str, *more: Any, policy: Path = policies[0], seed: int = 0) -> Path:
        words = ("--policy", policy, "--prompts", prompts, "--out", tmp_path / out, "--seed", seed)
        options = more or ("--greedy", "--samples", 3, "--batch", 4)
        done = run(generate.main, *words, "--max-new-tokens", LONGEST, *options)
        assert done.code == 0, done.err
        return tmp_path / out / "answers.jsonl"

    return call


def test_answers_are_complete_and_in_order(answer) -> None:
    """One greedy and three sampled answers to each prompt, in the order of prompts; long ones are cut and said so."""
    answers = lines_of(answer("out"))
    wanted = [(name, *which) for name in CHATS for which in (("greedy", 0), *(("sampled", k) for k in range(3)))]
    assert [(a["id"], a["decoding"], a["sample"]) for a in answers] == wanted
    assert all(0 < a["tokens"] <= LONGEST for a in answers)
    assert all(a["tokens"] == LONGEST for a in answers if not a["finished"])
    assert {a["finished"] for a in answers} == {True, False}
    assert not any("</s>" in a["response"] for a in answers)


def test_ids_are_those_of_training(policies) -> None:
    """A prompt's ids are a row's prompt ids in training: one BOS, the role markers, EOS after each turn."""
    _, tokenizer = Checkpoint(str(policies[0])).load()
    marker = {role: tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("user", "assistant", "system")}
    for name, chat in CHATS.items():
        if "<s>" in str(chat):
            continue  # a marker inside a prompt becomes one: no business of this test
        by_hand = [tokenizer.bos_token_id]
        for message in chat:
            text = tokenizer(message["content"], add_special_tokens=False).input_ids
            by_hand += [marker[message["role"]], *text, tokenizer.eos_token_id]
        by_hand.append(marker["assistant"])
        encoder = Encoder(tokenizer, 512, 64)
        assert encoder.prompt(chat, name)[1] == by_hand
        assert encoder.row(Row(name, chat, ["a", "b"], [0.0, 1.0], "t")).prompt_ids == by_hand


def test_greedy_is_the_most_likely_token_each_time(answer, policies) -> None:
    """Greedy answers are those of a plain loop, one prompt at a time, without cache or padding, from training's ids."""
    model, tokenizer = Checkpoint(str(policies[0])).load()
    model.eval()
    encoder = Encoder(tokenizer, 512, 64)
    found = {a["id"]: a for a in lines_of(answer("out", "--greedy", "--batch", 5))}
    for name, chat in CHATS.items():
        ids = encoder.row(Row(name, chat, ["a", "b"], [0.0, 1.0], "t")).prompt_ids
        drawn: list[int] = []
        while len(drawn) < LONGEST and tokenizer.eos_token_id not in drawn:
            with torch.no_grad():
                drawn.append(model(torch.tensor([ids + drawn])).logits[0, -1].argmax().item())
        assert found[name]["response"] == tokenizer.decode(drawn, skip_special_tokens=True)
        assert found[name]["tokens"] == len(drawn)
        assert found[name]["finished"] == (drawn[-1] == tokenizer.eos_token_id)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_whole_distribution(temperature, run, policies, tmp_path) -> None:
    """First tokens are distributed as softmax(logits / temperature), without top-k or top-p (chi-squared test)."""
    model, tokenizer = Checkpoint(str(policies[0])).load()
    _, ids = Encoder(tokenizer, 512, 64).prompt(CHATS["p4"], "p4")
    with torch.no_grad():
        p = (model.eval()(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1).tolist()
    expected: Counter[str] = Counter()  # by text: some tokens decode to the same one
    for token, probability in enumerate(p):
        expected[tokenizer.decode([token], skip_special_tokens=True)] += probability
    path, n = tmp_path / "one.jsonl", 6000
    path.write_text(json.dumps({"id": "p4", "prompt": CHATS["p4"]}))
    words = ("--policy", policies[0], "--prompts", path, "--out", tmp_path / "out", "--max-new-tokens", 1)
    assert run(generate.main, *words, "--samples", n, "--batch", 1000, "--temperature", temperature).code == 0
    found = Counter(a["response"] for a in lines_of(tmp_path / "out" / "answers.jsonl"))
    assert set(found) <= set(expected)
    common = [text for text, probability in expected.items() if n * probability >= 8]
    rest = n * (1 - sum(expected[text] for text in common))
    counts = [*(found[text] for text in common), n - sum(found[text] for text in common)]
    assert len(common) > 20
    assert rest > 8
    assert stats.chisquare(counts, [*(n * expected[text] for text in common), rest]).pvalue > 1e-3


def test_same_seed_same_bytes(answer, policies) -> None:
    """The same seed gives the same bytes, another seed or policy other answers; the samples of a prompt differ."""
    first = answer("first").read_bytes()
    assert answer("second").read_bytes() == first
    assert answer("third", seed=1).read_bytes() != first
    assert answer("fourth", policy=policies[1]).read_bytes() != first
    sampled = [a["response"] for a in lines_of(answer("first")) if a["decoding"] == "sampled"]
    assert len(set(sampled)) > len(sampled) / 2


def interrupted(answers: Path, part: bytes) -> Path:
    """Turn a finished folder into one that was left with `part` of its answers."""
    answers.unlink(missing_ok=True)
    (answers.parent / "manifest.json").unlink(missing_ok=True)
    (answers.parent / "answers.part.jsonl").write_bytes(part)
    return answers


@pytest.fixture
def whole_part(answer, policies, prompts, tmp_path) -> bytes:
    """The part file of a run that was not interrupted, just before its end."""
    path = tmp_path / "whole.jsonl"
    draw(policies[0], prompts, path)
    return path.read_bytes()


def test_interrupted_at_any_byte(answer, whole_part) -> None:
    """Cut anywhere (between lines, inside one, inside a character), it continues to the bytes of an undisturbed run."""
    undisturbed = answer("out").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole_part) if byte == ord("\n")]
    anywhere = random.Random(0).sample(range(len(whole_part)), 8)
    for cut in (0, ends[0], ends[3], ends[4] - 1, ends[-2], len(whole_part) - 1, len(whole_part), *anywhere):
        path = interrupted(answer("out"), whole_part[:cut])
        assert answer("out").read_bytes() == undisturbed, cut
        assert not (path.parent / "answers.part.jsonl").exists()


def test_interrupted_more_than_once(policies, prompts, tmp_path, whole_part) -> None:
    """The part file of a continued run is that of an undisturbed one, so it may be cut again and again."""
    path = tmp_path / "part.jsonl"
    for cut in (len(whole_part) // 3 + 5, len(whole_part) // 2 + 5):
        path.write_bytes(whole_part[:cut])
        draw(policies[0], prompts, path)
        assert path.read_bytes() == whole_part


def test_whole_batches_are_kept(answer, whole_part, policies) -> None:
    """A restart keeps the whole batches and draws the cut one anew; another seed or policy keeps none."""
    records = [json.loads(line) for line in whole_part.splitlines()]
    for record in records[:6]:
        record["response"] = "kept"
    part = "".join(json.dumps(record) + "\n" for record in records[:6]).encode()  # a whole batch of 4, and a half
    for seed, policy, kept in ((0, policies[0], 4), (1, policies[0], 0), (0, policies[1], 0)):
        answer("out")
        interrupted(answer("out"), part)
        found = lines_of(answer("out", seed=seed, policy=policy))
        assert [a["response"] for a in found].count("kept") == kept
        interrupted(answer("out", seed=seed, policy=policy), b"")


def test_killed(answer, policies, prompts, tmp_path) -> None:
    """SIGKILL in the middle: no answers and no manifest are left, and the same command ends with the same bytes."""
    options = ("--greedy", "--samples", "24", "--batch", "2")
    undisturbed = answer("undisturbed", *options).read_bytes()
    out = tmp_path / "killed"
    part = out / "answers.part.jsonl"
    command = [sys.executable, "-m", "eval.generate", "--policy", policies[0], "--prompts", prompts, "--out", out]
    child = subprocess.Popen(
        [*map(str, command), "--seed", "0", "--max-new-tokens", str(LONGEST), *options],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while child.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= 7):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == ["answers.part.jsonl", "plan.json"]
    assert answer("killed", *options).read_bytes() == undisturbed


def test_done_already(answer) -> None:
    """A second run leaves the file alone; damaged answers are generated again."""
    path = answer("out")
    before, time_of = path.read_bytes(), path.stat().st_mtime_ns
    assert answer("out").stat().st_mtime_ns == time_of
    path.write_bytes(before[:-20])
    assert answer("out").read_bytes() == before


GOOD = {"id": "a", "prompt": [{"role": "user", "content": "x"}]}
LONG = {"id": "b", "prompt": [{"role": "user", "content": "x y " * 40}]}
BAD = {
    "not JSON": ('{"id": "a"', ":1: not JSON"),
    "no id": (json.dumps({"prompt": GOOD["prompt"]}), ":1: the id"),
    "no prompt": (json.dumps({"id": "a"}), ":1: prompt must be"),
    "nothing to answer": (json.dumps({"id": "a", "prompt": [{"role": "assistant", "content": "x"}]}), ":1: "),
    "the same id twice": (json.dumps(GOOD) + "\n" + json.dumps(GOOD), ":2: the id"),
    "too long": (json.dumps(GOOD) + "\n" + json.dumps(LONG), "'b': the prompt has"),
    "empty": ("\n", "no prompts"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts_are_refused(case, run, policies, tmp_path) -> None:
    """A bad line, an id twice or a prompt over the limit: one line with file, line or id, exit code 2, no answers."""
    text, reason = BAD[case]
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    words = ("--policy", policies[0], "--prompts", path, "--out", tmp_path / "out", "--max-prompt-tokens", 64)
    assert reason in run(generate.main, *words, "--greedy").refusal
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_bad_settings_are_refused(run, policies, prompts, tmp_path) -> None:
    """Nothing to generate, no prompts file, no policy, a damaged policy: one line and exit code 2 each."""
    words = ("--prompts", prompts, "--out", tmp_path / "out")
    assert "nothing to generate" in run(generate.main, "--policy", policies[0], *words).refusal
    assert "no such" in run(generate.main, "--policy", tmp_path / "none", *words, "--greedy").refusal
    missing = ("--prompts", tmp_path / "none.jsonl", "--out", tmp_path / "out", "--greedy")
    assert "no such file" in run(generate.main, "--policy", policies[0], *missing).refusal
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in policies[0].iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "model.safetensors").write_bytes((policies[0] / "model.safetensors").read_bytes()[:5000])
    assert "cannot be loaded" in run(generate.main, "--policy", damaged, *words, "--greedy").refusal
