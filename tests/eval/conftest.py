"""Shared by the tests of eval: commands run in this process, and small policies with random weights."""

import dataclasses
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import JudgeServer

from data_prep.files import run_command
from train.engine.models import new_mistral, new_tokenizer

TEXTS = ("How many pens are left?", "List two colors in small letters.", "Write f(x): add 3, then square it.")


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line of a refusal with exit code 2 (a progress bar may stand before it)."""
        lines = [line for line in re.split(r"[\r\n]", self.err) if line.strip()]
        assert self.code == 2, self.err
        assert [line.startswith("error: ") for line in lines].count(True) == 1
        assert lines[-1].startswith("error: ")
        return lines[-1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command's `main` with a command line. In this process: importing torch takes longer than the work."""

    def call(main: Callable[[], None], *arguments: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        handler, code = signal.getsignal(signal.SIGTERM), 0
        try:
            run_command(main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two policies that differ in their weights alone; their answers are of any length, some are cut."""
    folders = []
    for seed in (0, 1):
        tokenizer = new_tokenizer(iter(TEXTS), 280)
        model = new_mistral(
            tokenizer, hidden=32, layers=2, heads=2, kv_heads=1, feed_forward=48, positions=256, seed=seed
        )
        with torch.no_grad():  # at the initial scale all tokens are as good as equally likely
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.mul_(15)
        folder = tmp_path_factory.mktemp("policy")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture
def judge_server() -> Iterator[Callable[..., JudgeServer]]:
    """Start a local judge: `judge_server(say, delay=0.0)`; see JudgeServer."""
    servers: list[JudgeServer] = []

    def start(*arguments: Any, **options: Any) -> JudgeServer:
        servers.append(JudgeServer(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
