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
from hostile import ATTACKS, program

from data_prep.files import InputError
from eval import sandbox
from eval.inside import Unknown, decode, encode
from eval.sandbox import Limits, Program, run_program

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


@needs_sandbox
@pytest.mark.parametrize("mode", ["user", "bwrap"])
def test_other_levels_contain_as_well(mode: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Namespaces made by an ordinary user, and bubblewrap, hold what those of root hold; right programs pass."""
    probe = Program(Limits(), mode, "/tmp") if mode != "bwrap" or shutil.which("bwrap") else None
    try:
        if probe is None:
            pytest.skip("no bubblewrap on this machine")
        probe.start("", {})
    except sandbox.SandboxError as error:
        pytest.skip(f"this level is not to be had here: {error}")
    finally:
        if probe:
            probe.close()
    monkeypatch.setattr(sandbox, "mode", lambda: mode)
    assert run_program("def f(x): return 2 * x", doubles, limits=SHORT).verdict == "passed"
    for name in (
        "fork bomb", "TCP to the host", "environment of any process", "home folder", "password files", "writes outside",
        "file of the host", "makes the system writable", "mounts proc", "raw device", "kills all", "daemon that stays",
        "exits with 0 at once", "unix socket of the host", "abstract unix socket of the host",
    ):  # fmt: skip
        outcome = run_program(program(ATTACKS[name], **host.names), doubles, limits=SHORT)
        assert outcome.verdict in ("failed", "timeout"), name
        assert outcome.level == sandbox.NAMES[mode]
    assert host.canary.read_text() == "canary"
    assert host.touched == []
    assert inside() == []


HARMLESS = (
    "file of the host", "file of the host by a symbolic link", "password files", "sees the evaluator", "UDP",
    "TCP to the host", "unix socket of the host", "abstract unix socket of the host", "writes outside",
)  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_attacks_work_without_the_sandbox(name: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attacks are real: with resource limits alone these succeed, and so pass."""
    monkeypatch.setattr(sandbox, "mode", lambda: "none")
    outcome = run_program(program(ATTACKS[name], **host.names), doubles, limits=SHORT, unsafe=True)
    stop = time.monotonic() + 5
    while name == "UDP" and "udp" not in host.touched and time.monotonic() < stop:
        time.sleep(0.05)
    assert outcome.verdict == "passed" or "udp" in host.touched
    assert outcome.level == "resource limits only (unsafe)"
    host.canary.write_text("canary")
    host.touched.clear()


def test_refuses_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are only resource limits nothing is run, unless asked for."""
    monkeypatch.setattr(sandbox, "mode", lambda: "none")
    with pytest.raises(InputError, match="--unsafe"):
        run_program("", limits=SHORT)


@needs_sandbox
def test_right_programs_pass_after_hostile_ones() -> None:
    """Every kind of plain value comes back as it was; packages, files and subprocesses can be used."""
    values = [None, True, -3, 10**5000, 0.1, float("inf"), "é\ud800", b"\x00", (1, [2]), {1, 2}, {(1, 2): [3]}, 1 + 2j]

    def check(running: Program) -> None:
        for value in values:
            found = running.call("same", args=[value])
            assert (type(found), found) == (type(value), value)
        assert running.call("total") == 6
        assert running.call("text") == "given"
        assert running.call("echo") == "hi\n"
        assert running.call("Counter", "up") == 1
        assert running.call("Counter", "up") == 2

    source = """
import subprocess, numpy
def same(x): return x
def total(): return numpy.array([1, 2, 3]).sum()
def text(): return open("given.txt").read()
def echo(): return subprocess.run(["echo", "hi"], capture_output=True, text=True).stdout
class Counter:
    n = 0
    def up(self): self.n += 1; return self.n
"""
    outcome = run_program(source, check, files={"given.txt": "given"})
    assert (outcome.verdict, outcome.reason) == ("passed", "")


def test_values_that_are_not_plain_equal_nothing() -> None:
    """What is no plain value becomes one that is equal to nothing else; a damaged message is refused."""
    found = decode(encode([object(), range(3)]))
    assert all(isinstance(value, Unknown) for value in found)
    assert found[1] != [0, 1, 2]
    assert decode(encode(float("nan"))) != decode(encode(float("nan")))
    with pytest.raises(ValueError, match="unknown kind"):
        decode({"verdict": "passed"})


@needs_sandbox
def test_nothing_outlives_a_killed_evaluator() -> None:
    """SIGKILL of the evaluator, which can clean up nothing, ends the program and its daemons too."""
    source = "import os, time\nos.fork()\nos.setsid() if os.getpid() > 3 else None\ntime.sleep(600)"
    limits = f"Limits(seconds=600, reply_bytes={SHORT.reply_bytes})"
    code = f"from eval.sandbox import *\nrun_program({source!r}, limits={limits})"
    evaluator = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        stop = time.monotonic() + 60
        while len(inside()) < 3 and time.monotonic() < stop:  # launcher, init, program
            time.sleep(0.1)
        assert len(inside()) >= 3
    finally:
        evaluator.kill()
        evaluator.wait()
    stop = time.monotonic() + 10
    while inside() and time.monotonic() < stop:
        time.sleep(0.05)
    assert inside() == []


@needs_sandbox
def test_programs_at_once_do_not_disturb_each_other() -> None:
    """A fork bomb uses up its own number of processes, not that of a program beside it."""
    bomb = threading.Thread(target=run_program, args=(ATTACKS["fork bomb that catches everything"].strip(), doubles),
                            kwargs={"limits": Limits(seconds=4)})  # fmt: skip
    bomb.start()
    time.sleep(1)
    source = "import threading\ndef f(x):\n    t = threading.Thread(target=print); t.start(); t.join(); return 2 * x"
    assert run_program(source, doubles).verdict == "passed"
    bomb.join()
