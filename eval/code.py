"""Code benchmarks: HumanEval, HumanEval+ and LeetCode, from answers to scores.

    python -m eval.code prompts --problems FILE --benchmark humaneval --out PROMPTS     # then eval.generate
    python -m eval.code --answers DIR --problems FILE --benchmark humaneval --name NAME --out DIR
    python -m eval.code tiny --prompts FILE --out FILE     # the miniature's functions as such problems

`paper`: HumanEval (164 problems; temperature 0.2, 1024 new tokens, one sample) and LeetCode (180 of DeepSeek-Coder's
contest set as Eurus ships it; greedy, 1024). `extension`: HumanEval+, and sanitized programs.

What a program is: the first fenced block of the answer, else the whole answer (`raw`); or what `evalplus.sanitize`
makes of the answer (`sanitized`). A program that does not define the function stands behind the problem's stub.

Programs and reference solutions run in `eval.sandbox`, in one sandbox for the base inputs and another for the added
ones, with evalplus's time limits (per input: 1 s, or 4 times the reference solution; in all at most 60 s). Their
outputs are compared by evalplus's own `untrusted_check`, to which a function is given that returns what was recorded:
evalplus runs programs in the process that knows the expected outputs, where they could find them. HumanEval/32 is
judged here by its own rule (|polynomial at the root found| <= atol), as evalplus 0.3.1 fails every answer to it. The
plus verdict is of base and added inputs together. LeetCode's assertions run here, with calls into the sandbox; common
imports, which LeetCode provides, are put before a program.

pass@1 is the share of correct samples, with its exact binomial interval for one sample a problem, else a bootstrap
over problems; pass@k is evalplus's unbiased estimate. An interrupted command continues after the last verdict.
"""

import argparse
import ast
import ctypes
import dataclasses
import gzip
import json
import math
import multiprocessing
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.files import InputError, read_json, read_jsonl, run_command, to_json, write_json, write_jsonl
from data_prep.manifest import plan, read_manifest, up_to_date, write_manifest
from data_prep.miniature import functions
from data_prep.rows import read_prompts
from eval.checks import Check
from eval.intervals import binomial_interval, bootstrap_interval
from eval.records import Score
from eval.sandbox import Limits, Outcome, Program, level, run_program

LABELS = {"humaneval": "paper", "humaneval+": "extension", "leetcode": "paper", "functions": "extension",
          "functions+": "extension"}  # fmt: skip
FIELDS = {
    "humaneval": ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol"),
    "leetcode": ("task_id", "prompt_sft", "test"),
}
FIELDS["functions"] = FIELDS["humaneval"]
EXTRACTIONS = ("raw", "sanitized")
KS = (1, 5, 10, 100)
MEMORY_MB = 2048
LEETCODE_SECONDS = 10.0
FIND_ZERO = "find_zero"
# No names of operator and few of math: they would hide built-ins such as pow.
LEETCODE_IMPORTS = """\
from typing import *
from collections import *
from functools import *
from itertools import *
from heapq import *
from bisect import *
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, sqrt
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
"""
# Added inputs of the miniature's functions. Every list has n itself and something that passes each filter.
PLUS_NUMBERS = (-7, 1, 3, 20)
PLUS_OFFSETS = ((2, -3, 0, 4), (0, 10, -1), (-7, 0, 1, -2, 3, 6))

Problem = dict[str, Any]
Verdict = dict[str, Any]


def read_problems(path: Path | str, benchmark: str) -> list[Problem]:
    """Problems in the layout of evalplus (humaneval, functions) or of Eurus (leetcode), .jsonl or .jsonl.gz."""
    problems, seen = [], set()
    for number, problem in _lines(Path(path)):
        missing = [field for field in FIELDS[benchmark] if field not in problem]
        if missing:
            raise InputError(f"{path}:{number}: no {', '.join(missing)}; give a file in the layout of {benchmark}")
        if problem["task_id"] in seen:
            raise InputError(f"{path}:{number}: {problem['task_id']} stands twice; remove one")
        seen.add(problem["task_id"])
        problems.append(problem)
    if not problems:
        raise InputError(f"{path}: no problems")
    return problems


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix != ".gz":
        yield from read_jsonl(path)
        return
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not readable as gzipped JSON lines ({error}); renew it") from None


def prompt_of(problem: Problem, benchmark: str) -> list[dict[str, str]]:
    """Chat messages that ask for a program."""
    if benchmark == "leetcode":
        text = problem["prompt_sft"]  # has its own instruction and stub
    else:
        text = (
            "Complete this Python function. Answer with the whole function, imports included, in one fenced block.\n\n"
            f"```python\n{problem['prompt'].strip()}\n```"
        )
    return [{"role": "user", "content": text}]


def raw_program(answer: str) -> str:
    """The first fenced block (up to the end where it is not closed), else the whole answer."""
    block = re.search(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", answer, re.DOTALL)
    return block.group(1) if block else answer


def program_of(problem: Problem, benchmark: str, answer: str, extraction: str) -> str:
    """The program that an answer gives; may be empty or no Python."""
    from evalplus.sanitize import sanitize

    entry = "Solution" if benchmark == "leetcode" else problem["entry_point"]
    defines = re.compile(rf"^[ \t]*(?:def|class)\s+{re.escape(entry)}\b|^{re.escape(entry)}\s*=", re.MULTILINE)
    stub = "" if benchmark == "leetcode" else problem["prompt"]
    program = raw_program(answer)
    if extraction == "raw":
        program = program if defines.search(program) else stub + program
    else:
        try:
            text = answer if defines.search(answer) else stub + program
            program = sanitize(text, entrypoint=entry)
        except Exception:  # of its parser, on odd text
            program = ""
    return LEETCODE_IMPORTS + program if benchmark == "leetcode" else program


def _outputs(source: str, entry: str, inputs: list, seconds: list[float], unsafe: bool) -> tuple[Outcome, list]:
    """Run a program on the inputs; its outputs, as far as it came."""
    found: list[Any] = []

    def check(program: Program) -> None:
        for arguments, limit in zip(inputs, seconds, strict=True):
            found.append(program.call(entry, args=arguments, seconds=limit))

    total = min(60.0, sum(seconds)) + 1
    limits = Limits(seconds=total, cpu_seconds=math.ceil(total) + 1, memory_mb=MEMORY_MB)
    return run_program(source, check, limits=limits, unsafe=unsafe), found


class Reference:
    """Expected outputs of one problem and the time limit of each input, from its canonical solution."""

    def __init__(self, problem: Problem, unsafe: bool) -> None:
        self.problem, self.unsafe = problem, unsafe
        self.source = problem["prompt"] + problem["canonical_solution"]
        self._known: dict[str, tuple[list, list[float]]] = {}

    def of(self, part: str) -> tuple[list, list[float]]:
        """Expected outputs and seconds for "base" or "plus"; InputError where the canonical solution fails."""
        if part not in self._known:
            inputs = self.problem[f"{part}_input"]
            outcome, outputs, seconds = self._run(inputs)
            if outcome.verdict != "passed":
                raise InputError(
                    f"{self.problem['task_id']}: its canonical solution does not run ({outcome.reason}); "
                    "mend or remove the problem"
                )
            self._known[part] = outputs, seconds
        return self._known[part]

    def _run(self, inputs: list) -> tuple[Outcome, list, list[float]]:

        outputs, seconds = [], []

        def check(program: Program) -> None:
            for arguments in inputs:
                began = time.monotonic()
                outputs.append(program.call(self.problem["entry_point"], args=arguments))
                seconds.append(max(1.0, 4 * (time.monotonic() - began)))

        limits = Limits(seconds=240, cpu_seconds=240, memory_mb=2 * MEMORY_MB)
        return run_program(self.source, check, limits=limits, unsafe=self.unsafe), outputs, seconds

    def judge(self, program: str, part: str) -> tuple[str, str]:
        """Verdict and reason of a program on the base or plus inputs."""
        from evalplus.eval import untrusted_check

        entry, inputs = self.problem["entry_point"], self.problem[f"{part}_input"]
        if not inputs:
            return "passed", ""
        expected, seconds = self.of(part)
        outcome, outputs = _outputs(program, entry, inputs, seconds, self.unsafe)
        if outcome.verdict != "passed":
            return outcome.verdict, outcome.reason
        if entry == FIND_ZERO:
            right = all(map(_is_root, inputs, outputs, [self.problem["atol"]] * len(inputs)))
            return ("passed", "") if right else ("failed", "wrong answer")
        verdict, _ = untrusted_check(
            "humaneval", f"def {entry}(recorded): return recorded", [[output] for output in outputs], entry,
            expected=expected, atol=self.problem["atol"], ref_time=[0.0] * len(inputs), fast_check=True,
        )  # fmt: skip
        return ("passed", "") if verdict == "pass" else ("failed", "wrong answer")


def _is_root(arguments: list, root: Any, atol: float) -> bool:
    from evalplus.eval._special_oracle import _poly  # the order of its sum decides at the largest coefficients

    if isinstance(root, bool) or not isinstance(root, int | float):
        return False
    try:
        return bool(abs(_poly(*arguments, root)) <= atol)
    except (OverflowError, ValueError):
        return False


def _judge_leetcode(problem: Problem, program: str, unsafe: bool) -> tuple[str, str]:
    tests = compile(problem["test"], problem["task_id"], "exec")

    def check(running: Program) -> None:
        class Solution:
            def __getattr__(self, method: str) -> Any:
                return running.function("Solution", method)

        exec(tests, {"Solution": Solution})  # the data set's, trusted; it meets only plain values of the program

    limits = Limits(seconds=LEETCODE_SECONDS, cpu_seconds=math.ceil(LEETCODE_SECONDS), memory_mb=MEMORY_MB)
    outcome = run_program(program, check, limits=limits, unsafe=unsafe)
    return outcome.verdict, outcome.reason


def judge_problem(work: tuple[Problem, str, list[tuple[dict[str, Any], str]], bool]) -> list[Verdict]:
    """Verdicts of (answer, extraction) pairs of one problem, in their order; equal programs are run once."""
    problem, benchmark, items, unsafe = work
    reference = None if benchmark == "leetcode" else Reference(problem, unsafe)
    known: dict[str, dict[str, str]] = {}  # by what Python makes of the program: no comments, no layout
    verdicts = []
    for answer, extraction in items:
        program = program_of(problem, benchmark, answer["response"], extraction)
        same = _parsed(program)
        if same not in known:
            found = {"base": "failed", "plus": "failed", "reason": "empty"}
            if reference is None and program != LEETCODE_IMPORTS:
                verdict, reason = _judge_leetcode(problem, program, unsafe)
                found = {"base": verdict, "plus": verdict, "reason": reason}
            elif reference is not None and program.strip():
                verdict, reason = reference.judge(program, "base")
                found = {"base": verdict, "plus": verdict, "reason": reason}
                if verdict == "passed":
                    verdict, reason = reference.judge(program, "plus")
                    found |= {"plus": verdict, "reason": reason and f"added inputs: {reason}"}
            known[same] = found
        verdicts.append({
            "id": answer["id"], "decoding": answer["decoding"], "sample": answer["sample"],
            "extraction": extraction, **known[same],
        })  # fmt: skip
    return verdicts


def _parsed(program: str) -> str:
    try:
        return ast.dump(ast.parse(program))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return program


def key_of(record: dict[str, Any]) -> tuple[str, str, int]:
    """What an answer or verdict is of: problem, decoding, sample."""
    return record["id"], record["decoding"], record["sample"]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    multiprocessing.set_start_method("fork", force=True)  # evalplus starts a process for each check
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # no worker outlives a killed parent


def judge_all(
    problems: list[Problem], benchmark: str, answers: list[dict[str, Any]], part: Path, *, parallel: int, unsafe: bool
) -> list[Verdict]:
    """Verdicts of all answers, in the order of problems. `part` collects whole problems meanwhile."""
    done: dict[str, list[Verdict]] = {}
    if part.exists():
        for line in part.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                verdicts = json.loads(line)["verdicts"]
                done[verdicts[0]["id"]] = verdicts
    work = []
    for problem in problems:
        own = sorted((a for a in answers if a["id"] == problem["task_id"]), key=key_of)
        if problem["task_id"] not in done:
            work.append((problem, benchmark, [(a, extraction) for a in own for extraction in EXTRACTIONS], unsafe))
    write_jsonl(part, ({"verdicts": verdicts} for verdicts in done.values()))  # without a cut last line
    bar = tqdm(total=len(problems), initial=len(done), desc=f"judge {benchmark}", unit="problem")
    with open(part, "a", encoding="utf-8") as file, bar:
        for verdicts in _map(work, parallel):
            file.write(to_json({"verdicts": verdicts}) + "\n")
            file.flush()
            done[verdicts[0]["id"]] = verdicts
            bar.update()
    return [verdict for problem in problems for verdict in done[problem["task_id"]]]


def _map(work: list, parallel: int) -> Iterator[list[Verdict]]:
    if parallel == 1 or len(work) < 2:
        multiprocessing.set_start_method("fork", force=True)  # as in the workers below
        yield from map(judge_problem, work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parallel, mp_context=context, initializer=_start_worker) as pool:
        yield from pool.map(judge_problem, work)


def measure(verdicts: list[Verdict], benchmark: str, *, scale: str, seed: int, name: str, manifest: str) -> list[Score]:
    """pass@k for each decoding, set of inputs and extraction."""
    from evalplus.eval import estimate_pass_at_k

    judge = "tests of the data set" if benchmark == "leetcode" else f"evalplus {metadata.version('evalplus')}"
    scores = []
    for decoding in sorted({verdict["decoding"] for verdict in verdicts}):
        for part in ("base", "plus") if benchmark != "leetcode" else ("base",):
            for extraction in EXTRACTIONS:
                by_id: dict[str, list[bool]] = {}
                for verdict in verdicts:
                    if (verdict["decoding"], verdict["extraction"]) == (decoding, extraction):
                        by_id.setdefault(verdict["id"], []).append(verdict[part] == "passed")
                samples = min(map(len, by_id.values()))
                for k in (k for k in KS if k <= samples):
                    counts = [len(right) for right in by_id.values()]
                    values = estimate_pass_at_k(counts, [sum(right) for right in by_id.values()], k).tolist()
                    if samples == max(counts) == 1:
                        low, high = binomial_interval(round(sum(values)), len(values))
                    else:
                        low, high = bootstrap_interval(values)
                    scores.append(Score(
                        scale=scale, seed=seed, policy=name, decoding=decoding,
                        benchmark=benchmark + ("+" if part == "plus" else ""),
                        metric=f"pass@{k}" + ("" if extraction == "raw" else "_sanitized"), judge=judge,
                        n=len(values), value=math.fsum(values) / len(values), low=low, high=high, manifest=manifest,
                    ))  # fmt: skip
    return scores


def read_answers(path: Path, problems: list[Problem]) -> list[dict[str, Any]]:
    """Answers to the problems (those to other prompts are left out); InputError where one is missing or twice."""
    ids = {problem["task_id"] for problem in problems}
    answers: dict[tuple[str, str, int], dict[str, Any]] = {}
    for number, answer in read_jsonl(path):
        if not {"id", "decoding", "sample", "response"} <= set(answer):
            raise InputError(f"{path}:{number}: not an answer of eval.generate; generate it again")
        if key_of(answer) in answers:
            raise InputError(f"{path}:{number}: a second answer {key_of(answer)}; generate it again")
        if answer["id"] in ids:
            answers[key_of(answer)] = answer
    shapes = {(decoding, sample) for _, decoding, sample in answers}
    missing = [
        key for key in ((name, *shape) for name in sorted(ids) for shape in sorted(shapes)) if key not in answers
    ]
    if missing or not answers:
        first = f"{missing[0]}" if missing else "all"
        raise InputError(f"{path}: {len(missing) or len(ids)} answers are missing ({first}); generate them")
    return list(answers.values())


def tiny_problems(prompts: list[dict[str, Any]]) -> list[Problem]:
    """The miniature's function tasks as problems in the layout of evalplus."""
    problems = []
    for item in prompts:
        truth = item.get("truth", {})
        if truth.get("source") != functions.SOURCE:
            continue
        plus: list[Any] = list(PLUS_NUMBERS)
        if truth["argument"] == "xs":
            plus = [[truth["plan"]["n"] + offset for offset in offsets] for offsets in PLUS_OFFSETS]
        problems.append({
            "task_id": item["id"], "prompt": "", "entry_point": "f", "contract": "", "atol": 0,
            "canonical_solution": functions.demonstrate(truth, random.Random(0), 0.0) + "\n",
            "base_input": [[value] for value, _ in truth["tests"]], "plus_input": [[value] for value in plus],
        })  # fmt: skip
    return problems


def selftest(unsafe: bool = False) -> list[Check]:
    """Canonical solutions score 100, empty answers 0, forged verdicts 0; with problems made up here."""
    stub = "def twice(x):\n    "
    problem = {
        "task_id": "made-up/0", "prompt": stub, "entry_point": "twice", "canonical_solution": "return 2 * x\n",
        "base_input": [[1], [2.5]], "plus_input": [[-3], ["ab"]], "atol": 0,
    }  # fmt: skip
    contest = {
        "task_id": "made-up/1", "prompt_sft": "", "test": "s = Solution()\nassert s.half(**{'x': 4}) == 2\n"
    }  # fmt: skip
    forged = "import os\nprint('passed')\nos._exit(0)\n"
    cases = [
        ("humaneval, canonical solution", problem, "humaneval", stub + "return 2 * x\n", 100.0),
        ("humaneval, empty answer", problem, "humaneval", "", 0.0),
        ("humaneval, forged verdict", problem, "humaneval", forged, 0.0),
        ("leetcode, right answer", contest, "leetcode",
         "```python\nclass Solution:\n    def half(self, x):\n        return x // 2\n```", 100.0),
        ("leetcode, empty answer", contest, "leetcode", "", 0.0),
        ("leetcode, forged verdict", contest, "leetcode", forged, 0.0),
    ]  # fmt: skip
    checks = []
    for name, made_up, benchmark, text, expected in cases:
        answer = {"id": made_up["task_id"], "decoding": "greedy", "sample": 0, "response": text}
        verdicts = judge_problem((made_up, benchmark, [(answer, extraction) for extraction in EXTRACTIONS], unsafe))
        for verdict in verdicts:
            found = 100.0 * (verdict["plus"] == "passed")
            checks.append(Check(f"{name}, {verdict['extraction']}", expected, found))
    return checks


def _parse() -> tuple[str, argparse.Namespace]:
    command = sys.argv[1] if sys.argv[1:2] in (["prompts"], ["tiny"]) else "judge"
    parser = argparse.ArgumentParser(prog="python -m eval.code" + ("" if command == "judge" else f" {command}"))
    parser.add_argument("--out", required=True, help="directory" if command == "judge" else "file")
    if command == "tiny":
        parser.add_argument("--prompts", required=True, help="of the miniature, with their truths")
    else:
        parser.add_argument("--problems", required=True, help=".jsonl or .jsonl.gz")
        parser.add_argument("--benchmark", required=True, choices=sorted(FIELDS))
    if command == "judge":
        parser.add_argument("--answers", required=True, help="directory, from eval.generate")
        parser.add_argument("--name", default="given", help="of the policy, for the records")
        parser.add_argument("--scale", default="tiny", help="for the records")
        parser.add_argument("--seed", type=int, default=0, help="for the records")
        parser.add_argument("--parallel", type=int, default=2, help="programs at once")
        parser.add_argument("--unsafe", action="store_true", help="run programs even where no sandbox is to be had")
    return command, parser.parse_args(sys.argv[1 if command == "judge" else 2 :])


def main() -> None:
    """Judge the answers, or write prompts or problems."""
    command, arguments = _parse()
    if command == "tiny":
        problems = tiny_problems(read_prompts(arguments.prompts))
        if not problems:
            raise InputError(f"{arguments.prompts}: no function tasks; give prompts of the miniature world")
        print(f"{write_jsonl(arguments.out, problems)} problems in {arguments.out}")
        return
    problems = read_problems(arguments.problems, arguments.benchmark)
    if command == "prompts":
        prompts = [{"id": p["task_id"], "prompt": prompt_of(p, arguments.benchmark)} for p in problems]
        print(f"{write_jsonl(arguments.out, prompts)} prompts in {arguments.out}")
        return
    if arguments.parallel < 1:
        raise InputError("--parallel must be at least 1")
    out, answers_file = Path(arguments.out), Path(arguments.answers) / "answers.jsonl"
    in_force = level(arguments.unsafe)
    settings = {"benchmark": arguments.benchmark, "name": arguments.name, "scale": arguments.scale,
                "seed": arguments.seed, "sandbox": in_force, "evalplus": metadata.version("evalplus")}  # fmt: skip
    planned = plan("eval.code", settings, {"answers": answers_file, "problems": arguments.problems})
    if up_to_date(out, planned):
        print(f"{out}: done already, nothing to do")
        return
    answers = read_answers(answers_file, problems)
    manifest = read_manifest(arguments.answers)["hash"]
    out.mkdir(parents=True, exist_ok=True)
    part = out / "verdicts.part.jsonl"
    if not (out / "plan.json").exists() or read_json(out / "plan.json") != planned:
        part.unlink(missing_ok=True)  # of other answers, or judged by other code
        write_json(out / "plan.json", planned)
    verdicts = judge_all(
        problems, arguments.benchmark, answers, part, parallel=arguments.parallel, unsafe=arguments.unsafe
    )
    scores = measure(
        verdicts,
        arguments.benchmark,
        scale=arguments.scale,
        seed=arguments.seed,
        name=arguments.name,
        manifest=manifest,
    )
    write_jsonl(out / "verdicts.jsonl", verdicts)
    write_jsonl(out / "scores.jsonl", map(dataclasses.asdict, scores))
    facts = {
        "problems": len(problems), "answers": len(answers), "sandbox": in_force,
        "labels": {score.benchmark: LABELS[score.benchmark] for score in scores},
        "verdicts": {v: sum(verdict["base"] == v for verdict in verdicts) for v in ("passed", "failed", "timeout")},
    }  # fmt: skip
    write_manifest(out, planned, outputs=["verdicts.jsonl", "scores.jsonl"], facts=facts)
    part.unlink()
    for score in scores:
        print(
            f"{score.benchmark} {score.metric}, {score.decoding}: {score.value:.4f} [{score.low:.4f}, {score.high:.4f}]"
        )


if __name__ == "__main__":
    run_command(main)
