"""The miniature world: its truths, its scores, its splits and its files, against independent oracles."""

import itertools
import json
import operator
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.files import InputError, read_jsonl
from data_prep.manifest import read_manifest
from data_prep.miniature import arithmetic, collect, functions, instructions, safe_code, world
from data_prep.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"n_demonstrations": 400, "n_train": 60, "n_heldout": 30, "n_test": 60}
families = pytest.mark.parametrize("family", world.FAMILIES.values(), ids=world.FAMILIES)


def draws(family, count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [family.draw(rng) for _ in range(count)]


# Truths


@families
def test_perfect_demonstrations(family):
    """A demonstration without slips is correct and scores exactly 10, for every kind of prompt."""
    rng = random.Random(0)
    for truth in draws(family, 2000):
        response = family.demonstrate(truth, rng, slip=0.0)
        assert world.correct(truth, response), (truth, response)
        assert world.score(truth, response) == 10


@families
def test_weights(family):
    """The weights of the aspects sum to 1, so scores run from 1 to 10; each prompt is plain ASCII."""
    assert sum(family.ASPECTS.values()) == pytest.approx(1)
    assert all(truth["prompt"].isascii() and truth["source"] == family.SOURCE for truth in draws(family, 200))


@families
def test_truth_survives_json(family):
    """A truth read back from JSON is the same, so scores do not depend on whether it went through a file."""
    for truth in draws(family, 200):
        assert json.loads(json.dumps(truth)) == truth


def test_arithmetic_truth():
    """The answer equals Python's value of the expression that the words of the prompt describe."""
    for truth in draws(arithmetic, 2000):
        x, y, z = re.findall(r"\d+", truth["prompt"])
        if "finds" in truth["prompt"]:
            expression = f"{x} + {y} - {z}"
        else:
            expression = f"{x} * {y} + {z}" if "bags" in truth["prompt"] else f"({x} - {y}) * {z}"
        assert truth["answer"] == eval(expression) > 0, truth


def number_by_words(words: str, x: int) -> int:
    """Apply `add 3, then square it` to x, reading nothing but the words."""
    for step in words.split(", then "):
        match step.split():
            case ["square", _]:
                x = x**2
            case ["negate", _]:
                x = 0 - x
            case [verb, *_, n]:
                x = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}[verb](x, int(n))
    return x


def list_by_words(words: str, items: list[int]) -> int:
    """Evaluate `the largest of the squares of the numbers above 4`, reading nothing but the words."""
    n = int(words.split()[-1])
    keep = {"above": range(n + 1, 10**4), "below": range(-(10**4), n), "multiples": range(-n * 999, n * 999, n)}
    items = [item for item in items if item in next(keep[word] for word in keep if word in words)]
    power, factor = 2 if "squares" in words else 1, -1 if "negatives" in words else 2 if "doubles" in words else 1
    items = sorted(factor * item**power for item in items)
    return {"largest": items[-1], "smallest": items[0], "sum": sum(items), "count": len(items)}[words.split()[1]]


def test_functions_truth():
    """What a function should return equals an evaluation of the prompt's words; there are 3 to 6 tests."""
    for truth in draws(functions, 3000):
        argument, words = re.fullmatch(r"Write f\((\w+)\): (.+)\.", truth["prompt"]).groups()
        by_words = list_by_words if argument == "xs" else number_by_words
        assert 3 <= len(truth["tests"]) <= 6
        for item, expected in truth["tests"]:
            assert by_words(words, item) == expected, truth


def is_marked(truth: dict) -> bool | None:
    """Whether the family's systematic slip belongs to this prompt; None where it may change nothing."""
    match truth["source"]:
        case "arithmetic":
            return "finds" in truth["prompt"]
        case "instructions":
            return "four" in truth["prompt"]
    if re.search("(largest|smallest).*(above|below)", truth["prompt"]):
        return None
    return re.search("above|below", truth["prompt"]) is not None


@families
def test_systematic_slip(family):
    """On the marked prompts, 20 to 40 % of all, the usual demonstration is wrong; elsewhere it is right."""
    truths = draws(family, 1000)
    assert 0.2 < sum(is_marked(truth) is True for truth in truths) / len(truths) < 0.4
    rng = random.Random(1)
    for truth in [truth for truth in truths if is_marked(truth) is not None][:40]:
        shown = [family.demonstrate(truth, rng, 0.35) for _ in range(400)]
        if family is instructions:  # the items are drawn freely, so whole texts are rarely equal
            lengths = (len(re.findall("[A-Za-z]+", text.removeprefix("Sure!"))) for text in shown)
            usual, _ = Counter(lengths).most_common(1)[0]
            right = usual == truth["count"]
        else:
            usual, _ = Counter(shown).most_common(1)[0]
            right = family.correct(truth, usual)
        assert right == (not is_marked(truth)), (truth["prompt"], usual)


# Scores

CHANGE = {"source": "arithmetic", "template": "change", "steps": [[7, "+", 5, 12], [12, "-", 3, 9]], "answer": 9}
ADD_SQUARE = {"source": "functions", "argument": "x", "tests": [[0, 9], [2, 25], [-3, 0]]}
FRUITS = {"source": "instructions", "count": 3, "category": "fruits", "case": "capital letters",
          "separator": "-", "ending": "."}  # fmt: skip

BY_HAND = [
    (CHANGE, "7 + 5 = 12. 12 - 3 = 9. #### 9", 10, True),
    (CHANGE, "12 - 3 = 9. #### 9", 9.1, True),  # half of the steps
    (CHANGE, "7 + 5 = 12. 12 - 3 = 9. 9", 8.65, False),  # no mark
    (CHANGE, "7 + 5 = 12. 12 - 3 = 9. #### 9 pens", 8.65, False),
    (CHANGE, "#### 9", 6.85, True),
    (CHANGE, "#### 8 #### 9", 5.5, False),  # hedged
    (CHANGE, "7 + 5 = 12. 12 + 3 = 15. #### 15", 4.6, False),
    (CHANGE, "7 + 5 = 13. 13 - 3 = 10. #### 10", 3.025, False),  # one of two equations holds
    (CHANGE, "", 1, False),
    (ADD_SQUARE, "def f(x):\n    x = x + 3\n    return x * x", 10, True),
    (ADD_SQUARE, "def f(x):\n    return (x + 3) * (3 + x)", 10, True),
    (ADD_SQUARE, "def f(x):\n    return 9", 4.9, False),  # one test of three
    (ADD_SQUARE, "def f(x):\n    x = x * x\n    return x + 3", 4.15, False),  # swapped: runs, no test passes
    (ADD_SQUARE, "def f(x):\n    return x % x", 3.1, False),  # divides by zero, one test passes
    (ADD_SQUARE, "def f(x):\n    x = x + 3\n    x * x", 2.35, False),  # no return
    (ADD_SQUARE, "def f(z):\n    return z", 2.35, False),  # another argument than the prompt's
    (ADD_SQUARE, "def f(x)\n    return x", 1, False),  # does not parse
    (FRUITS, "APPLE-KIWI-PLUM.", 10, True),
    (FRUITS, " APPLE - KIWI - PLUM.\n", 10, True),  # spaces do not matter
    (FRUITS, "-APPLE-KIWI-PLUM.", 8.65, False),  # more than the list
    (FRUITS, "APPLE-KIWI-PLUM", 8.2, False),
    (FRUITS, "APPLE-KIWI-BEAR.", 8.05, False),
    (FRUITS, "APPLE-KIWI-KIWI.", 7.75, False),
    (FRUITS, "apple-kiwi-plum.", 7.3, False),
    (FRUITS, "APPLE,KIWI,PLUM.", 7.3, False),
    (FRUITS, "APPLE-KIWI.", 6.85, False),
    (FRUITS, "Sure! APPLE-KIWI-PLUM.", 5.6125, False),
    (FRUITS, "12 - 3", 1, False),
]


@pytest.mark.parametrize(("truth", "response", "score", "correct"), BY_HAND)
def test_scores_by_hand(truth, response, score, correct):
    """Scores and correctness are those worked out by hand from the stated weights."""
    assert world.score(truth, response) == pytest.approx(score)
    assert world.correct(truth, response) is correct


@families
@given(text=st.one_of(st.text(st.characters()), st.text("def f(xs):\n =+-*[]forin<>#0123456789.#APLE,\x00٣é")))
@settings(max_examples=300, deadline=None)
def test_any_string_scores(family, text):
    """Scoring takes any string, lone surrogates and null bytes too, and gives exactly the stated aspects."""
    for truth in draws(family, 3):
        found = family.aspects(truth, text)
        assert found.keys() == family.ASPECTS.keys()
        assert all(0 <= value <= 1 for value in found.values())
        assert 1 <= world.score(truth, text) <= 10
        assert not world.correct(truth, text) or world.score(truth, text) > 5


HOSTILE = [
    "import os\nos.system('touch escaped')",
    "def f(x):\n    import os\n    return os.system('touch escaped')",
    "def f(x=open('escaped', 'w')):\n    return x",
    "@open('escaped', 'w')\ndef f(x):\n    return x",
    "def f(x: open('escaped', 'w')):\n    return x",
    "def f(x) -> open('escaped', 'w'):\n    return x",
    "def f(x):\n    return x\nopen('escaped', 'w')",
    "def f(x):\n    return x.__class__.__base__.__subclasses__()",
    "def f(x):\n    return __import__('os')",
    "def f(x):\n    return sum.__self__",
    "def f(x):\n    return (lambda: f(x))()",
    "f = lambda x: x",
    "def f(x):\n    while True: pass",
    "def f(x):\n    return f(x)",
    "def f(x):\n    return 9**9**9**9",
    "def f(x):\n    return 9 << 9999999999",
    "def f(x):\n    return sum([1] * 99999999999)",
    "def f(xs):\n    return sum(xs * 99999999999)",
    "def f(xs):\n    xs = [xs for x in xs]\n    return sum(xs)",
    "def f(xs):\n    ys = xs + xs\n    return len(ys)",
    "def f(x):\n    return sum(range(10**12))",
    "def f(xs):\n    sum = xs\n    return sum(xs)",
    "def f(xs):\n    return max(xs, key=f)",
    "def f(xs):\n    return f'{xs.__class__}'",
    "async def f(x):\n    return x",
    "def f(x):\n    yield x",
    "def f(x):\n    global f\n    return x",
    "def f(x):\n    return (x := 3)",
    "def f(x):\n    assert 0\n    return x",
    "class f:\n    pass",
    "(" * 100000,
    "-" * 100000 + "1",
    "9" * 100000,
    "def f(x):\n    return " + "9" * 100000,
    "[" * 60 + "]" * 60,
    "\x00def f(x):\n    return x",
    "\udcff",
    "x" * 10**6,
    " " * 10**6 + "#### " + " " * 10**6,
    "1 + " * 10**5 + "####" * 10**5,
    "-" * 10**6,
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE)
@pytest.mark.parametrize("argument", ["x", "xs"])
def test_hostile_code(source, argument, tmp_path, monkeypatch):
    """Code outside the grammar is refused before it runs: nothing happens, nothing hangs, f has no value."""
    truth = next(t for t in draws(functions, 50) if t["argument"] == argument)
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    assert functions.aspects(truth, source)["runs"] == 0
    for family in (arithmetic, instructions):
        family.aspects(draws(family, 1)[0], source)
    assert time.perf_counter() - started < 1
    assert not list(tmp_path.iterdir())


COSTLY = [
    "def f(x):\n x = " + "*".join("x" * 18) + "\n x = " + "*".join("x" * 16) + "\n return " + "*".join("x" * 12),
    "def f(xs):\n    return " + "sum([" * 5 + "1" + "for x in xs])" * 5,
    "def f(x):\n    return " + "-" * 90 + "x",
]


@pytest.mark.parametrize("source", COSTLY)
def test_costly_code(source):
    """The costliest code that the grammar admits is run, in well under a second."""
    argument = "xs" if "xs" in source else "x"
    tree = safe_code.parse(source)
    assert safe_code.is_allowed(tree, argument), source
    started = time.perf_counter()
    assert None not in safe_code.run(tree, argument, [[9] * 5] * 6 if argument == "xs" else [11] * 6)
    assert time.perf_counter() - started < 0.5


def test_safe_code_is_python():
    """Where code is allowed, its values are those of plain Python; where it runs plainly, it is allowed."""
    rng = random.Random(3)
    for truth in draws(functions, 500):
        source = functions.demonstrate(truth, rng, 0.5)
        inputs = [item for item, _ in truth["tests"]]
        names: dict = {}
        try:
            exec(source, names)
            expected = [names["f"](item) for item in inputs]
        except (SyntaxError, ValueError):
            continue
        assert safe_code.run(safe_code.parse(source), truth["argument"], inputs) == expected, source


# Splits and files


@families
def test_enough_prompts(family):
    """A family has prompts enough for 100 distinct test and 80 distinct held-out ones, with room to spare."""
    found = Counter(world.split_of(prompt) for prompt in {t["prompt"] for t in draws(family, 40000)})
    assert found["test"] > 120
    assert found["heldout"] > 100


def test_split_is_fixed():
    """The split of a prompt is a fixed function of its text; its shares are 10, 20 and 70 %."""
    pinned = {"d": "heldout", "l": "heldout", "j": "test", "m": "test", "q": "train", "n": "train"}  # by sha256sum
    assert {text: world.split_of(text) for text in pinned} == pinned
    found = Counter(world.split_of(f"prompt {i}") for i in range(10000))
    assert found["heldout"] == pytest.approx(1000, abs=120)
    assert found["test"] == pytest.approx(2000, abs=160)


def read(directory: Path, name: str) -> list[dict]:
    return [record for _, record in read_jsonl(directory / name)]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    assert world.build(directory, seed=0, **SMALL)
    return directory


def test_splits_do_not_overlap(built):
    """No prompt is in two of train, held-out and test, nor in the demonstrations unless it is a train one."""
    texts = {
        name: [record["prompt"][0]["content"] for record in read(built, f"{name}.jsonl")]
        for name in ("demonstrations", "prompts-train", "prompts-heldout", "prompts-test")
    }
    for one, other in itertools.combinations(texts, 2):
        if {one, other} != {"demonstrations", "prompts-train"}:
            assert not set(texts[one]) & set(texts[other]), (one, other)
    for name in ("prompts-heldout", "prompts-test"):
        assert len(set(texts[name])) == len(texts[name])


def test_splits_do_not_overlap_between_seeds(built, tmp_path):
    """A test or held-out prompt of one seed is never trained on under another seed."""
    world.build(tmp_path, seed=1, **SMALL)
    prompts = read(built, "prompts-heldout.jsonl") + read(built, "prompts-test.jsonl")
    measured = {record["truth"]["prompt"] for record in prompts}
    trained = read(tmp_path, "demonstrations.jsonl") + read(tmp_path, "prompts-train.jsonl")
    assert not measured & {record["prompt"][0]["content"] for record in trained}


def test_files(built):
    """Sizes, mix, fields and ids are as documented; the manifest counts what is on disk."""
    shown = read(built, "demonstrations.jsonl")
    assert Counter(record["source"] for record in shown) == {"arithmetic": 200, "functions": 100, "instructions": 100}
    assert set(shown[0]) == {"id", "prompt", "response", "source"}
    counts = {"demonstrations": len(shown)}
    for split in world.SPLITS:
        prompts = read(built, f"prompts-{split}.jsonl")
        counts[split] = len(prompts)
        assert set(Counter(record["source"] for record in prompts).values()) == {len(prompts) // 3}
        assert len({record["id"] for record in prompts}) == len(prompts)
        for record in prompts:
            assert set(record) == {"id", "prompt", "source", "truth"}
            assert record["prompt"] == [{"role": "user", "content": record["truth"]["prompt"]}]
    assert prompts[0]["id"] == "test-arithmetic-0000"
    assert read_manifest(built)["identity"]["facts"] == counts


def command(*words: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=60)  # fmt: skip


def test_same_seed_same_bytes(built, tmp_path):
    """Another process with the same seed writes the same bytes; another seed does not; a repeat does nothing."""
    sizes = [word for name, n in SMALL.items() for word in (name.replace("n_", "--"), n)]
    for attempt in ("written", "up to date"):
        done = command("data_prep.miniature", "--out", tmp_path / "a", *sizes, PYTHONHASHSEED="7")
        assert done.returncode == 0, done.stderr
        assert attempt in done.stdout
    world.build(tmp_path / "b", seed=1, **SMALL)
    for file in built.glob("*.jsonl"):
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
        assert file.read_bytes() != (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("option", "size"), [("--train", 4), ("--test", 0), ("--demonstrations", 6), ("--heldout", 9000)]
)
def test_bad_sizes(option, size, tmp_path):
    """Sizes that cannot be met end in one line that names the option or the family, and exit code 2."""
    done = command("data_prep.miniature", "--out", tmp_path, "--demonstrations", 4, "--train", 3, option, size)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert (option if size < 9000 else "functions") in done.stderr


# Collecting answers


def write_answers(path: Path, answers: list[dict]) -> Path:
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return path


def sampled(built: Path) -> list[dict]:
    """Three imperfect answers to each test prompt, in no order, with a key to ignore."""
    rng, answers = random.Random(5), []
    for record in read(built, "prompts-test.jsonl"):
        family = world.FAMILIES[record["source"]]
        for sample in (2, 0, 1):
            response = family.demonstrate(record["truth"], rng, 0.35)
            answers.append({"id": record["id"], "sample": sample, "response": response, "tokens": 9})
    rng.shuffle(answers)
    return answers


def test_collect_counts_everything(built, tmp_path):
    """Kept plus dropped is what was read, for responses and for prompts; order and rewards are right."""
    answers = sampled(built)
    prompts = {record["id"]: record for record in read(built, "prompts-test.jsonl")}
    first, second = list(prompts)[:2]
    for answer in answers:  # `first` keeps two responses, `second` one
        if (answer["id"], answer["sample"]) in {(first, 0), (second, 0), (second, 2)}:
            answer["response"] = " \n"
    path = write_answers(tmp_path / "answers.jsonl", answers)
    facts = collect.collect(built / "prompts-test.jsonl", path, tmp_path / "out")

    rows = {row.id: row for row in read_rows(tmp_path / "out" / "rows.jsonl")}
    assert facts["rows"] == len(rows) == 59
    assert facts["rows"] + facts["prompts dropped"] == facts["prompts read"] == 60
    assert facts["responses dropped"] == {"empty": 3, "fewer than two left": 1}
    assert facts["responses"] == sum(len(row.responses) for row in rows.values()) == 59 * 3 - 1
    assert facts["responses"] + 3 + 1 == facts["responses read"] == len(answers)
    assert second not in rows
    for row in rows.values():
        mine = sorted((a for a in answers if a["id"] == row.id), key=lambda a: a["sample"])
        assert row.responses == [a["response"] for a in mine if a["response"].strip()]
        assert row.rewards == [world.score(prompts[row.id]["truth"], text) for text in row.responses]
        assert row.prompt == prompts[row.id]["prompt"]
    best = [max(row.rewards) for row in rows.values()]
    assert facts["mean best of K"] == pytest.approx(sum(best) / 59)
    tied = [min(row.rewards) == max(row.rewards) for row in rows.values()]
    assert facts["share of rows tied"] == pytest.approx(sum(tied) / 59)
    assert read_manifest(tmp_path / "out")["identity"]["facts"] == facts
    assert collect.collect(built / "prompts-test.jsonl", path, tmp_path / "out") is None


SPOILED = {
    "unknown id": (lambda answers: answers[4].update(id="nobody"), "answers.jsonl:5"),
    "duplicate": (lambda answers: answers.append(answers[0]), "answers.jsonl:181"),
    "no sample": (lambda answers: answers[2].pop("sample"), "answers.jsonl:3"),
    "response not text": (lambda answers: answers[2].update(response=None), "answers.jsonl:3"),
    "unhashable id": (lambda answers: answers[0].update(id=[]), "answers.jsonl:1"),
    "without answers": (
        lambda answers: answers.__setitem__(slice(None), [a for a in answers if a["id"] != "test-arithmetic-0001"]),
        "prompts-test.jsonl:2",
    ),
    "all empty": (lambda answers: [answer.update(response="") for answer in answers], "answers.jsonl"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_collect_errors(case, built, tmp_path):
    """Bad answers end in one line with file and line number, and nothing is written."""
    spoil, where = SPOILED[case]
    answers = sampled(built)
    spoil(answers)
    path = write_answers(tmp_path / "answers.jsonl", answers)
    with pytest.raises(InputError) as error:
        collect.collect(built / "prompts-test.jsonl", path, tmp_path / "out")
    assert where in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@families
def test_collect_bad_prompts(family, built, tmp_path):
    """A prompt without its id, or with any part of its truth that scoring needs missing, is named by line."""
    path = write_answers(tmp_path / "answers.jsonl", sampled(built))
    good = next(r for r in read(built, "prompts-test.jsonl") if r["source"] == family.SOURCE)
    needed = {
        "arithmetic": ["steps", "answer"],
        "functions": ["argument", "tests"],
        "instructions": ["count", "category", "case", "separator", "ending"],
    }[family.SOURCE]
    without = [{**good, "truth": {k: v for k, v in good["truth"].items() if k != name}} for name in needed]
    for bad in [*without, {**good, "id": []}, {**good, "truth": 3}, {"id": "a"}]:
        prompts = write_answers(tmp_path / "prompts.jsonl", [bad])
        with pytest.raises(InputError, match=r"prompts\.jsonl:1: not a prompt"):
            collect.collect(prompts, path, tmp_path / "out")


def test_collect_command(built, tmp_path):
    """The command prints the facts and ends with 0; with another file as prompts it ends with 2 and one line."""
    path = write_answers(tmp_path / "answers.jsonl", sampled(built))
    words = ["data_prep.miniature.collect", "--answers", path, "--out", tmp_path / "out", "--prompts"]
    done = command(*words, built / "prompts-test.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert "rows 60" in done.stdout
    done = command(*words, built / "demonstrations.jsonl")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*demonstrations\.jsonl:1: .*\n", done.stderr)
