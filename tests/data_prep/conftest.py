"""Shared by the tests of data_prep: commands as a user runs them, and the real data where they are at hand."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m MODULE ARGUMENTS` in the repository, offline."""

    def run(module: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        # Through a shell: the kernel counts the memory of the process that starts a command to the command's own peak.
        return subprocess.run(
            ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def real_data() -> Callable[[str], Any]:
    """Read a real file by its path in the data folder (NCA_TEST_DATA); skip the test where it is absent."""

    def read(name: str) -> Any:
        path = Path(os.environ.get("NCA_TEST_DATA", ROOT.parent / "shared" / "data")) / name
        if not path.exists():
            pytest.skip(f"{path} is absent; set NCA_TEST_DATA to the folder of real data")
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        kind = path.name.removesuffix(".gz")
        if kind.endswith(".jsonl"):
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text) if kind.endswith(".json") else text

    return read


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Write records as JSON lines to a file of the test's own folder."""

    def to_file(name: str, records: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return to_file
