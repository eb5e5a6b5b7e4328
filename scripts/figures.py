"""Figures 2, 4, 5 and 6: the runs behind them, their records, and the figures and tables made from these.

    figure2   likelihood of chosen and rejected responses over training, on pairs: DPO and NCA
    figure5   the same on pairs and on K = 4 rewards, with InfoNCA
    figure4   the best response and 1, 2 or 3 others: score and likelihoods against K
    figure6   score against KL(pi || mu) over alpha and beta, on pairs and on rewards (the latter: Figure 4, right)

Run through scripts/figure2.sh and so on. Every stage is one command of the project, skipped where it is done already
(see scripts/reproduce.py, whose world, reference policy, samples and runs are taken, and made where they are missing).
At the tiny scale all is in the hard regime and the score is the true reward; at mistral-7b it is MT-Bench.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from reproduce import (  # noqa: E402
    PAPER_FIGURE,
    Ground,
    Progress,
    Stage,
    ground_stages,
    judging_stages,
    run_all,
    seed_stages,
    stage,
    table_stages,
    training_stage,
)
from table2 import CALLS, TOKENS, Policy, mistral_setting, paid_options, prepare_mt_bench, show  # noqa: E402
from table2 import stages as table2_stages  # noqa: E402

from data_prep.files import InputError, run_command  # noqa: E402
from eval.grids import GRIDS  # noqa: E402

REGIME = "hard"
TREND_METHODS = {"figure2": ("dpo", "nca_pair"), "figure5": ("dpo", "nca_pair", "infonca", "nca")}
TRAINED = {"figure2": ["table2"], "figure4": ["table2", "figure4"], "figure5": ["table2"], "figure6": ["figure6"]}
MINUTES = {"train.sft": 4.0, "eval.generate": 0.2}  # of one core, for the plan: results/tiny/cost.csv; a run takes 1.2
SCORES = {"tiny": ("all", "reward", "sampled"), "mistral-7b": ("mt_bench", "score", "prescribed")}


def trend_stages(figure: str, seeds: list[int], runs: Path, quick: bool, out: Path) -> Iterator[Stage]:
    """Figures 2 and 5: runs of scripts/reproduce.sh."""
    names, folders, found = [f"{method}-{REGIME}" for method in TREND_METHODS[figure]], [], []
    for seed in seeds:
        root = runs / f"seed-{seed}"
        yield from ground_stages(seed, Ground(root), quick)
        wanted = {f"seed {seed}: {name}" for name in names}
        yield from (planned for planned in seed_stages(seed, root, quick) if planned.name in wanted)
        folders += [root / "runs" / name for name in names]
        found += [root / "runs" / name / file for name in names for file in ("trend.jsonl", "manifest.json")]
    yield from trend_results(figure, folders, found, out)


def trend_results(figure: str, folders: list[str | Path], found: list[Path], out: Path) -> Iterator[Stage]:
    """Records and figure. folders: of the runs; found: their trends and manifests."""
    trend, drawn = out / "trend.jsonl", out / "likelihood_trend"
    records = [trend, out / "manifests.jsonl", out / "cost.csv"]
    yield stage(f"{figure}: records", "eval.collect", found, records, folders=folders, out=out)
    # Figure 2 is laid over the runs; the points of Figure 5 are in no source at hand.
    paper = {"paper": PAPER_FIGURE} if figure == "figure2" else {}
    files = [out / f"{drawn.name}.{ending}" for ending in ("png", "svg", "csv")]
    yield stage(f"{figure}: figure", "eval.figures", [trend, *paper.values()], files, trend=trend, out=drawn, **paper)


def grid_stages(figure: str, seeds: list[int], runs: Path, quick: bool, out: Path) -> Iterator[Stage]:
    """Figures 4 and 6: runs of their own, from the world and the reference policy of scripts/reproduce.sh."""
    work, found = runs / figure, []
    for seed in seeds:
        ground, root, policies = Ground(runs / f"seed-{seed}"), work / f"seed-{seed}", {}
        yield from ground_stages(seed, ground, quick)
        subsets = {4: ground.rows("train")}
        for k in sorted({point.k for point in GRIDS[figure]("tiny") if point.data == "reward"} - {4}):
            subsets[k] = root / f"rows-k{k}" / "rows.jsonl"
            yield stage(
                f"seed {seed}: best response and {k - 1} others", "data_prep.pairs", [subsets[4]], [subsets[k]],
                subsets[4], responses=k, seed=seed, out=subsets[k].parent,
            )  # fmt: skip
        for point in GRIDS[figure]("tiny"):
            run = root / "runs" / point.run
            rows = subsets[point.k] if point.data == "reward" else ground.rows("pairs")
            strength = {"alpha": point.alpha, "beta": point.beta} if figure == "figure6" else {}
            yield training_stage(seed, ground, run, point.method, REGIME, rows, quick, **strength)
            policies[point.policy] = run / "policy"
            found += [run / "trend.jsonl", run / "manifest.json"]
        yield from judging_stages(seed, ground, root, policies)
        found.append(root / "scores" / "scores.jsonl")
    yield from grid_results(figure, "tiny", found, out, runs=work, seeds=seeds)


def grid_results(figure: str, scale: str, found: list[Path], out: Path, **where: object) -> Iterator[Stage]:
    """Records, table and figure. found: scores, trends and manifests; where: how eval.collect is told of them."""
    yield from table_stages(figure, scale, found, out, **where)
    records = [out / f"{name}.jsonl" for name in ("scores", "trend", "manifests")]
    kind, drawn = ("responses", "score_by_k") if figure == "figure4" else ("kl", "score_by_kl")
    benchmark, metric, decoding = SCORES[scale]
    files = [out / f"{drawn}.{ending}" for ending in ("png", "svg", "csv")]
    yield stage(f"{figure}: figure", "eval.figures", records, files, kind, out, out=out / drawn, benchmark=benchmark,
                metric=metric, decoding=decoding)  # fmt: skip


def tiny(figure: str, arguments: argparse.Namespace) -> None:
    """The miniature."""
    runs = arguments.runs or Path("runs/quick" if arguments.quick else "runs/tiny")
    out = arguments.out or (runs / "results" if arguments.quick else Path("results/tiny")) / figure
    make = trend_stages if figure in TREND_METHODS else grid_stages
    planned = list(make(figure, list(range(arguments.seeds)), runs, arguments.quick, out))
    if arguments.dry_run:
        show(planned)
        minutes = sum(MINUTES.get(item.module, 1.2 if item.fresh else 0.05) for item in planned)
        print(f"About {minutes:.0f} minutes of one core if nothing is done yet, 0.6 GB of memory a stage, under 0.1 GB "
              "of disk a seed. No download, no paid judge.")  # fmt: skip
        return
    if shutil.disk_usage(ROOT).free < 2**30:
        raise InputError(f"{ROOT}: less than 1 GB of disk is free; free some and run again")
    # One list of what is done with scripts/reproduce.sh, as they share stages; another for what this script adds.
    shared = [item for item in planned if not {runs / figure, out} & set(item.outputs[0].parents)]
    run_all(shared, Progress(runs / "stages"), arguments.jobs)
    run_all([item for item in planned if item not in shared], Progress(runs / figure / "stages"), arguments.jobs)
    print(f"see {out}")


def mistral(figure: str, arguments: argparse.Namespace) -> None:
    """The paper's scale: trained by scripts/train_mistral7b.sh, judged as in scripts/table2.sh."""
    if arguments.seeds != 1 or arguments.quick:
        raise InputError("--seeds and --quick are for the tiny scale; mistral-7b has the recipes' one seed")
    runs, work = arguments.runs or Path("runs"), (arguments.runs or Path("runs")) / figure
    out = arguments.out or Path("results/mistral-7b") / figure
    revision = ["--model-revision", arguments.model_revision or "COMMIT"]
    train = ["bash", "scripts/train_mistral7b.sh", *revision, "--runs", str(runs), *TRAINED[figure]]
    planned, calls = [], 0
    if figure in TREND_METHODS:
        folders = [runs / method.replace("_", "-") for method in TREND_METHODS[figure]]
        named = [f"{method}-{'preference' if method in TREND_METHODS['figure2'] else 'reward'}={folder}"
                 for method, folder in zip(TREND_METHODS[figure], folders, strict=True)]  # fmt: skip
        found = [folder / file for folder in folders for file in ("trend.jsonl", "manifest.json")]
        planned += trend_results(figure, named, found, out)
    else:
        points = GRIDS[figure]("mistral-7b")
        policies = [Policy(point.policy, str(runs / point.run / "policy"), None) for point in points]
        setting = mistral_setting(arguments, work)
        planned += [item for item in table2_stages(setting, policies, {}) if "MT-Bench" in item.name]
        calls = CALLS["mt_bench"] * len(points) * arguments.passes
        folders = [runs / point.run for point in points]
        judged = [work / "mt_bench" / point.policy for point in points]
        found = [folder / file for folder in folders for file in ("trend.jsonl", "manifest.json")]
        found += [folder / "scores.jsonl" for folder in judged]
        named = [f"{point.policy}={folder}" for point, folder in zip(points, folders, strict=True)]
        planned += grid_results(figure, "mistral-7b", found, out, folders=[*named, *judged])
    print(f"training: {shlex.join(train)}", flush=True)
    if arguments.dry_run:
        print("before it: bash scripts/prepare_data.sh --out data", flush=True)
        _run([*train[:2], "--dry-run", *train[2:]])
        show(planned)
        tokens_in, tokens_out = (calls * tokens for tokens in TOKENS["mt_bench"])
        usd = (tokens_in * arguments.judge_price_in + tokens_out * arguments.judge_price_out) / 1e6
        judged = f"Judge: {calls:,} calls, about {usd:.0f} USD." if calls else "No judge."
        print(f"{judged} Hours, GPU memory and disk of each run are above. A dry run downloads nothing, writes "
              "nothing and asks nobody.")  # fmt: skip
        return
    if not arguments.model_revision:
        raise InputError("--model-revision is needed: the commit of the SFT model; see --dry-run")
    if calls:
        prepare_mt_bench(arguments, work)
    _run(train)
    run_all(planned, Progress(work / "stages"), arguments.jobs)
    print(f"see {out}")


def _run(words: list[str]) -> None:
    """A script of this repository, from its root."""
    code = subprocess.run(words, cwd=ROOT, check=False, env={"PYTHON": sys.executable, **os.environ}).returncode
    if code:
        raise InputError(f"{shlex.join(words)} ended with exit code {code}; its message is above")


def main() -> None:
    """Make one figure at one scale."""
    parser = argparse.ArgumentParser(prog="scripts/figures.py", description="Figures 2, 4, 5 and 6.")
    parser.add_argument("figure", choices=TRAINED)
    parser.add_argument("--scale", required=True, choices=["tiny", "mistral-7b", "mixtral-8x7b"])
    parser.add_argument("--dry-run", action="store_true", help="print the plan; do nothing")
    parser.add_argument("--seeds", type=int, default=1, help="tiny: how many seeds, from 0 on (default 1)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny: a few prompts and steps, to see that everything runs"
    )
    parser.add_argument("--runs", type=Path, help="working folder (runs/tiny, runs/quick, or runs)")
    parser.add_argument("--out", type=Path, help="results folder (default results/SCALE/FIGURE)")
    parser.add_argument("--jobs", type=int, help="stages at a time (default 2; 1 for mistral-7b)")
    parser.add_argument("--passes", type=int, default=1, help="mistral-7b: judgements of each MT-Bench answer")
    paid_options(parser)
    arguments = parser.parse_args()
    if min(arguments.seeds, arguments.passes, 1 if arguments.jobs is None else arguments.jobs) < 1:
        raise InputError("--seeds, --passes and --jobs must be at least 1")
    arguments.jobs = arguments.jobs or (2 if arguments.scale == "tiny" else 1)
    if arguments.scale == "mixtral-8x7b":
        raise InputError(f"{arguments.figure} at mixtral-8x7b: the paper has none, its Mixtral runs are those of "
                         "Table 3; take --scale mistral-7b or tiny")  # fmt: skip
    (tiny if arguments.scale == "tiny" else mistral)(arguments.figure, arguments)


if __name__ == "__main__":
    run_command(main)
