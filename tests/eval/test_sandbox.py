"""The sandbox: hostile programs are contained, cannot forge a verdict, and leave nothing behind."""

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep.files import InputError
from eval import sandbox
from eval.inside import Unknown, decode, encode
from eval.sandbox import Limits, Program, run_program
from hostile import ATTACKS, program

# reply_bytes tells the sandboxes of this test run from others on the machine.
SHORT = Limits(seconds=1.0, cpu_seconds=2, memory_mb=400, reply_bytes=(1 << 28) + os.getpid())
needs_sandbox = pytest.mark.skipif(sandbox.mode() == "none", reason="no namespaces and no bubblewrap on this machine")


def doubles(running: Program) -> None:
    """The tests of the problem: f doubles a number."""
    assert running.call("f", args=[21]) == 42


@dataclasses.dataclass(frozen=True)
class Host:
    """What programs must not reach. names: of it, for the programs; touched: what did reach it."""

    names: dict[str, Any]
    touched: list[str]
    canary: Path


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A file that everybody may write, servers on TCP, UDP and unix sockets, and a secret in the environment."""
    folder = Path("/tmp") / f"canary-{os.getpid()}"  # not below pytest's own folder, which others may not enter
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    canary = folder / "canary"
    canary.write_text("canary")
    canary.chmod(0o666)
    touched: list[str] = []
    with contextlib.ExitStack() as stack:
        tcp, udp, unix, abstract = (
            stack.enter_context(socket.socket(family, kind))
            for family, kind in (
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
            )
        )
        tcp.bind(("127.0.0.1", 0))
        udp.bind(tcp.getsockname())
        unix.bind(str(folder / "socket"))
        os.chmod(folder / "socket", 0o777)
        abstract.bind("\0" + str(folder / "socket"))
        for name, server in (("tcp", tcp), ("udp", udp), ("unix", unix), ("abstract", abstract)):
            if name != "udp":
                server.listen()
            server.settimeout(0.2)
            threading.Thread(target=_watch, args=(name, server, touched), daemon=True).start()
        names = {"CANARY": str(canary), "PORT": tcp.getsockname()[1], "SOCKET": str(folder / "socket"),
                 "HOST": os.getpid()}  # fmt: skip
        os.environ["SECRET_KEY"] = "secret"
        yield Host(names, touched, canary)
        del os.environ["SECRET_KEY"]
    shutil.rmtree(folder)


def _watch(name: str, server: socket.socket, touched: list[str]) -> None:
    while server.fileno() >= 0:
        with contextlib.suppress(TimeoutError):
            try:
                server.recvfrom(1) if name == "udp" else server.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            touched.append(name)


def inside() -> list[psutil.Process]:
    """Processes of sandboxes that are still there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if str(sandbox.INSIDE) in words and f'"reply_bytes": {SHORT.reply_bytes}' in words[-1]:
                found.append(process)
    return found


@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_program_is_contained(name: str, host: Host) -> None:
    """An attack that worked would pass; none does. The file, the servers and the clock are as before, nothing that it
    started is left, and it ends in time."""
    before, began = time.time() - time.monotonic(), time.monotonic()
    outcome = run_program(program(ATTACKS[name], **host.names), doubles, limits=SHORT)
    assert outcome.verdict in ("failed", "timeout")
    assert time.monotonic() - began < 25
    assert len(outcome.stdout) <= SHORT.output_bytes
    assert len(outcome.stderr) <= SHORT.output_bytes
    assert host.canary.read_text() == "canary"
    assert sorted(path.name for path in host.canary.parent.iterdir()) == ["canary", "socket"]
    assert host.touched == []
    assert inside() == []
    assert abs(time.time() - time.monotonic() - before) < 5
    assert socket.gethostname() != "gone"
