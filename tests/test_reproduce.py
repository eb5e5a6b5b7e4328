"""scripts/reproduce.py --quick: every stage once, then what a second run, damage and interruptions do.

One run is shared by all tests of this file; each leaves it whole.
"""

import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "reproduce.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
RESULTS = (
    "scores.jsonl", "trend.jsonl", "manifests.jsonl", "cost.csv", "tables.md", "tables.csv", "claims.md", "claims.csv",
    "theory.md", "theory.csv", *(f"likelihood_trend{which}.{ending}" for which in ("", "_and_paper")
                                 for ending in ("png", "svg", "csv")),
)  # fmt: skip
Run = Callable[..., subprocess.CompletedProcess[str]]


def command(runs: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--quick", "--runs", str(runs), *more]


def reproduce(runs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(runs, *more), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=500
    )


def stages_run(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The stages that were run, without their times."""
    assert done.returncode == 0, done.stderr[-2000:]
    return re.findall(r"^\[\d+/\d+\] (.*): \d+ s$", done.stdout, re.MULTILINE)


def digests(runs: Path) -> dict[str, str]:
    """Every result, score and policy, by the SHA-256 of its bytes; what differs between runs is left out."""
    paths = [runs / "results" / name for name in RESULTS if name != "cost.csv"]
    for pattern in ("policy/*", "answers.jsonl", "rows.jsonl", "trend.jsonl", "scores.jsonl"):
        paths += [path for path in (runs / "seed-0").rglob(pattern) if path.is_file()]
    return {str(path.relative_to(runs)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], dict[str, str]]:
    """The working folder of a whole run, in a path with spaces; what it printed; its digests."""
    runs = tmp_path_factory.mktemp("reproduce") / "with a space" / "quick runs"
    done = reproduce(runs)
    assert done.returncode == 0, done.stderr[-2000:]
    return runs, done, digests(runs)


def test_every_stage_runs(quick) -> None:
    """World, SFT, samples, rows, pairs, reference, 16 runs, 17 sets of answers, scores, and all results."""
    runs, done, _ = quick
    ran = stages_run(done)
    assert len(ran) == len(set(ran)) == 1 + 1 + 4 + 1 + 1 + 16 + 17 + 1 + 8
    assert all((runs / "results" / name).stat().st_size > 100 for name in RESULTS)
    tables = (runs / "results" / "tables.md").read_text()
    assert "not run" not in tables
    assert len(re.findall(r"^\| NCA \|", tables, re.MULTILINE)) == 4
    assert "nan" not in (runs / "results" / "tables.csv").read_text().lower()
    assert list(runs.rglob("*.part.jsonl")) == []


def test_second_run_does_nothing(quick) -> None:
    """A second run runs no stage, leaves every byte and needs less than 20 s of processor time."""
    runs, _, before = quick
    cost = (runs / "results" / "cost.csv").read_bytes()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert stages_run(reproduce(runs)) == []
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime < 20  # other programs do not count, unlike time
    assert digests(runs) == before
    assert (runs / "results" / "cost.csv").read_bytes() == cost


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit(path: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_outputs_are_made_again(quick) -> None:
    """A cut policy, an edited answer, missing rows and an edited table: their stages alone run again, to the same
    bytes. (The records are collected anew where a manifest is.)"""
    runs, _, before = quick
    seed = runs / "seed-0"
    cut(seed / "runs" / "nca-hard" / "policy" / "model.safetensors")
    edit(seed / "answers" / "dpo-gentle" / "answers.jsonl")
    (seed / "rows-pairs" / "rows.jsonl").unlink()
    edit(runs / "results" / "tables.csv")
    ran = set(stages_run(reproduce(runs)))
    assert ran - {"records"} == {"seed 0: nca-hard", "seed 0: answers of dpo-gentle", "seed 0: pairs", "tables"}
    assert digests(runs) == before
    assert stages_run(reproduce(runs)) == []


def test_stopped_run_continues(quick) -> None:
    """SIGTERM in the middle of SFT ends all its processes with code 143; the next run ends with the same bytes."""
    runs, _, before = quick
    shutil.rmtree(runs / "seed-0" / "sft")
    (runs / "results" / "likelihood_trend.png").unlink()
    log = runs / "stages" / "logs" / "seed_0_SFT_of_mu.log"
    log.unlink()
    process = subprocess.Popen(
        command(runs), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (log.exists() and re.search(r" [1-9]\d*/\d+ \[", log.read_text())):
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors[-2000:]
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert not (runs / "seed-0" / "sft" / "manifest.json").exists()
    assert "seed 0: SFT of mu" in stages_run(reproduce(runs))
    assert digests(runs) == before


def test_figures_take_what_is_there(quick) -> None:
    """Figure 2 draws from runs that are there; Figure 4 adds the runs with the best response and 1, 2 or 3 others, its
    records, table and figure. A second time nothing runs; nothing of the first run changes."""
    runs, _, before = quick

    def figure(number: int) -> list[str]:
        words = ["bash", f"scripts/figure{number}.sh", "--scale", "tiny", "--quick", "--runs", str(runs)]
        return stages_run(
            subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=500)
        )

    assert figure(2) == ["figure2: records", "figure2: figure"]
    names = [f"{method}-hard-k{k}" for method in ("nca", "infonca") for k in (2, 3, 4)]
    assert set(figure(4)) == {
        "seed 0: best response and 1 others", "seed 0: best response and 2 others", "seed 0: scores",
        *(f"seed 0: {name}" for name in names), *(f"seed 0: answers of {name}" for name in names),
        *(f"figure4: {what}" for what in ("records", "table", "figure")),
    }  # fmt: skip
    assert figure(2) == figure(4) == []
    assert digests(runs) == before
    whole = [json.loads(line) for line in (runs / "seed-0" / "rows-train" / "rows.jsonl").read_text().splitlines()]
    for k in (2, 3):
        path = runs / "figure4" / "seed-0" / f"rows-k{k}" / "rows.jsonl"
        rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
        for row in whole:
            kept = rows[row["id"]]
            assert len(kept["responses"]) == k
            assert max(kept["rewards"]) == max(row["rewards"])
            assert set(zip(kept["responses"], kept["rewards"], strict=True)) <= set(
                zip(row["responses"], row["rewards"], strict=True)
            )
    out = runs / "results" / "figure4"
    manifests = {
        json.loads(line)["hash"]: json.loads(line) for line in (out / "manifests.jsonl").read_text().splitlines()
    }
    table = pandas.read_csv(out / "figure4.csv")
    assert list(table.policy) == names
    assert set(table.status) == {"measured"}
    for line in table.itertuples():  # from a cell to its command
        assert f"runs/{line.policy}/policy" in manifests[line.manifests]["command"]
        run = next(found for found in manifests.values() if found["stage"] == f"runs/{line.policy}")
        assert run["identity"]["settings"]["objective"] == {"alpha": line.alpha, "beta": line.beta}
    assert all((out / f"score_by_k.{ending}").stat().st_size > 100 for ending in ("png", "svg", "csv"))


def test_figures_of_the_paper_scale_are_planned() -> None:
    """--dry-run at mistral-7b: the training command, numbered stages, calls of the judge; nothing is written. There is
    no such figure at mixtral-8x7b."""
    before = sorted(ROOT.glob("r*/*"))
    plans = {"figure2": (2, 0), "figure4": (1 + 12 + 3, 6 * 160), "figure6": (1 + 64 + 3, 32 * 160)}
    for name, (stages, calls) in plans.items():
        words = ["bash", f"scripts/{name}.sh", "--scale", "mistral-7b", "--dry-run"]
        environment = {**ENVIRONMENT, "PYTHON": "echo"}  # a plan takes seconds a run: tests/train checks them
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "bash scripts/train_mistral7b.sh --model-revision COMMIT --runs runs" in done.stdout
        assert len(re.findall(rf"^\[\d+/{stages}\] ", done.stdout, re.MULTILINE)) == stages
        assert (f"Judge: {calls:,} calls" if calls else "No judge.") in done.stdout
        refused = subprocess.run(
            [*words[:3], "mixtral-8x7b"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
        )
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert sorted(ROOT.glob("r*/*")) == before


def test_failing_stage(quick, tmp_path) -> None:
    """A stage that cannot write ends the run with exit code 2 and one line: the stage, the reason, its log."""
    runs, _, before = quick
    (tmp_path / "file").write_text("in the way")
    done = reproduce(runs, "--out", str(tmp_path / "file" / "results"))
    assert done.returncode == 2
    lines = [line for line in re.split(r"[\r\n]", done.stderr) if "error: " in line]
    assert len(lines) == 1
    assert re.search(r"(records|theory) failed \(exit \d\): ", lines[0])
    assert str(runs / "stages" / "logs") in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert digests(runs) == before


def test_bad_settings_are_refused(tmp_path) -> None:
    """No seeds or no jobs: one line and exit code 2, before anything is written."""
    for words in (("--seeds", "0"), ("--jobs", "0")):
        done = reproduce(tmp_path / "runs", *words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_complete() -> None:
    """A stage names as inputs all that another stage makes and its command reads: else it would not run again when
    these change. `eval.collect` reads every run's trend; every path in a command line is an input or output."""
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        runs = Path("runs")
        stages = [*module.seed_stages(0, runs / "seed-0", False), *module.seed_stages(1, runs / "seed-1", False)]
        stages += module.result_stages([0, 1], runs, Path("out"))
    finally:
        del sys.modules["reproduce"]
    made = {output: stage for stage in stages for output in stage.outputs}
    assert len(made) == sum(len(stage.outputs) for stage in stages)
    by_name = {stage.name: stage for stage in stages}
    assert len(by_name) == len(stages)
    for stage in stages:
        for word in stage.arguments:
            path = Path(word.partition("=")[2] or word)
            for output in made:
                if output == path and stage is not made[output]:
                    assert output in stage.inputs, (stage.name, output)
        for path in stage.inputs:
            assert path in made or (ROOT / path).exists(), (stage.name, path)
    trends = {path for path in made if path.name == "trend.jsonl" and path.parts[0] == "runs"}
    assert len(trends) == 32
    assert trends <= set(by_name["records"].inputs)
