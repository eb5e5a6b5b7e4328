"""The stages of the miniature experiment, in order, two at a time, each skipped where it is done already.

Run through scripts/reproduce.sh. Every stage is one command of the project with files in and files out. A stage is
done when its command line, the source it can run and its inputs have not changed since it finished, and its outputs
still have the digests they had then.
"""

import argparse
import dataclasses
import multiprocessing
import os
import runpy
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from data_prep.files import InputError, read_json, run_command, sha256_text, to_json, write_json  # noqa: E402
from data_prep.manifest import code_digest, file_digest, read_manifest, versions  # noqa: E402
from eval.records import METHODS, REGIMES, RESPONSES  # noqa: E402

RECIPES = Path("train/recipes/tiny")
MODULES = {**{method: f"train.{method}" for method in METHODS}, "dpo_x3": "train.dpo"}
# --quick: the same stages on a few prompts and steps. It shows that everything runs, and measures nothing.
QUICK_WORLD = {"demonstrations": 640, "train": 48, "heldout": 24, "test": 24}
QUICK_TRAINING = {"epochs": 1, "evaluate_every": 2}
MAX_TOKENS = 48  # of a response, as in the recipes
PAPER_FIGURE = Path("results/paper/figure2_likelihood.csv")
PAGE, REGISTRY = Path("eval/page"), Path("results/registry.yaml")  # the report is made from these, too


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, `python -m module arguments`. inputs: files or folders that decide its outputs."""

    name: str
    module: str
    arguments: list[str]
    inputs: list[Path]
    outputs: list[Path]
    fresh: bool = False  # the command keeps an interrupted run, and takes --fresh to replace another one

    def key(self) -> str:
        """What decides the outputs."""
        inputs = {str(path): digest(path) for path in self.inputs}
        return sha256_text(to_json([self.module, self.arguments, inputs, code_digest(self.module), versions()]))


def digest(path: Path) -> str:
    """Content of a file or folder; of a manifest what it identifies, without its wall time and the like."""
    return read_manifest(path.parent)["hash"] if path.name == "manifest.json" else file_digest(path)


def stage(name: str, module: str, inputs: list[Path], outputs: list[Path], *more: str | Path, **options: Any) -> Stage:
    """A stage whose command line is `more` and then `--option value` for each option (a list gives several values,
    True none)."""
    arguments = [str(word) for word in more]
    for option, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        arguments += [f"--{option.replace('_', '-')}", *map(str, values)]
    return Stage(name, module, arguments, inputs, outputs, fresh=module.startswith("train.") and "out" in options)


def manifest(output: Path) -> Path:
    """The manifest beside an output."""
    return output.parent / "manifest.json"


@dataclasses.dataclass(frozen=True)
class Ground:
    """The folder of one seed, and what all its runs share."""

    root: Path

    @property
    def mu(self) -> Path:
        """The reference policy."""
        return self.root / "sft" / "policy"

    @property
    def cache(self) -> Path:
        """Its log-probs of all responses in `rows`."""
        return self.root / "reference"

    def prompts(self, split: str) -> Path:
        """Prompts with their truths: train, heldout or test."""
        return self.root / "world" / f"prompts-{split}.jsonl"

    def rows(self, name: str) -> Path:
        """Rows: train and heldout (4 samples of mu), and pairs of the former."""
        return self.root / f"rows-{name}" / "rows.jsonl"


def ground_stages(seed: int, ground: Ground, quick: bool) -> Iterator[Stage]:
    """What comes before the runs of one seed. Every seed has a world, a mu and samples of its own."""
    label, root, mu = f"seed {seed}:", ground.root, ground.mu
    demonstrations = root / "world" / "demonstrations.jsonl"
    made = [demonstrations, *(ground.prompts(split) for split in ("test", "train", "heldout"))]
    size = QUICK_WORLD if quick else {}
    yield stage(f"{label} world", "data_prep.miniature", [], made, seed=seed, out=root / "world", **size)
    recipe = RECIPES / "sft.yaml"
    yield stage(
        f"{label} SFT of mu", "train.sft", [recipe, demonstrations], [mu],
        recipe=recipe, seed=seed, demonstrations=demonstrations, out=mu.parent,
    )  # fmt: skip
    for split in ("train", "heldout"):
        samples, prompts, rows = root / f"samples-{split}" / "answers.jsonl", ground.prompts(split), ground.rows(split)
        yield stage(
            f"{label} 4 samples of mu, {split}", "eval.generate", [mu, prompts], [samples],
            policy=mu, prompts=prompts, samples=4, max_new_tokens=MAX_TOKENS, seed=seed, out=samples.parent,
        )  # fmt: skip
        yield stage(
            f"{label} rows, {split}", "data_prep.miniature.collect", [prompts, samples], [rows],
            prompts=prompts, answers=samples, out=rows.parent,
        )  # fmt: skip
    pairs = ground.rows("pairs")
    yield stage(
        f"{label} pairs", "data_prep.pairs", [ground.rows("train")], [pairs], ground.rows("train"),
        strategy="best-vs-random", seed=seed, out=pairs.parent,
    )  # fmt: skip
    scored = [ground.rows("train"), ground.rows("heldout")]  # the pairs' responses are among them
    lengths = RECIPES / f"{REGIMES[0]}.yaml"  # limits and batches are the same in all regimes
    yield stage(
        f"{label} reference log-probs", "train.engine.reference", [mu, *scored, lengths], [ground.cache],
        model=mu, rows=scored[0], eval_rows=scored[1], recipe=lengths, cache=ground.cache,
    )  # fmt: skip


def training_stage(
    seed: int, ground: Ground, run: Path, method: str, regime: str, rows: Path, quick: bool, **overrides: Any
) -> Stage:
    """One run. rows: among those whose reference log-probs are there. overrides: keys of the recipe."""
    recipe, heldout = RECIPES / f"{regime}.yaml", ground.rows("heldout")
    return stage(
        f"seed {seed}: {run.name}", MODULES[method], [recipe, ground.mu, rows, heldout, ground.cache],
        [run / "policy", run / "trend.jsonl", run / "manifest.json"],
        recipe=recipe, seed=seed, model=ground.mu, rows=rows, eval_rows=heldout, reference_cache=ground.cache, out=run,
        **overrides, **(QUICK_TRAINING if quick else {}),
    )  # fmt: skip


def judging_stages(seed: int, ground: Ground, root: Path, policies: dict[str, Path]) -> Iterator[Stage]:
    """Answers of policies to the test prompts, and their scores by the truth, in `root`."""
    test, label = ground.prompts("test"), f"seed {seed}:"
    answers = {name: root / "answers" / name / "answers.jsonl" for name in policies}
    for name, policy in policies.items():
        yield stage(
            f"{label} answers of {name}", "eval.generate", [policy, test], [answers[name], manifest(answers[name])],
            policy=policy, prompts=test, greedy=True, samples=4, max_new_tokens=MAX_TOKENS, seed=seed,
            out=answers[name].parent,
        )  # fmt: skip
    yield stage(
        f"{label} scores", "eval.truth", [test, *answers.values(), *map(manifest, answers.values())],
        [root / "scores" / "scores.jsonl"],
        prompts=test, seed=seed, answers=[f"{name}={path.parent}" for name, path in answers.items()],
        out=root / "scores",
    )  # fmt: skip


def seed_stages(seed: int, root: Path, quick: bool) -> Iterator[Stage]:
    """The stages of one seed, each behind those it needs."""
    ground = Ground(root)
    yield from ground_stages(seed, ground, quick)
    policies = {"mu": ground.mu}
    for regime in REGIMES:
        for method in METHODS:
            run, rows = root / "runs" / f"{method}-{regime}", "train" if RESPONSES[method] == 4 else "pairs"
            policies[run.name] = run / "policy"
            yield training_stage(seed, ground, run, method, regime, ground.rows(rows), quick)
    yield from judging_stages(seed, ground, root, policies)


def result_stages(seeds: list[int], runs: Path, out: Path) -> Iterator[Stage]:
    """From the runs of all seeds to records, tables, figures and claims."""
    folders = [runs / f"seed-{seed}" for seed in seeds]
    scores = [folder / "scores" / "scores.jsonl" for folder in folders]
    policies = [f"{method}-{regime}" for regime in REGIMES for method in METHODS]
    trends = [folder / "runs" / policy / "trend.jsonl" for folder in folders for policy in policies]
    names = ("scores.jsonl", "trend.jsonl", "manifests.jsonl", "cost.csv")
    records = [out / name for name in names]
    tables, claims, theory = ([out / f"{name}.md", out / f"{name}.csv"] for name in ("tables", "claims", "theory"))
    found = [*scores, *trends, *map(manifest, trends)]
    yield stage("records", "eval.collect", found, records, runs=runs, seeds=seeds, out=out)
    yield stage("theory", "eval.theory", [], theory, out=out)
    yield stage("tables", "eval.tables", records[:3], tables, results=out)
    yield stage("claims", "eval.claims", [*records[:3], *theory], claims, results=out)
    for name, options in (("likelihood_trend", {}), ("likelihood_trend_and_paper", {"paper": PAPER_FIGURE})):
        files = [out / f"{name}.{ending}" for ending in ("png", "svg", "csv")]
        yield stage(name, "eval.figures", [records[1], *options.values()], files, trend=records[1], out=out / name,
                    **options)  # fmt: skip
    ranks = [out / f"ranks.{ending}" for ending in ("png", "svg", "csv")]
    yield stage("ranks", "eval.figures", [records[1]], ranks, "ranks", records[1], out=out / "ranks")
    page = [PAGE / path.name for path in sorted((ROOT / PAGE).iterdir())]
    shown = [*records[:3], *tables, *claims, *theory, *page, REGISTRY]
    yield stage("report", "eval.report", shown, [out / "report.html"], results=out, out=out / "report.html")


def table_stages(table: str, scale: str, found: list[Path], out: Path, **where: Any) -> Iterator[Stage]:
    """Records and the table of one of the paper's tables or grids, in `out`. found: scores, trends and manifests of
    its stages; where: how eval.collect is told of them."""
    names = ("scores.jsonl", "manifests.jsonl", *(["trend.jsonl"] if table.startswith("figure") else []))
    records, files = [out / name for name in names], [out / f"{table}.{ending}" for ending in ("md", "csv", "tex")]
    yield stage(f"{table}: records", "eval.collect", found, [*records, out / "cost.csv"], **where, out=out)
    yield stage(f"{table}: table", "eval.tables", records, files, table=table, scale=scale, results=out)


class Progress:
    """What is done, on disk: for each stage its key and the digests of its outputs."""

    def __init__(self, folder: Path):
        """folder: for the stages' stamps and logs."""
        self.folder = folder
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def _stamp(self, stage: Stage) -> Path:
        return self.folder / f"{stage.name.replace(' ', '_').replace(':', '').replace(',', '')}.json"

    def log(self, stage: Stage) -> Path:
        """Where the stage's output goes."""
        return self.folder / "logs" / self._stamp(stage).with_suffix(".log").name

    def is_done(self, stage: Stage, key: str) -> bool:
        """Whether the stage finished with this key and its outputs are as it left them."""
        path = self._stamp(stage)
        if not path.exists():
            return False
        stamp = read_json(path)
        outputs = stamp.get("outputs")
        if stamp["key"] != key or outputs is None:
            return False
        try:
            return all(Path(name).exists() and digest(Path(name)) == known for name, known in outputs.items())
        except InputError:  # a manifest that was damaged
            return False

    def begin(self, stage: Stage, key: str) -> list[str]:
        """Note that the stage is begun; return the words to add to its command."""
        path = self._stamp(stage)
        begun = path.exists() and read_json(path).get("key") == key
        write_json(path, {"key": key})
        return ["--fresh"] if stage.fresh and not begun else []

    def finish(self, stage: Stage, key: str) -> None:
        """Note that the stage is finished."""
        missing = [str(path) for path in stage.outputs if not path.exists()]
        if missing:
            raise InputError(f"{stage.name}: ended without {', '.join(missing)}; see {self.log(stage)}")
        if stage.key() != key:
            raise InputError(f"{stage.name}: its inputs or its source changed while it ran; run the command again")
        write_json(self._stamp(stage), {"key": key, "outputs": {str(p): digest(p) for p in stage.outputs}})


def run_all(stages: list[Stage], progress: Progress, jobs: int) -> None:
    """Run the stages that are not done, up to `jobs` at once, each as soon as its inputs are there."""
    made_by = {output: stage.name for stage in stages for output in stage.outputs}
    needs = {stage.name: {made_by[path] for path in stage.inputs if path in made_by} for stage in stages}
    waiting, done = list(stages), set()
    running: dict[str, tuple[Stage, str, Any, float]] = {}
    numbers = {stage.name: number for number, stage in enumerate(stages, start=1)}
    # A server that has imported torch and transformers once forks the stages: an import costs more than many a stage.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.engine.run"])
    bar = tqdm(total=len(stages), unit="stage", smoothing=0.1)
    try:
        while waiting or running:
            for stage in [stage for stage in waiting if needs[stage.name] <= done]:
                if len(running) == jobs:
                    break
                waiting.remove(stage)
                key = stage.key()
                if progress.is_done(stage, key):
                    done.add(stage.name)
                    bar.update()
                    continue
                words = [*stage.arguments, *progress.begin(stage, key)]
                child = processes.Process(target=run_module, args=(stage.module, words, progress.log(stage)))
                child.start()
                running[stage.name] = (stage, key, child, time.monotonic())
            for name, (stage, key, child, started) in list(running.items()):
                if child.exitcode is None:
                    continue
                del running[name]
                if child.exitcode:
                    raise InputError(
                        f"{name} failed (exit {child.exitcode}): {last_line(progress.log(stage))}; all of it is in "
                        f"{progress.log(stage)}; the same command continues"
                    )
                progress.finish(stage, key)
                done.add(name)
                bar.write(f"[{numbers[name]}/{len(stages)}] {name}: {time.monotonic() - started:.0f} s")
                bar.update()
            if running:
                time.sleep(0.1)
    finally:
        for _, _, child, _ in running.values():
            child.terminate()
        for _, _, child, _ in running.values():
            child.join()
        bar.close()


def run_module(module: str, arguments: list[str], log: Path) -> None:
    """In a process of its own: `python -m module arguments`, with its output in a file."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    """Stop this process when the one that asked for it is gone: after a SIGKILL the same command may start the same
    stage again. (Its parent in the system, the fork server, lives on as long as it does.)"""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(143)


def last_line(log: Path) -> str:
    """The last line that a failed stage printed."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    return lines[-1].split("\r")[-1].strip() if lines else "no output"


def main() -> None:
    """Reproduce the miniature experiment."""
    parser = argparse.ArgumentParser(prog="bash scripts/reproduce.sh", description="The experiment in miniature.")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 on (default 1)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="stages at a time, one core each (default 2)")
    parser.add_argument("--quick", action="store_true", help="a few prompts and steps, to see that everything runs")
    parser.add_argument("--runs", type=Path, help="working folder (default runs/tiny, or runs/quick)")
    parser.add_argument("--out", type=Path, help="results folder (default results/tiny, or runs/quick/results)")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.jobs < 1:
        raise InputError("--seeds and --jobs must be at least 1")
    if shutil.disk_usage(ROOT).free < 2**30:
        raise InputError(f"{ROOT}: less than 1 GB of disk is free; free some and run again")
    runs = arguments.runs or Path("runs/quick" if arguments.quick else "runs/tiny")
    out = arguments.out or (runs / "results" if arguments.quick else Path("results/tiny"))
    seeds = list(range(arguments.first_seed, arguments.first_seed + arguments.seeds))
    stages = [stage for seed in seeds for stage in seed_stages(seed, runs / f"seed-{seed}", arguments.quick)]
    stages += result_stages(seeds, runs, out)
    started = time.monotonic()
    run_all(stages, Progress(runs / "stages"), arguments.jobs)
    print(f"done in {time.monotonic() - started:.0f} s: see {out / 'tables.md'}, {out / 'claims.md'} and "
          f"{out / 'likelihood_trend.png'}")  # fmt: skip


if __name__ == "__main__":
    run_command(main)
