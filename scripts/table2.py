"""Table 2, instruction following: MT-Bench, AlpacaEval 1 and wins against DPO, of policies that were trained before.

Run through scripts/table2.sh. Every stage is one command of the project, skipped where it is done already (see
scripts/reproduce.py). At the tiny scale the questions are the miniature's test prompts, two of a family making one
question of two turns, and the judge is eval.truth_judge, which is asked like any other judge. Wins against DPO are
judged as in AlpacaEval 1, with DPO's answers as the reference; how the paper judged them is not known.
"""

import argparse
import dataclasses
import random
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from reproduce import MAX_TOKENS, Progress, Stage, manifest, run_all, stage, table_stages  # noqa: E402

from data_prep.files import InputError, read_json, run_command, write_jsonl, write_text  # noqa: E402
from data_prep.miniature.world import FAMILIES  # noqa: E402
from data_prep.rows import read_prompts  # noqa: E402
from eval.fastchat import FILES, fetch, locate  # noqa: E402
from eval.intervals import paired_difference  # noqa: E402
from eval.judge import from_arguments  # noqa: E402
from eval.mt_bench import question_means  # noqa: E402
from eval.records import METHODS, REGIMES, Score, pool, read_scores  # noqa: E402
from eval.truth_judge import JUDGE_PROMPTS, TruthJudge  # noqa: E402

MU = "mu"  # the reference policy, that all methods start from
CATEGORIES = {"arithmetic": "math", "functions": "coding", "instructions": "writing"}
QUESTIONS = 26  # two-turn questions of a family, so that there are about as many as in MT-Bench
BENCHMARKS = {"mt_bench": "MT-Bench", "alpaca_eval_1": "AlpacaEval 1", "vs_dpo": "wins against DPO"}

# The paper's scale. The names are those of scripts/train_mistral7b.sh.
SFT_MODEL = "HuggingFaceH4/mistral-7b-sft-beta"
TRAINED = ("dpo", "dpo-x3", "dpo-x6", "ipo", "kto", "nca-pair", "infonca", "nca")
# The reference answers of AlpacaEval 1 are those in its own annotations: the separate file holds other ones.
ALPACA_EVAL = (
    "https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20/results/"
    "zephyr-7b-beta/alpaca_eval_gpt4/annotations.json",
    "004401fcd0a1faae086ba33c612550334ff6954d1989fbc17c29d4d379c38687",
)
# Means of public judgements, at 4 characters a token: 960 of GPT-4 for MT-Bench (jxiw/FastChat), 805 of AlpacaEval 1.
TOKENS = {"mt_bench": (787, 196), "alpaca_eval_1": (873, 40), "vs_dpo": (990, 40)}
CALLS = {"mt_bench": 160, "alpaca_eval_1": 805, "vs_dpo": 805}
ANSWER_TOKENS = 160 * 315 + 805 * 361  # of a policy, from the same files
TOKENS_PER_SECOND = 300  # assumed for one H100 and batches of 16; not measured
TRAINING_HOURS = 52  # on one H100: the sum of the plan of scripts/train_mistral7b.sh, an estimate


@dataclasses.dataclass(frozen=True)
class Policy:
    """One row of the table. source: folder or Hub id. rival: the DPO policy that it is compared with, if any."""

    name: str
    source: str
    rival: str | None
    revision: str | None = None


def tiny_policies(seed_folder: Path) -> list[Policy]:
    """mu and all methods in both regimes, as scripts/reproduce.sh leaves them; InputError if one is absent."""
    found = [Policy(MU, str(seed_folder / "sft" / "policy"), None)]
    for regime in REGIMES:
        for method in METHODS:
            name, rival = f"{method}-{regime}", f"dpo-{regime}"
            policy = seed_folder / "runs" / name / "policy"
            found.append(Policy(name, str(policy), None if name == rival else rival))
    return found


def mistral_policies(runs: Path, revision: str | None) -> list[Policy]:
    """The SFT model and what scripts/train_mistral7b.sh makes of it."""
    trained = [Policy(name, str(runs / name / "policy"), None if name == "dpo" else "dpo") for name in TRAINED]
    return [Policy(MU, SFT_MODEL, "dpo", revision or "COMMIT"), *trained]


def write_tiny_questions(prompts: Path, out: Path) -> None:
    """questions.jsonl, references.jsonl and judge_prompts.jsonl of the miniature, in FastChat's layout."""
    items, rng = read_prompts(prompts), random.Random(0)
    questions, references = [], []
    for source, family in FAMILIES.items():
        own = [item for item in items if item["source"] == source]
        for first, second in zip(own[: 2 * QUESTIONS : 2], own[1 : 2 * QUESTIONS : 2], strict=False):
            turns = [item["prompt"][-1]["content"] for item in (first, second)]
            solved = [family.demonstrate(item["truth"], rng, 0.0) for item in (first, second)]
            questions.append({"question_id": first["id"], "category": CATEGORIES[source], "turns": turns})
            references.append({"question_id": first["id"], "choices": [{"turns": solved}]})
    write_jsonl(out / "questions.jsonl", questions)
    write_jsonl(out / "references.jsonl", references)
    write_jsonl(out / "judge_prompts.jsonl", JUDGE_PROMPTS)


def write_alpaca_eval(annotations: Path, out: Path) -> None:
    """prompts.jsonl and reference.jsonl from annotations of AlpacaEval 1."""
    listed = read_json(annotations)
    prompts = [
        {"id": str(i), "prompt": [{"role": "user", "content": item["instruction"]}]} for i, item in enumerate(listed)
    ]
    write_jsonl(out / "prompts.jsonl", prompts)
    write_jsonl(out / "reference.jsonl", ({"instruction": x["instruction"], "output": x["output_1"]} for x in listed))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the stages of one seed have in common. alpaca: prompts; reference: a file or a folder of answers."""

    scale: str
    seed: int
    work: Path
    files: dict[str, Path]  # of eval.mt_bench
    alpaca: Path
    reference: Path
    judge: dict[str, Any]
    passes: int = 1  # of the judge over MT-Bench

    @property
    def label(self) -> str:
        """The beginning of the stages' names."""
        return f"seed {self.seed}:"


def stages(setting: Setting, policies: list[Policy], answers: dict[str, Path]) -> Iterator[Stage]:
    """From policies to judgements. answers: to the AlpacaEval prompts, by policy, where they are there already."""
    s, tiny = setting, setting.scale == "tiny"
    prompts = s.work / "prompts.jsonl"
    yield stage(f"{s.label} prompts of MT-Bench", "eval.mt_bench", [s.files["questions"]], [prompts], "prompts",
                questions=s.files["questions"], out=prompts)  # fmt: skip
    # FastChat's limit for answers, and that of AlpacaEval's configuration for zephyr-7b-beta, sampled at 0.7.
    size = {"max_new_tokens": MAX_TOKENS} if tiny else {"dtype": "bfloat16", "max_prompt_tokens": 4096, "batch": 16}
    limits = {"mt_bench": {} if tiny else {"max_new_tokens": 1024}, "alpaca": {} if tiny else {"max_new_tokens": 2048}}
    decoding = {"decoding": "greedy"} if tiny else {}
    two_turns, answers = {}, dict(answers)
    for policy in policies:
        own = {"policy": policy.source, **({"policy_revision": policy.revision} if policy.revision else {})}
        needs = [] if policy.revision else [Path(policy.source)]
        two_turns[policy.name] = out = s.work / "answers-mt_bench" / policy.name / "answers.jsonl"
        yield stage(
            f"{s.label} MT-Bench answers of {policy.name}", "eval.generate", [prompts, *needs], [out, manifest(out)],
            **own, prompts=prompts, samples=1, seed=s.seed, **size, **limits["mt_bench"], out=out.parent,
        )  # fmt: skip
        if policy.name not in answers:
            answers[policy.name] = out = s.work / "answers-alpaca" / policy.name / "answers.jsonl"
            yield stage(
                f"{s.label} AlpacaEval answers of {policy.name}", "eval.generate", [s.alpaca, *needs],
                [out, manifest(out)], **own, prompts=s.alpaca, samples=1, temperature=0.7, seed=s.seed, **size,
                **limits["alpaca"], out=out.parent,
            )  # fmt: skip
    for policy in policies:
        common = {"policy": policy.name, "scale": s.scale, "seed": s.seed, **s.judge}
        given, out = two_turns[policy.name], s.work / "mt_bench" / policy.name
        yield stage(
            f"{s.label} MT-Bench of {policy.name}", "eval.mt_bench", [given, manifest(given), *s.files.values()],
            [out / "scores.jsonl", out / "judgements.jsonl"], "judge", answers=given.parent, out=out, **s.files,
            passes=s.passes, **common,
        )  # fmt: skip
        rivals = {"alpaca_eval_1": s.reference}
        if policy.rival:
            rivals["vs_dpo"] = answers[policy.rival].parent
        for benchmark, reference in rivals.items():
            given, out = answers[policy.name], s.work / benchmark / policy.name
            if reference == given.parent:
                continue  # against itself
            other = reference / "answers.jsonl" if s.reference != reference or tiny else reference
            yield stage(
                f"{s.label} {BENCHMARKS[benchmark]} of {policy.name}", "eval.win_rate",
                [given, manifest(given), other, s.alpaca], [out / "scores.jsonl", out / "judgements.jsonl"],
                benchmark=benchmark, answers=given.parent, reference=reference, prompts=s.alpaca, out=out, **decoding,
                **common,
            )  # fmt: skip


def write_table(out: Path, works: dict[int, Path], policies: list[Policy]) -> None:
    """scores.jsonl, table2.csv and table2.md in `out`, over all seeds."""
    paths = {(b, p.name): [work / b / p.name / "scores.jsonl" for work in works.values()] for b in BENCHMARKS
             for p in policies}  # fmt: skip
    scores: list[Score] = [s for found in paths.values() for path in found if path.exists() for s in read_scores(path)]
    write_jsonl(out / "scores.jsonl", map(dataclasses.asdict, scores))
    metrics = [("mt_bench", "score"), ("mt_bench", "score_turn_1"), ("mt_bench", "score_turn_2"),
               ("alpaca_eval_1", "win_rate"), ("vs_dpo", "win_rate")]  # fmt: skip
    csv = ["policy,benchmark,metric,seeds,value,low,high"]
    head = ["policy", "MT-Bench", "turn 1", "turn 2", "against DPO's, p", "AlpacaEval 1, %", "wins against DPO, %"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for policy in policies:
        cells = []
        for benchmark, metric in metrics:
            own = [s for s in scores if (s.policy, s.benchmark, s.metric) == (policy.name, benchmark, metric)]
            if not own:
                cells.append("-")
                continue
            found = pool([s.value for s in own], (own[0].low, own[0].high))
            csv.append(f"{policy.name},{benchmark},{metric},{len(own)},{found.value:.6g},{found.low:.6g},"
                       f"{found.high:.6g}")  # fmt: skip
            scale = 100 if metric == "win_rate" else 1
            show = dataclasses.replace(found, value=scale * found.value, low=scale * found.low, high=scale * found.high)
            cells.append(show.show(1 if metric == "win_rate" else 2))
        cells.insert(3, _difference(works, policy))
        lines.append(f"| {policy.name} | {' | '.join(cells)} |")
    judges = ", ".join(sorted({score.judge for score in scores}))
    note = (
        f"Made by `scripts/table2.sh`; {len(works)} seed{'s' if len(works) > 1 else ''}; judges: {judges}. Means with "
        "95 % intervals: over questions for one seed, Student's t over several. Against DPO's: the difference of "
        "MT-Bench scores to DPO of the same regime and its p-value, paired by question, all seeds together."
    )
    write_text(out / "table2.md", "\n".join([note, "", *lines]) + "\n")
    write_text(out / "table2.csv", "\n".join(csv) + "\n")


def write_results(scale: str, planned: list[Stage], work: Path, arguments: argparse.Namespace) -> None:
    """The committed records and the table with the paper's values, in results/ (or, with --runs, beside the runs)."""
    out = arguments.runs / "results" / "table2" if arguments.runs else Path("results") / scale / "table2"
    out = Path("runs/quick/results/table2") if arguments.quick and not arguments.runs else out
    found = [path for item in planned for path in item.outputs if path.name == "scores.jsonl"]
    run_all(list(table_stages("table2", scale, found, out, folders=[work])), Progress(work / "stages"), 1)
    print(f"see {out / 'table2.md'}: the same beside the paper's")


def _difference(works: dict[int, Path], policy: Policy) -> str:
    """MT-Bench against the rival's, paired by question."""
    if not policy.rival:
        return "-"
    pairs = []
    for work in works.values():
        ours, theirs = (question_means(work / "mt_bench" / name) for name in (policy.name, policy.rival))
        pairs += [(ours[name], theirs[name]) for name in sorted(ours.keys() & theirs.keys())]
    found = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
    return f"{found.difference:+.2f}, {found.p_value:.2g}"


def free_port(file: Path) -> int:
    """The port of an earlier run if it is free, as the judge's address decides which judgements are done; else one
    that is."""
    ports = [int(file.read_text())] if file.exists() and file.read_text().strip().isdigit() else []
    for port in [*ports, 0]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            write_text(file, f"{probe.getsockname()[1]}\n")
            return probe.getsockname()[1]
    raise InputError("no port is free on 127.0.0.1; close something that listens")


def tiny(arguments: argparse.Namespace) -> None:
    """The miniature, with the local judge."""
    runs = arguments.runs or Path("runs/quick" if arguments.quick else "runs/tiny")
    out = runs / "table2"
    policies: dict[int, list[Policy]] = {}
    for seed in range(arguments.seeds):
        folder = runs / f"seed-{seed}"
        policies[seed] = tiny_policies(folder)
        needed = [Path(policy.source) for policy in policies[seed]]
        needed += [folder / "answers" / policy.name / "manifest.json" for policy in policies[seed]]
        absent = next((path for path in needed if not path.exists()), None)
        if absent:
            make = f"bash scripts/reproduce.sh --seeds {arguments.seeds}"
            make += " --quick" if arguments.quick else ""
            make += f" --runs {shlex.quote(str(arguments.runs))}" if arguments.runs else ""
            raise InputError(f"{absent}: not there; make it with: {make}")
    works = {seed: out / f"seed-{seed}" for seed in policies}
    worlds = {seed: runs / f"seed-{seed}" / "world" / "prompts-test.jsonl" for seed in policies}
    port = 0 if arguments.dry_run else free_port(out / "judge-port")
    judge = TruthJudge(list(worlds.values()), port)
    asked = {"judge_url": judge.url, "judge_model": judge.model}
    planned = []
    for seed, work in works.items():
        files = {"questions": work / "questions.jsonl", "references": work / "references.jsonl",
                 "judge_prompts": work / "judge_prompts.jsonl"}  # fmt: skip
        answers = {p.name: runs / f"seed-{seed}" / "answers" / p.name / "answers.jsonl" for p in policies[seed]}
        setting = Setting("tiny", seed, work, files, worlds[seed], answers[MU].parent, asked, arguments.passes)
        planned += stages(setting, policies[seed], answers)
        if not arguments.dry_run:
            write_tiny_questions(worlds[seed], work)
    if arguments.dry_run:
        show(planned)
        print("Judge: local, by the truth; nothing is paid.")
        return
    judge.start()
    try:
        run_all(planned, Progress(out / "stages"), arguments.jobs)
    finally:
        judge.close()
    write_table(out, works, policies[0])
    write_results("tiny", planned, out, arguments)
    print(f"see {out / 'table2.md'}")


def mistral_setting(arguments: argparse.Namespace, work: Path) -> Setting:
    """At the paper's scale, with the judge of `paid_options`."""
    names = ("judge_url", "judge_model", "judge_key_variable", "judge_price_in", "judge_price_out", "budget")
    asked = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    files = {name: arguments.data / "mt_bench" / Path(FILES[name][0]).name for name in FILES}
    alpaca = arguments.data / "alpaca_eval"
    return Setting(
        "mistral-7b", 42, work, files, alpaca / "prompts.jsonl", alpaca / "reference.jsonl", asked, arguments.passes
    )


def prepare_mt_bench(arguments: argparse.Namespace, work: Path) -> None:
    """Check the judge, now and not hours later, and fetch MT-Bench's files."""
    from_arguments(argparse.Namespace(**vars(arguments), concurrency=1), work / "judge.jsonl")
    for name in FILES:
        locate(name, None, arguments.data / "mt_bench")


def mistral(arguments: argparse.Namespace) -> None:
    """The paper's scale, or its plan."""
    if arguments.seeds != 1 or arguments.quick:
        raise InputError(
            "--seeds and --quick are for the tiny scale; the runs of mistral-7b have the recipes' one seed"
        )
    runs, data = arguments.runs or Path("runs"), arguments.data
    policies, work = mistral_policies(runs, arguments.model_revision), runs / "table2"
    planned = list(stages(mistral_setting(arguments, work), policies, {}))
    if arguments.dry_run:
        show_plan(planned, policies, arguments, runs, data)
        return
    if not arguments.model_revision:
        raise InputError(f"--model-revision is needed: the commit of {SFT_MODEL}")
    train = "bash scripts/train_mistral7b.sh"
    for policy in policies:
        if not policy.revision and not Path(policy.source).exists():
            make = f"{train} --model-revision {arguments.model_revision} --runs {shlex.quote(str(runs))} table2"
            raise InputError(f"{policy.source}: no such policy; train it with: {make}")
    alpaca = data / "alpaca_eval"
    prepare_mt_bench(arguments, work)
    annotations = fetch(*ALPACA_EVAL, alpaca / "annotations.json")
    write_alpaca_eval(annotations, alpaca)
    run_all(planned, Progress(work / "stages"), arguments.jobs)
    write_table(work, {42: work}, policies)
    write_results("mistral-7b", planned, work, arguments)
    print(f"see {work / 'table2.md'}")


def show(planned: list[Stage]) -> None:
    """The commands, numbered."""
    for number, item in enumerate(planned, start=1):
        print(f"[{number}/{len(planned)}] {item.name}\n  python -m {item.module} {shlex.join(item.arguments)}")


def show_plan(
    planned: list[Stage], policies: list[Policy], arguments: argparse.Namespace, runs: Path, data: Path
) -> None:
    """Everything that the paper's scale takes; nothing is written, loaded or asked."""
    commit = arguments.model_revision or "COMMIT"
    print(f"before  bash scripts/prepare_data.sh --out {shlex.quote(str(data))}")
    print(f"before  bash scripts/train_mistral7b.sh --model-revision {commit} --runs {shlex.quote(str(runs))} table2")
    print(f"        about {TRAINING_HOURS} H100-hours; with --dry-run it prints steps, memory and disk of each run")
    show(planned)
    total = dict.fromkeys(("calls", "in", "out"), 0)
    for item in planned:
        words = item.arguments
        benchmark = "mt_bench" if words[0] == "judge" else None
        if item.module == "eval.win_rate":
            benchmark = words[words.index("--benchmark") + 1]
        if benchmark:
            calls, (tokens_in, tokens_out) = CALLS[benchmark], TOKENS[benchmark]
            calls *= arguments.passes if benchmark == "mt_bench" else 1
            total["calls"] += calls
            total["in"] += calls * tokens_in
            total["out"] += calls * tokens_out
    usd = (total["in"] * arguments.judge_price_in + total["out"] * arguments.judge_price_out) / 1e6
    hours = len(policies) * ANSWER_TOKENS / TOKENS_PER_SECOND / 3600
    print(f"Judge: {total['calls']:,} calls, about {total['in']:,} tokens in and {total['out']:,} out (means of public "
          f"judgements), about {usd:.0f} USD at {arguments.judge_price_in:g} and {arguments.judge_price_out:g} USD a "
          "million.")  # fmt: skip
    print(f"Answers: about {len(policies) * ANSWER_TOKENS:,} tokens, {hours:.1f} H100-hours at an assumed "
          f"{TOKENS_PER_SECOND} tokens a second, 24 GB of GPU memory.")  # fmt: skip
    print(f"Disk: 15 GB for the SFT model, under 0.2 GB for each adapter, under 0.1 GB for all answers and judgements. "
          f"Free here: {shutil.disk_usage(ROOT).free / 1e9:.0f} GB.")  # fmt: skip
    print("A dry run downloads nothing, writes nothing and asks nobody.")


def paid_options(parser: argparse.ArgumentParser) -> None:
    """The options of the paper's scale: the model, the benchmarks' files, the judge and its price."""
    paid = parser.add_argument_group("mistral-7b")
    paid.add_argument("--model-revision", help=f"commit of {SFT_MODEL}")
    paid.add_argument("--data", type=Path, default=Path("data"), help="folder for the benchmarks' files")
    paid.add_argument("--judge-url", default="https://api.openai.com/v1")
    paid.add_argument("--judge-model", default="gpt-4-0613", help="what gpt-4 was when the paper was written")
    paid.add_argument("--judge-key-variable", default="OPENAI_API_KEY", metavar="NAME", help="holds the key")
    paid.add_argument("--judge-price-in", type=float, default=30.0, metavar="USD", help="for a million tokens read")
    paid.add_argument("--judge-price-out", type=float, default=60.0, metavar="USD", help="for a million written")
    paid.add_argument("--budget", type=float, metavar="USD", help="for each policy and benchmark")


def main() -> None:
    """Make Table 2 at one scale."""
    parser = argparse.ArgumentParser(prog="bash scripts/table2.sh", description="Instruction following: Table 2.")
    parser.add_argument("--scale", required=True, choices=["tiny", "mistral-7b"])
    parser.add_argument("--dry-run", action="store_true", help="print the plan; do nothing")
    parser.add_argument("--seeds", type=int, default=1, help="tiny: how many seeds, from 0 on (default 1)")
    parser.add_argument("--quick", action="store_true", help="tiny: the policies of scripts/reproduce.sh --quick")
    parser.add_argument("--passes", type=int, default=1, help="judgements of each MT-Bench answer (3 show judge noise)")
    parser.add_argument("--runs", type=Path, help="the policies' folder (runs/tiny, runs/quick, or runs)")
    parser.add_argument("--jobs", type=int, help="stages at a time (default 2; 1 for mistral-7b)")
    paid_options(parser)
    arguments = parser.parse_args()
    if min(arguments.seeds, arguments.passes, 1 if arguments.jobs is None else arguments.jobs) < 1:
        raise InputError("--seeds, --passes and --jobs must be at least 1")
    arguments.jobs = arguments.jobs or (2 if arguments.scale == "tiny" else 1)
    (tiny if arguments.scale == "tiny" else mistral)(arguments)


if __name__ == "__main__":
    run_command(main)
