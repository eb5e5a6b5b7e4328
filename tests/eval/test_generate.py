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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats

from data_prep.files import sha256_text
from data_prep.manifest import read_manifest
from data_prep.rows import Row
from eval import generate
from train.engine.models import Checkpoint
from train.engine.sampling import sample
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
def two_turns(tmp_path: Path) -> Path:
    """Prompts of one and two turns, some with a temperature of their own: three kinds of batches."""
    path = tmp_path / "two-turns.jsonl"
    lines = []
    for i, (name, chat) in enumerate(CHATS.items()):
        more = {} if i == 1 else {"follow_ups": [f"And {i} more?"]}
        own = {} if i in (0, 4) else {"temperature": 0.5 if i % 2 else 0.7}
        lines.append(json.dumps({"id": name, "prompt": chat, **more, **own}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def answer(run, policies, prompts, tmp_path):
    """Run eval.generate into a folder and return its answers file."""

    def call(out: str, *more: Any, policy: Path = policies[0], seed: int = 0, file: Path = prompts) -> Path:
        words = ("--policy", policy, "--prompts", file, "--out", tmp_path / out, "--seed", seed)
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


@pytest.mark.parametrize("turn", [1, 2])
def test_killed(turn, answer, policies, prompts, two_turns, tmp_path) -> None:
    """SIGKILL in the middle, of the first turns or of the second ones: no answers and no manifest are left, and the
    same command ends with the same bytes."""
    options = ("--greedy", "--samples", "24" if turn == 1 else "8", "--batch", "2")
    prompts = two_turns if turn == 2 else prompts
    undisturbed = answer("undisturbed", *options, file=prompts).read_bytes()
    firsts = len(lines_of(tmp_path / "undisturbed" / "answers.jsonl")) // 2 if turn == 2 else 0
    out = tmp_path / "killed"
    part = out / "answers.part.jsonl"
    command = [sys.executable, "-m", "eval.generate", "--policy", policies[0], "--prompts", prompts, "--out", out]
    child = subprocess.Popen(
        [*map(str, command), "--seed", "0", "--max-new-tokens", str(LONGEST), *options],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while child.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= firsts + 7):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == ["answers.part.jsonl", "plan.json"]
    assert answer("killed", *options, file=prompts).read_bytes() == undisturbed


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


def test_second_turns_see_the_first_answers(answer, policies, two_turns) -> None:
    """A greedy second answer is that of a plain loop over the whole conversation, encoded as in training; prompts
    without a follow-up have one turn."""
    model, tokenizer = Checkpoint(str(policies[0])).load()
    model.eval()
    encoder = Encoder(tokenizer, 4096, LONGEST)
    found = lines_of(answer("out", "--greedy", "--batch", 3, file=two_turns))
    assert [(a["id"], a["turn"]) for a in found] == [
        (name, turn) for name in CHATS for turn in ((1,) if name == "p1" else (1, 2))
    ]
    said = {(a["id"], a["turn"]): a for a in found}
    for i, (name, chat) in enumerate(CHATS.items()):
        if name == "p1":
            continue
        first = {"role": "assistant", "content": said[name, 1]["response"]}
        ids = encoder.prompt([*chat, first, {"role": "user", "content": f"And {i} more?"}], name)[1]
        drawn: list[int] = []
        while len(drawn) < LONGEST and tokenizer.eos_token_id not in drawn:
            with torch.no_grad():
                drawn.append(model(torch.tensor([ids + drawn])).logits[0, -1].argmax().item())
        assert said[name, 2]["response"] == tokenizer.decode(drawn, skip_special_tokens=True)


def test_a_prompt_may_prescribe_its_temperature(answer, run, policies, tmp_path) -> None:
    """Temperature 0 on a line is the greedy answer, 0.7 is not; both are called prescribed, others sampled."""
    path = tmp_path / "own.jsonl"
    kinds = [0, 0.7, None] * 2
    path.write_text("".join(
        json.dumps({"id": str(i), "prompt": CHATS["p4"], **({} if own is None else {"temperature": own})}) + "\n"
        for i, own in enumerate(kinds)
    ))  # fmt: skip
    found = lines_of(answer("own", "--greedy", "--samples", 1, file=path))
    greedy = {a["id"]: a["response"] for a in found if a["decoding"] == "greedy"}
    assert len(set(greedy.values())) == 1
    for i, own in enumerate(kinds):
        (drawn,) = (a for a in found if a["id"] == str(i) and a["decoding"] != "greedy")
        assert drawn["decoding"] == ("sampled" if own is None else "prescribed")
        assert (drawn["response"] == greedy[str(i)]) == (own == 0)
    words = ("--policy", policies[0], "--prompts", path, "--out", tmp_path / "copies", "--samples", 2)
    assert "would be equal" in run(generate.main, *words).refusal


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"temperature": -1}, "has temperature -1"),
        ({"temperature": "hot"}, "has temperature 'hot'"),
        ({"temperature": True}, "has temperature True"),
        ({"follow_ups": "more"}, "follow_ups must be"),
        ({"follow_ups": [1]}, "follow_ups must be"),
    ],
)
def test_bad_keys_of_a_prompt_are_refused(more, reason, run, policies, tmp_path) -> None:
    """A temperature that is none, follow-ups that are no texts: one line with the prompt's id, before any work."""
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({**GOOD, **more}))
    words = ("--policy", policies[0], "--prompts", path, "--out", tmp_path / "out", "--samples", 1)
    refusal = run(generate.main, *words).refusal
    assert reason in refusal
    assert "'a'" in refusal
    assert not (tmp_path / "out").exists()


def test_interrupted_second_turns(answer, policies, two_turns, tmp_path) -> None:
    """Cut anywhere in the first or the second turns, it continues to the bytes of an undisturbed run."""
    options = ("--greedy", "--samples", 1, "--batch", 4)
    decoding = generate.Decoding(True, 1, 1.0, 512, LONGEST, 4, 0)
    engine = generate.transformers_engine(Checkpoint(str(policies[0])), "float32", decoding)
    path = tmp_path / "whole.jsonl"
    generate.generate(*engine, generate.read_tasks(two_turns), decoding, path)
    whole = path.read_bytes()
    undisturbed = answer("out", *options, file=two_turns).read_bytes()
    for cut in random.Random(1).sample(range(len(whole)), 6):
        answers = interrupted(answer("out", *options, file=two_turns), whole[:cut])
        assert answer("out", *options, file=two_turns).read_bytes() == undisturbed, cut
        assert not (answers.parent / "answers.part.jsonl").exists()


def test_the_manifest_shows_what_the_model_was_sent(answer, policies) -> None:
    """The first prompt's ids are in the manifest, with one BOS, and decode to the chat template's text."""
    facts = read_manifest(answer("out").parent)["identity"]["facts"]
    _, tokenizer = Checkpoint(str(policies[0])).load()
    sent = facts["first_prompt"]
    assert sent["id"] == "p0"
    assert sent["bos"] == 1
    assert tokenizer.decode(sent["ids"]) == tokenizer.apply_chat_template(
        CHATS["p0"], tokenize=False, add_generation_prompt=True
    )
    assert facts["chat_template_sha256"] == sha256_text(tokenizer.chat_template)


def test_bfloat16_is_another_computation(answer) -> None:
    """--dtype decides the answers' identity: it is in the manifest, and float32 answers are not taken for it."""
    answer("out", "--greedy")
    before = read_manifest(answer("out", "--greedy").parent)
    after = read_manifest(answer("out", "--greedy", "--dtype", "bfloat16").parent)
    assert [m["identity"]["settings"]["dtype"] for m in (before, after)] == ["float32", "bfloat16"]


def test_an_adapter_answers_on_its_base(answer, policies, tmp_path) -> None:
    """An adapter directory's greedy answers are those of the model it merges to, not those of its base."""
    base = Checkpoint(str(policies[0]))
    model, tokenizer = base.load()
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapted.save_pretrained(adapter)
    recorded = {"name": base.name, "revision": None, "digest": base.digest, "quantized": None}
    (adapter / "base.json").write_text(json.dumps(recorded))
    adapted.merge_and_unload().save_pretrained(merged)
    for folder in (adapter, merged):
        tokenizer.save_pretrained(folder)
    found = {name: answer(name, "--greedy", policy=folder).read_bytes() for name, folder in
             (("a", adapter), ("m", merged), ("b", policies[0]))}  # fmt: skip
    assert found["a"] == found["m"] != found["b"]


def test_vllm_is_optional(run, policies, prompts, tmp_path, monkeypatch) -> None:
    """Without vLLM installed, --engine vllm is refused in one line."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    words = ("--policy", policies[0], "--prompts", prompts, "--out", tmp_path / "out", "--greedy", "--engine", "vllm")
    assert "vLLM is not installed" in run(generate.main, *words).refusal


def test_vllm_is_sent_ids(answer, policies, monkeypatch) -> None:
    """vLLM gets the ids of training, not text that it would put a second BOS before, and a seed for each answer; a
    stand-in for the package that answers as transformers does leaves the same file."""
    model, tokenizer = Checkpoint(str(policies[0])).load()
    sent: list[tuple[list[int], Any]] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            assert options["generation_config"] == "vllm"
            assert options["trust_remote_code"] is False

        def get_tokenizer(self) -> Any:
            return tokenizer

        def generate(self, prompts: list[dict[str, Any]], options: list[Any], use_tqdm: bool) -> list[Any]:
            sent.extend((prompt["prompt_token_ids"], option) for prompt, option in zip(prompts, options, strict=True))
            ids = [prompt["prompt_token_ids"] for prompt in prompts]
            drawn = sample(model, tokenizer, ids, max_new_tokens=LONGEST, temperature=0.0, seed=0)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(found))]) for found in drawn]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **o: SimpleNamespace(**o)))
    path = answer("vllm", "--greedy", "--engine", "vllm")
    encoder = Encoder(tokenizer, 512, LONGEST)
    assert sorted(ids for ids, _ in sent) == sorted(encoder.prompt(chat, name)[1] for name, chat in CHATS.items())
    assert all((o.temperature, o.top_p, o.top_k, o.max_tokens) == (0.0, 1.0, -1, LONGEST) for _, o in sent)
    assert len({option.seed for _, option in sent}) == len(sent)
    assert path.read_bytes() == answer("transformers", "--greedy").read_bytes()
