"""Two processes against one: the same global batch, the same records, the same weights."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.files import read_jsonl
from data_prep.manifest import read_manifest
from train.engine.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
# The command `python -m train.nca`, with a second process that is late with its part of a checkpoint (its random
# state), as it may be on any file system; and interrupted like a key press in the n-th micro-batch, if n is given.
WORKER = """
import os, time
from transformers import Trainer
from data_prep.files import run_command
from train.engine.run import align
from train.nca import nca_loss

save = Trainer._save_rng_state

def late(self, directory):
    time.sleep(0.3 * self.args.process_index)
    save(self, directory)

def interrupted(*values, calls=[], **options):
    calls.append(1)
    if len(calls) == int(os.environ.get("INTERRUPT_AT", "0")):
        raise KeyboardInterrupt
    return nca_loss(*values, **options)

Trainer._save_rng_state = late
run_command(lambda: align("nca", interrupted, uses=("alpha", "beta")))
"""


@pytest.fixture(scope="module")
def launch(
    arguments: Callable[..., list[str]], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start two processes on a run directory."""
    worker = tmp_path_factory.mktemp("worker") / "worker.py"
    worker.write_text(WORKER)

    def start(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, str(worker), *arguments(out)]
        environ = {**environment, **variables}
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)

    return start


@pytest.fixture(scope="module")
def twice(launch: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `finished` once more, by two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = launch(out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def flat(value: Any) -> list[float]:
    """All numbers of a record, in order."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in flat(item)]
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [value] if isinstance(value, int | float) else []


def test_there_were_two_processes(twice: Path, finished: Path) -> None:
    """Launchers fall back to one process in silence; the manifest says how many there were. All else is equal."""
    one, two = (read_manifest(run)["identity"] for run in (finished, twice))
    assert (one["facts"].pop("processes"), two["facts"].pop("processes")) == (1, 2)
    assert one["facts"] == two["facts"]
    assert one["facts"]["global_batch"] == 8
    assert one["settings"] == two["settings"]


def test_the_trend_is_that_of_one_process(twice: Path, finished: Path) -> None:
    """Every number of every record, gathered over processes: no rank's share is lost or counted twice."""
    one, two = ([record for _, record in read_jsonl(run / "trend.jsonl")] for run in (finished, twice))
    assert len(one) == 8
    for ours, theirs in zip(two, one, strict=True):
        assert (ours["step"], ours["split"]) == (theirs["step"], theirs["split"])
        assert flat(ours) == pytest.approx(flat(theirs), rel=1e-5, abs=1e-5)


def test_the_losses_are_those_of_one_process(twice: Path, finished: Path) -> None:
    """Loss and gradient norm of each step: a mean over the prompts of the global batch, on any number of processes."""
    one, two = (
        [(line["loss"], line["grad_norm"]) for _, line in read_jsonl(run / "log.jsonl") if "loss" in line]
        for run in (finished, twice)
    )
    assert flat([list(pair) for pair in two]) == pytest.approx(flat([list(pair) for pair in one]), rel=1e-4)
    assert len(one) == 6


def test_the_weights_are_those_of_one_process(twice: Path, finished: Path) -> None:
    """The final policy, weight by weight."""
    one, two = (load_file(run / "policy" / "model.safetensors") for run in (finished, twice))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)


def test_the_checkpoint_of_two_processes_is_whole(twice: Path) -> None:
    """A checkpoint is sealed when all processes have written their part, so that the run can go on from it."""
    whole = RunDirectory(twice, {}).last_checkpoint()
    assert whole is not None
    assert {path.name for path in whole.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_two_processes_continue_where_they_were_interrupted(
    launch: Callable[..., subprocess.CompletedProcess[str]], twice: Path, tmp_path: Path
) -> None:
    """Interrupted in step 6 and started again, the run goes on after step 4 and ends with the same bytes; of two
    processes that see a damaged checkpoint one removes it."""
    out = tmp_path / "run"
    stopped = launch(out, INTERRUPT_AT="6")  # one micro-batch a step and process
    assert stopped.returncode != 0
    damaged = out / "checkpoint-5"
    damaged.mkdir()
    for number in range(3000):  # so many that removing them takes a while
        (damaged / str(number)).touch()
    done = launch(out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{out}: continues after step 4" in done.stdout
    for name in ("policy/model.safetensors", "trend.jsonl"):
        assert (out / name).read_bytes() == (twice / name).read_bytes()
    assert not damaged.exists()


def test_zero3_ends_as_one_process(
    arguments: Callable[..., list[str]], align_run: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    """The launch file deepspeed_zero3.yaml, on a CPU, two processes: parameters, losses, trend and gathered weights."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an optional extra (pip install deepspeed)")
    cache = tmp_path / "reference"
    words = ["--kl-prompts", 0, "--reference-cache", cache]
    one, two = align_run(tmp_path / "one", *words), tmp_path / "two"
    config = tmp_path / "zero3.yaml"
    launch_file = (ROOT / "train" / "launch" / "deepspeed_zero3.yaml").read_text()
    config.write_text(launch_file.replace("use_cpu: false", "use_cpu: true"))
    launcher = ["accelerate", "launch", "--config_file", str(config), "--num_processes", "2", "-m", "train.nca"]
    found = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join([environment["PYTHONPATH"], *sys.path[1:]])}
    done = subprocess.run(
        [*launcher, *arguments(two, *words)], cwd=ROOT, env={**environment, **found},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [read_manifest(run)["identity"]["facts"] for run in (one, two)]
    assert facts[0]["model"] == facts[1]["model"]
    assert [fact["processes"] for fact in facts] == [1, 2]
    for name in ("log.jsonl", "trend.jsonl"):
        found = [[record for _, record in read_jsonl(run / name)] for run in (one, two)]
        for ours, theirs in zip(*found, strict=True):
            keys = [key for key in ours if key in ("loss", "grad_norm", "chosen", "rejected")]
            expected = [number for key in keys for number in flat(theirs[key])]
            assert [number for key in keys for number in flat(ours[key])] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    weights = [load_file(run / "policy" / "model.safetensors") for run in (one, two)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-5)
