"""Generated programs run here and nowhere else.

    outcome = run_program(source, check, limits=Limits())

A program sees read-only system folders, an empty scratch folder and no network, no other process, no environment, no
/proc; it has no privileges; processor time, memory, processes, file sizes, output and wall time are limited; all that
it started is killed at the end. `eval/inside.py` is the other half, and says how.

**No program can forge its verdict.** `check` (the tests of the dataset, trusted) runs here, outside, and calls the
program's functions through a pipe: only plain values come back. What is expected never enters the sandbox and the
verdict never leaves this process, so printing "passed", exiting early, replacing `assert` or built-ins, objects that
are equal to everything, and writing replies of one's own all end as `failed`: the only way to pass is to reply what
is expected.

Levels of confinement, tried in this order; `level()` says which is in force and belongs into the record:

    namespaces (root)     own user, mount, pid, net, ipc and uts namespaces, made as root; a uid for each program
    namespaces (user)     the same, made by an ordinary user
    bubblewrap            the same, by `bwrap`, where only that may make namespaces
    limits only           resource limits alone: no sandbox; used only when `unsafe` is asked for

What remains: the kernel itself (there is no filter of system calls); memory in unmapped memfd files is bounded only by
processes x open files x file size; time on the machine's cores is shared, so a wall-clock limit can hit a slow machine.
"""

import contextlib
import dataclasses
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from data_prep.files import InputError
from eval.inside import DEVICES, SYSTEM, decode, encode

INSIDE = Path(__file__).with_name("inside.py")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "PYTHONHASHSEED": "0",  # the same verdict each time
    "OMP_NUM_THREADS": "1",  # threads count as processes
    "OPENBLAS_NUM_THREADS": "1",
}
FIRST_UID = 1 << 20  # above the users of a machine; one uid for each sandbox, as processes are counted by uid
LOOK_EVERY = 0.2  # seconds between looks at memory and processes; a look reads the table of all processes
START_SECONDS = 30  # for the sandbox itself; a loaded machine is slow to start a process
NAMES = {
    "root": "namespaces (root): user, mount, pid, net, ipc, uts; resource limits",
    "user": "namespaces (user): user, mount, pid, net, ipc, uts; resource limits",
    "bwrap": "bubblewrap: user, mount, pid, net, ipc, uts; resource limits",
    "none": "resource limits only (unsafe)",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one program. memory_mb: address space of each process, and resident memory of all together. output_bytes:
    of stdout and of stderr that are kept; the rest is read and dropped. reply_bytes: of all returned values."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mb: int = 1024
    processes: int = 16
    file_mb: int = 16
    scratch_mb: int = 32
    output_bytes: int = 1 << 16
    reply_bytes: int = 1 << 28


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program. verdict: "passed", "failed" or "timeout". reason: one line unless passed. exit_code:
    None where it was ended from here."""

    verdict: str
    reason: str
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float
    level: str


class SandboxError(Exception):
    """The sandbox itself did not start; says nothing about the program."""


class ProgramFailed(Exception):
    """The program raised, ended, or broke a limit. The message is one line."""


class ProgramTimeout(ProgramFailed):
    """The program took too long."""


class Program:
    """A program in its sandbox. Its functions run inside, by `call`."""

    def __init__(self, limits: Limits, mode: str, scratch: str) -> None:
        self._limits, self._mode = limits, mode
        self._stop_at = time.monotonic() + START_SECONDS
        self._kept = {"stdout": bytearray(), "stderr": bytearray()}
        self._buffer, self._received, self._ended = bytearray(), 0, False
        self._next_look = time.monotonic() + LOOK_EVERY
        inner_requests, self._requests = os.pipe()
        self._replies, inner_replies = os.pipe()
        settings = {
            "mode": mode, "pipes": [inner_requests, inner_replies], "folders": _folders(),
            "uid": FIRST_UID + os.getpid() % (1 << 22) * 64 + self._requests % 64,
            "scratch": scratch,
            "limits": dataclasses.asdict(limits),
        }  # fmt: skip
        words = [_python(), "-s", "-P", "-B", str(INSIDE), json.dumps(settings)]
        if mode == "bwrap":
            words = [*_bubblewrap(limits), "--", *words]
        try:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
                cwd="/", start_new_session=True, pass_fds=(inner_requests, inner_replies),
            )  # fmt: skip
        finally:
            os.close(inner_requests)
            os.close(inner_replies)
        self._selector = selectors.DefaultSelector()
        for number, name in (
            (self._replies, "reply"),
            (self.process.stdout, "stdout"),
            (self.process.stderr, "stderr"),
        ):
            number = number if isinstance(number, int) else number.fileno()
            os.set_blocking(number, False)
            self._selector.register(number, selectors.EVENT_READ, name)
        os.set_blocking(self._requests, False)

    def start(self, source: str, files: dict[str, str]) -> None:
        """Wait until the walls stand (SandboxError if they do not), then load the program."""
        try:
            ready = self._reply() == {"ready": True}
        except ProgramFailed:
            ready = False
        if not ready:
            raise SandboxError(self.text("stderr").strip().rpartition("\n")[2] or "the sandbox did not start")
        self._stop_at = time.monotonic() + self._limits.seconds
        self._ask({"source": source, "files": files}, None)

    def call(self, *names: str, args: Any = (), kwargs: Any = None, seconds: float | None = None) -> Any:
        """The value of a function, or of a method (names: class and method; of one instance made without arguments).

        Raises ProgramFailed where the program raises, ends or replies nonsense, ProgramTimeout after `seconds`.
        """
        request = {"call": names, "args": encode(list(args)), "kwargs": encode(kwargs or {})}
        return self._ask(request, seconds)

    def function(self, *names: str) -> Callable[..., Any]:
        """A stand-in for a function (or a method) that tests can call as if it were here."""
        return lambda *args, **kwargs: self.call(*names, args=args, kwargs=kwargs)

    def text(self, stream: str) -> str:
        """What was kept of stdout or stderr."""
        return self._kept[stream].decode("utf-8", "replace")

    def _ask(self, request: dict[str, Any], seconds: float | None) -> Any:
        stop_at = self._stop_at if seconds is None else min(self._stop_at, time.monotonic() + seconds)
        reply = self._reply(json.dumps(request).encode() + b"\n", stop_at)
        if isinstance(reply, dict) and set(reply) == {"error"}:
            raise ProgramFailed(" ".join(str(reply["error"])[:300].split()))
        try:
            return decode(reply["value"])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise ProgramFailed("a reply that is no value") from None

    def _reply(self, request: bytes = b"", stop_at: float | None = None) -> Any:
        stop_at = stop_at or self._stop_at
        waiting, line_end = memoryview(request), -1
        if request:
            self._selector.register(self._requests, selectors.EVENT_WRITE, "request")
        try:
            while line_end < 0:
                if self._ended:
                    raise ProgramFailed("the program ended before its tests did")
                if time.monotonic() > stop_at:
                    raise ProgramTimeout("out of time")
                self._look_after()
                for key, _ in self._selector.select(0.05):
                    if key.data == "request":
                        try:
                            waiting = waiting[os.write(self._requests, waiting[:65536]) :]
                        except BlockingIOError:
                            continue
                        except BrokenPipeError:
                            self._ended, waiting = True, waiting[:0]
                        if not waiting:
                            self._selector.unregister(self._requests)
                    else:
                        searched = len(self._buffer)
                        self._read(key.fd, key.data)
                        if key.data == "reply":
                            line_end = self._buffer.find(b"\n", searched)
        finally:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._requests)
        if waiting:
            raise ProgramFailed("a reply before the question")
        line = bytes(self._buffer[:line_end])
        del self._buffer[: line_end + 1]
        if self._buffer:
            raise ProgramFailed("more than one reply")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise ProgramFailed("a reply that is no value") from None

    def _read(self, number: int, name: str) -> None:
        try:
            found = os.read(number, 1 << 16)
        except BlockingIOError:
            return
        if not found:
            self._selector.unregister(number)
            self._ended |= name == "reply"
        elif name != "reply":
            self._kept[name] += found[: self._limits.output_bytes - len(self._kept[name])]
        else:
            self._buffer += found
            self._received += len(found)
            if self._received > self._limits.reply_bytes:
                raise ProgramFailed("returns too much")

    def _look_after(self) -> None:
        """Refuse more memory or processes than allowed, counted over all processes of the program."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY
        resident = count = 0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                resident, count = resident + process.memory_info().rss, count + 1
        if resident > self._limits.memory_mb << 20:
            raise ProgramFailed("more memory than allowed")
        if count > self._limits.processes + 3:  # launcher, init and bubblewrap are not the program's
            raise ProgramFailed("more processes than allowed")

    def _processes(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def close(self) -> int | None:
        """End everything that the program started; its exit code if it had ended by itself."""
        code = self.process.poll()
        if self._ended and code is None:  # it is ending: the code says why
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(1)
        # The first process of the pid namespace first: as its parent waits for it, and it for all others, none is left
        # when the launcher is gone. Without namespaces this reaches what has not left the process tree.
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._mode == "none":
            self.process.kill()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for key in list(self._selector.get_map().values()):
            if key.data in self._kept and len(self._kept[key.data]) < self._limits.output_bytes:
                with contextlib.suppress(OSError):
                    self._read(key.fd, key.data)
        self._selector.close()
        for number in (self._requests, self._replies):
            os.close(number)
        self.process.stdout.close()
        self.process.stderr.close()
        return code


def _python() -> str:
    # The environment's own interpreter, by a path without links above it, so that its packages are found inside.
    return str(Path(sys.executable).parent.resolve() / Path(sys.executable).name)


def _folders() -> list[str]:
    wanted = {str(Path(sys.base_prefix).resolve()), str(Path(sys.prefix).resolve())}
    return sorted(folder for folder in wanted if not folder.startswith("/usr/"))


def _bubblewrap(limits: Limits) -> list[str]:
    words = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--hostname",
        "sandbox",
    ]
    for path in (*SYSTEM, *_folders(), str(INSIDE)):
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            words += ["--ro-bind", path, path]
    for path in DEVICES:
        words += ["--dev-bind", path, path]
    return [*words, "--size", str(limits.scratch_mb << 20), "--tmpfs", "/tmp", "--remount-ro", "/"]


@functools.cache
def mode() -> str:
    """The strongest confinement that works here: "root", "user" or "bwrap"; "none" where there is none."""
    if sys.platform == "linux":
        for candidate in ("root", "user", "bwrap"):
            if (candidate == "root" and os.geteuid() != 0) or (candidate == "bwrap" and not shutil.which("bwrap")):
                continue
            program = Program(Limits(), candidate, "/tmp")
            with contextlib.suppress(SandboxError), contextlib.closing(program):
                program.start("", {})
                return candidate
    return "none"


def level(unsafe: bool = False) -> str:
    """The confinement in force, in words; InputError where there is none and `unsafe` is not asked for."""
    if mode() == "none" and not unsafe:
        raise InputError(
            "no sandbox here: namespaces are not allowed and bwrap is not installed; generated programs could do "
            "anything. Install bubblewrap, run elsewhere, or accept it with --unsafe"
        )
    return NAMES[mode()]


def run_program(
    source: str,
    check: Callable[[Program], None] = lambda program: None,
    *,
    limits: Limits | None = None,
    files: dict[str, str] | None = None,
    unsafe: bool = False,
) -> Outcome:
    """Load `source` in a sandbox of its own and let `check` call its functions.

    check: trusted; raises where the program is wrong (AssertionError, or what a test raises on a strange value).
    files: name to text, put into the scratch folder. Verdict "passed" means that `source` was loaded and `check` came
    to its end. InputError where no sandbox is to be had.
    """
    in_force, limits, began = level(unsafe), limits or Limits(), time.monotonic()
    verdict, reason = "passed", ""
    folder: Any = contextlib.nullcontext("/tmp")  # inside: a tmpfs of its own
    if mode() == "none":
        folder = tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
    with folder as scratch:
        program = Program(limits, mode(), scratch)
        try:
            program.start(source, files or {})
            check(program)
        except ProgramTimeout as error:
            verdict, reason = "timeout", str(error)
        except ProgramFailed as error:
            verdict, reason = "failed", str(error)
        except SandboxError:
            raise
        except Exception as error:  # of the tests: a wrong answer, or one of another type than expected
            verdict, reason = "failed", f"wrong answer ({type(error).__name__})"
        finally:
            exit_code = program.close()
    seconds = round(time.monotonic() - began, 3)
    return Outcome(verdict, reason, exit_code, program.text("stdout"), program.text("stderr"), seconds, in_force)
