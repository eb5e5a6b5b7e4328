"""The bash scripts hand their arguments on, and nothing else."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="no .venv here: the script would install one")
def test_reproduce_hands_its_arguments_on() -> None:
    """`bash scripts/reproduce.sh --seeds 0` reaches the program, which refuses it in one line with exit code 2."""
    words = ["bash", str(ROOT / "scripts" / "reproduce.sh"), "--seeds", "0"]
    done = subprocess.run(words, env=os.environ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: --seeds and --jobs must be at least 1\n"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck() -> None:
    """shellcheck finds nothing in any script."""
    paths = [str(path) for path in [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / "train/launch/slurm.sbatch"]]
    paths.append(str(ROOT / ".ci" / "run"))
    assert len(paths) > 10
    words = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", "--shell=bash", *paths]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
