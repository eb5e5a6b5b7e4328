"""Table 3, reasoning: math and logic through lm-eval, code through evalplus, of policies that were trained before.

Run through scripts/table3.sh. Every stage is one command of the project, skipped where it is done already (see
scripts/reproduce.py). At the tiny scale the questions are the miniature's: its arithmetic has the form of GSM8K, its
functions that of HumanEval.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from reproduce import Progress, Stage, manifest, run_all, stage, table_stages  # noqa: E402

from data_prep.files import InputError, read_jsonl, run_command, write_text  # noqa: E402
from eval.intervals import paired_difference  # noqa: E402
from eval.records import METHODS, REGIMES, Score, pool, read_scores  # noqa: E402

# Questions of a benchmark, and assumed tokens of a prompt and of an answer (not measured; BBH's prompt has 3 shots).
SIZES = {
    "gsm8k": (1319, 900, 200), "math": (5000, 120, 350), "gsm_plus": (10552, 120, 250), "svamp": (1000, 80, 120),
    "asdiv": (618, 80, 120), "theoremqa": (800, 130, 350), "bbh": (6511, 1000, 200),
    "humaneval": (164, 200, 250), "leetcode": (180, 500, 350),
}  # fmt: skip
REASONING = ("bbh", "gsm_plus", "math", "theoremqa", "svamp", "asdiv", "gsm8k")
CODE = {"humaneval": "HumanEvalPlus.jsonl", "leetcode": "leetcode.jsonl"}
# New tokens a second and GPU-hours' price are the user's; these speeds are assumed for transformers on one H100
# (mistral-7b) and four (mixtral-8x7b), in batches of 16, and not measured.
SPEED, GPUS = {"mistral-7b": 300, "mixtral-8x7b": 150}, {"mistral-7b": 1, "mixtral-8x7b": 4}
BYTES_AN_ANSWER = 4000  # samples, answers and verdicts of a question
ROWS = ("sft", "dpo", "nca")  # of the paper's Table 3
SHOWN = {  # benchmark and metric of a column
    "tiny": [("arithmetic", "strict-match"), ("arithmetic", "flexible-extract"), ("functions", "pass@1")],
    "paper": [
        ("bbh", "substring"), ("leetcode", "pass@1"), ("humaneval", "pass@1"), ("gsm_plus", "math_verify"),
        ("math", "math_verify"), ("theoremqa", "answer"), ("svamp", "math_verify"), ("asdiv", "math_verify"),
        ("gsm8k", "flexible-extract"),
    ],
}  # fmt: skip


def tiny_stages(seed: int, runs: Path, out: Path) -> Iterator[Stage]:
    """The stages of one seed of the miniature; InputError where its policies are missing."""
    root, label = runs / f"seed-{seed}", f"seed {seed}:"
    prompts = root / "world" / "prompts-test.jsonl"
    policies = {"mu": root / "sft" / "policy"}
    policies |= {f"{m}-{r}": root / "runs" / f"{m}-{r}" / "policy" for r in REGIMES for m in METHODS}
    answers = {name: root / "answers" / name / "answers.jsonl" for name in policies}
    missing = [path for path in (prompts, *policies.values(), *answers.values()) if not path.exists()]
    if missing:
        quick = " --quick" if runs.name == "quick" else ""
        words = f"bash scripts/reproduce.sh{quick} --seeds {seed + 1} --runs {shlex.quote(str(runs))}"
        raise InputError(f"{missing[0]}: not there ({len(missing)} files are missing); {words} makes them")
    data, problems = out / f"seed-{seed}" / "data", out / f"seed-{seed}" / "data" / "functions.jsonl"
    questions = data / "arithmetic" / "test.jsonl"
    yield stage(f"{label} arithmetic", "eval.tasks.miniature", [prompts], [questions], prompts=prompts, out=data)
    yield stage(f"{label} functions", "eval.code", [prompts], [problems], "tiny", prompts=prompts, out=problems)
    for name, policy in policies.items():
        folder = out / f"seed-{seed}" / name
        yield stage(
            f"{label} reasoning of {name}", "eval.reasoning", [policy, questions],
            [folder / "reasoning" / file for file in ("scores.jsonl", "samples.jsonl")],
            "--name", name, policy=policy, tasks="arithmetic", data=data, seed=seed, batch=64, out=folder / "reasoning",
        )  # fmt: skip
        yield stage(
            f"{label} code of {name}", "eval.code", [answers[name], manifest(answers[name]), problems],
            [folder / "code" / "scores.jsonl"],
            "--name", name, answers=answers[name].parent, problems=problems, benchmark="functions", seed=seed,
            parallel=1, out=folder / "code",
        )  # fmt: skip


def paper_stages(scale: str, policies: dict[str, tuple[str, str | None]], data: str, out: Path) -> Iterator[Stage]:
    """The stages at the paper's scale. policies: folder or Hub id, and the commit of the latter, by name."""
    for benchmark, file in CODE.items():
        problems, prompts = Path(data, "code", file), out / "prompts" / f"{benchmark}.jsonl"
        yield stage(
            f"prompts of {benchmark}", "eval.code", [problems], [prompts],
            "prompts", problems=problems, benchmark=benchmark, out=prompts,
        )  # fmt: skip
    for name, (policy, revision) in policies.items():
        model = {"policy": policy, **({"policy_revision": revision} if revision else {})}
        source = [] if revision else [Path(policy)]
        folder = out / name
        yield stage(
            f"reasoning of {name}", "eval.reasoning", source,
            [folder / "reasoning" / file for file in ("scores.jsonl", "samples.jsonl")],
            "--name", name, **model, tasks=",".join(REASONING), data=data, scale=scale, out=folder / "reasoning",
        )  # fmt: skip
        for benchmark, file in CODE.items():
            problems, prompts = Path(data, "code", file), out / "prompts" / f"{benchmark}.jsonl"
            answers = folder / f"answers-{benchmark}" / "answers.jsonl"
            drawn = {"samples": 1, "temperature": 0.2} if benchmark == "humaneval" else {"greedy": True}
            yield stage(
                f"answers of {name}, {benchmark}", "eval.generate", [*source, prompts], [answers, manifest(answers)],
                **model, prompts=prompts, **drawn, max_prompt_tokens=2048, max_new_tokens=1024, batch=16,
                out=answers.parent,
            )  # fmt: skip
            yield stage(
                f"code of {name}, {benchmark}", "eval.code", [answers, manifest(answers), problems],
                [folder / benchmark / "scores.jsonl"],
                "--name", name, answers=answers.parent, problems=problems, benchmark=benchmark, scale=scale,
                out=folder / benchmark,
            )  # fmt: skip


def show_plan(stages: list[Stage], scale: str, policies: int) -> None:
    """Print the commands, and what they will take."""
    for number, planned in enumerate(stages, start=1):
        command = shlex.join([planned.module, *planned.arguments])
        print(f"[{number}/{len(stages)}] {planned.name}\n    python -m {command}")
    if scale == "tiny":
        print("\n2 to 3 s of one core for each policy's arithmetic and about as much for its functions; no download")
        return
    items = sum(n for n, _, _ in SIZES.values())
    read, new = (sum(size[0] * size[i] for size in SIZES.values()) for i in (1, 2))
    hours = new / SPEED[scale] / 3600 * GPUS[scale]
    print("\n| benchmark | questions | prompt tokens | new tokens |\n|---|---|---|---|")
    for name, (n, prompt, answer) in SIZES.items():
        print(f"| {name} | {n:,} | {n * prompt:,} | {n * answer:,} |")
    print(
        f"\nfor each of {policies} policies: {items:,} questions, {read / 1e6:.1f} million prompt tokens and "
        f"{new / 1e6:.1f} million new ones (assumed lengths)\n"
        f"GPU hours: {hours:.0f} a policy, {hours * policies:.0f} in all, if {GPUS[scale]} H100 give {SPEED[scale]} "
        f"new tokens a second (assumed, not measured)\n"
        f"disk: {items * BYTES_AN_ANSWER * policies / 1e6:.0f} MB of results, besides the models\n"
        "no judge, no API, no money"
    )


def document(scale: str, scores: list[Score], samples: dict[str, dict[str, int]]) -> str:
    """table3.md. samples: for each policy, the verdicts of its first column's items, by seed and item."""
    columns = SHOWN["tiny" if scale == "tiny" else "paper"]
    found: dict[tuple[str, str, str], dict[int, Score]] = {}
    for score in scores:
        # of the miniature's functions there are greedy and sampled answers; HumanEval is sampled, as in the paper
        if score.decoding == "greedy" or score.benchmark == "humaneval":
            found.setdefault((score.policy, score.benchmark, score.metric.partition(", ")[0]), {})[score.seed] = score
    policies = list(dict.fromkeys(score.policy for score in scores))
    lines = [
        f"# Reasoning, {scale}", "",
        "Per cent right with 95 % intervals: over questions (exact binomial) for one seed, Student's t over seeds for",
        "more. The last column: the first column's difference to DPO on the same questions, with its bootstrap",
        "interval and the p-value of a sign-flip test.", "",
        "| policy | " + " | ".join(f"{benchmark}, {metric}" for benchmark, metric in columns) + " | to DPO |",
        "|---" * (len(columns) + 2) + "|",
    ]  # fmt: skip
    for policy in policies:
        cells = []
        for benchmark, metric in columns:
            by_seed = found.get((policy, benchmark, metric))
            if not by_seed:
                cells.append("-")
                continue
            first = by_seed[min(by_seed)]
            values = [100 * by_seed[seed].value for seed in sorted(by_seed)]
            cells.append(pool(values, (100 * first.low, 100 * first.high)).show(1))
        regime = policy.rpartition("-")[2]
        rival = samples.get(f"dpo-{regime}", samples.get("dpo"))
        if rival is None or policy.partition("-")[0] == "dpo" or policy not in samples:
            cells.append("-")
        else:
            keys = sorted(rival)
            pair = paired_difference([samples[policy][k] for k in keys], [rival[k] for k in keys])
            cells.append(
                f"{100 * pair.difference:+.1f} [{100 * pair.low:+.1f}, {100 * pair.high:+.1f}], p = {pair.p_value:.3f}"
            )
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def collect(scale: str, stages: list[Stage], out: Path) -> Path:
    """Write scores.jsonl and table3.md from the finished stages' outputs."""
    files = [path for planned in stages for path in planned.outputs if path.name == "scores.jsonl"]
    scores = [score for path in files for score in read_scores(path)]
    first, metric = SHOWN["tiny" if scale == "tiny" else "paper"][0]
    samples: dict[str, dict[str, int]] = {}
    for path in files:
        if path.parent.name != "reasoning":
            continue
        score = read_scores(path)[0]
        for _, sample in read_jsonl(path.parent / "samples.jsonl"):
            if sample["benchmark"] == first:
                key = f"{score.seed}/{sample['id']}"
                samples.setdefault(score.policy, {})[key] = sample["verdicts"][metric]
    write_text(out / "scores.jsonl", "".join(path.read_text(encoding="utf-8") for path in files))
    write_text(out / "table3.md", document(scale, scores, samples))
    return out / "table3.md"


def _policy(text: str) -> tuple[str, tuple[str, str | None]]:
    name, equals, where = text.partition("=")
    if not equals or not where:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=DIR, or NAME=HUB_ID@COMMIT")
    source, at, revision = where.rpartition("@")
    return name, (source, revision) if at else (where, None)


def main() -> None:
    """Make the table, or show the plan."""
    parser = argparse.ArgumentParser(prog="bash scripts/table3.sh", description="Reasoning: Table 3.")
    parser.add_argument("--scale", required=True, choices=("tiny", *SPEED))
    parser.add_argument("--seeds", type=int, default=1, help="tiny: how many, from 0 on (default 1)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="tiny: folder of scripts/reproduce.sh (default runs/tiny)")
    parser.add_argument("--policy", type=_policy, action="append", metavar="NAME=DIR", help="or NAME=HUB_ID@COMMIT")
    parser.add_argument("--data", default="data/reasoning", help="local files, see python -m eval.reasoning --help")
    parser.add_argument("--out", type=Path, help="folder (default RUNS/table3, or runs/SCALE/table3)")
    parser.add_argument("--jobs", type=int, default=2, help="tiny: stages at a time")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what they take; run nothing")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.jobs < 1:
        raise InputError("--seeds and --jobs must be at least 1")
    scale, runs = arguments.scale, arguments.runs or Path("runs") / arguments.scale
    out = arguments.out or runs / "table3"
    stages = [stage("self-test", "eval.selftest", [], [])]
    if scale == "tiny":
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            stages += tiny_stages(seed, runs, out)
        policies = 1 + len(METHODS) * len(REGIMES)
    else:
        chosen = dict(arguments.policy or ())
        if not chosen and not arguments.dry_run:
            raise InputError("no policies: give --policy NAME=DIR for each (NAME sft, dpo and nca as in Table 3)")
        chosen = chosen or {name: (str(runs / name / "policy"), None) for name in ROWS}
        stages += paper_stages(scale, chosen, arguments.data, out)
        policies = len(chosen)
    if arguments.dry_run:
        show_plan(stages, scale, policies)
        return
    # The self-test comes first, and alone: nothing is spent if a scorer is wrong.
    progress = Progress(out / "stages")
    run_all(stages[:1], progress, 1)
    run_all(stages[1:], progress, arguments.jobs if scale == "tiny" else 1)
    table = collect(scale, stages, out)
    found = [path for planned in stages for path in planned.outputs if path.name == "scores.jsonl"]
    # The committed records, and the table with the paper's values, in results/ (or, with --runs or --out, beside them).
    beside = out / "results" if arguments.out else arguments.runs and arguments.runs / "results" / "table3"
    results = beside or Path("results") / scale / "table3"
    run_all(list(table_stages("table3", scale, found, results, folders=[out])), progress, 1)
    print(f"{results / 'table3.md'}: the same beside the paper's")
    print(f"{table}: written\n\n{table.read_text(encoding='utf-8')}", end="")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_command(main)
