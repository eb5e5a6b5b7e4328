"""The inner half of the sandbox: walls itself in, then runs one generated program and answers calls of its functions.

Started by eval.sandbox as a script with a clean environment; imports the standard library alone. Three processes:

    launcher   new namespaces (user, mount, pid, net, ipc, uts); waits, sees nothing else
    init       first process of the pid namespace; a new root of read-only system folders and an empty /tmp (both
               tmpfs; no /proc, no /sys, no home); when it ends, the kernel kills all that is left of the program
    program    no privileges, no capabilities, resource limits; loads the source and answers calls

Messages are lines of JSON over two pipes: {"call": [names], "args", "kwargs"} in, {"value"} or {"error"} out. What is
to be expected never comes in here, so no program can find it; and a program that writes replies itself gains nothing.
"""

import collections.abc
import ctypes
import json
import os
import platform
import resource
import signal
import sys
import types
from typing import Any

NEW_NAMESPACES = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "pid": 0x20000000, "net": 0x40000000}
NEW_USER = 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
RDONLY_NOSUID_NODEV = 1 | 2 | 4  # MOUNT_ATTR_*
AT_FDCWD, AT_RECURSIVE, MNT_DETACH, MOUNT_SETATTR = -100, 0x8000, 2, 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
NEW_ROOT = "/proc"  # where the new root is mounted first: always there, and never a source of ours

if sys.platform == "linux":
    libc = ctypes.CDLL(None, use_errno=True)


def encode(value: Any) -> Any:
    """A value as JSON data. Subclasses become their plain type; anything unknown becomes a name equal to nothing."""
    if value is None or type(value) in (bool, str, float):
        return value
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():  # a NumPy number
        value = value.item()
    if isinstance(value, int):
        number = int(value)
        return number if number.bit_length() <= 64 else {"int": hex(number)}  # decimal digits are slow and limited
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, collections.abc.Set):
        return {"set": [encode(item) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return {"other": type(value).__name__}


class Unknown:
    """Stands for a returned object that is no plain value; equal to nothing."""


def decode(data: Any) -> Any:
    """The value that `encode` wrote; ValueError, TypeError, KeyError or RecursionError for anything else."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    match kind:
        case "int":
            return int(content, 16)
        case "tuple":
            return tuple(decode(item) for item in content)
        case "dict":
            return {decode(key): decode(item) for key, item in content}
        case "set":
            return {decode(item) for item in content}
        case "bytes":
            return bytes.fromhex(content)
        case "complex":
            return complex(*content)
        case "other":
            return Unknown()
    raise ValueError(f"unknown kind {kind!r}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _check(libc.mount(*words, ctypes.c_ulong(flags), data.encode() if data else None), f"mount {target}")


def _read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(RDONLY_NOSUID_NODEV, 0, 0, 0)
    arguments = (ctypes.c_long(AT_FDCWD), path.encode(), ctypes.c_long(flags), attributes, ctypes.c_size_t(32))
    _check(libc.syscall(ctypes.c_long(MOUNT_SETATTR), *arguments), f"read-only {path}")


def _die_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _enter_namespaces(as_root: bool) -> None:
    flags = sum(NEW_NAMESPACES.values())
    if as_root:
        _check(libc.unshare(flags), "unshare")
        return
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(NEW_USER | flags), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _new_root(folders: list[str], scratch_mb: int) -> None:
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("sandbox", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    for path in (*SYSTEM, *folders):
        target = NEW_ROOT + path
        if os.path.lexists(target) or not os.path.exists(path):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        else:
            os.mkdir(target) if os.path.isdir(path) else open(target, "w").close()
            _mount(path, target, None, MS_BIND | MS_REC)
            _read_only(target, AT_RECURSIVE)
    os.mkdir(f"{NEW_ROOT}/dev")
    for path in DEVICES:
        open(NEW_ROOT + path, "w").close()
        _mount(path, NEW_ROOT + path, None, MS_BIND)
    os.mkdir(f"{NEW_ROOT}/tmp")
    _mount("scratch", f"{NEW_ROOT}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch_mb}m,nr_inodes=2k,mode=777")
    os.chdir(NEW_ROOT)
    _check(libc.syscall(ctypes.c_long(PIVOT_ROOT[platform.machine()]), b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    _read_only("/", 0)


def _drop_privileges(uid: int | None) -> None:
    """Become nobody, without any capability. The innermost user namespace gets no mapping: from inside it no further
    one can be made, and with it no new capability."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _check(libc.unshare(NEW_USER), "unshare")
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _check(libc.capset(header, none), "capset")


def _limit(limits: dict[str, int]) -> None:
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for name, value in (
        ("CPU", limits["cpu_seconds"]),
        ("AS", limits["memory_mb"] << 20),
        ("FSIZE", limits["file_mb"] << 20),
        ("NPROC", limits["processes"]),
        ("NOFILE", 64),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _fork(keep: set[int]) -> bool:
    """Fork; True in the child. The parent keeps no pipe, so that their ends are seen, and waits until the child ends;
    then it ends itself, with the child's exit code."""
    child = os.fork()
    if child == 0:
        _die_with_parent()
        return True
    for number in {0, 1, 2, *keep}:
        os.close(number)
    while True:
        found, status = os.wait()  # as init, also of orphans
        if found == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _serve(requests: Any, replies: Any) -> None:
    """Load the program, then answer calls until the pipe ends."""
    program = types.ModuleType("program")
    sys.modules["program"] = program
    instances: dict[str, Any] = {}
    for line in requests:
        request = json.loads(line)
        try:
            if "source" in request:
                for name, text in request["files"].items():
                    with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
                        file.write(text)
                exec(compile(request["source"], "<program>", "exec"), program.__dict__)
                value = None
            else:
                function = program.__dict__[request["call"][0]]
                if len(request["call"]) == 2:  # a method: of one instance, made without arguments
                    name, method = request["call"]
                    if name not in instances:
                        instances[name] = function()
                    function = getattr(instances[name], method)
                value = function(*decode(request["args"]), **decode(request["kwargs"]))
            reply = json.dumps({"value": encode(value)})
        except BaseException as error:
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"[:300]})
        replies.write(reply + "\n")
        replies.flush()


def main() -> None:
    """Read the settings from the command line, wall in, say ready, serve."""
    settings = json.loads(sys.argv[1])
    mode, pipes = settings["mode"], set(settings["pipes"])
    if mode in ("root", "user"):
        _enter_namespaces(mode == "root")
        _die_with_parent()
        if _fork(pipes):
            _new_root(settings["folders"], settings["limits"]["scratch_mb"])
            if _fork(pipes):
                _drop_privileges(settings["uid"] if mode == "root" else None)
    else:
        _die_with_parent()
    os.chdir(settings["scratch"])
    _limit(settings["limits"])
    del sys.argv[1:]
    request, reply = settings["pipes"]
    with open(request, encoding="utf-8") as requests, open(reply, "w", encoding="utf-8") as replies:
        replies.write('{"ready": true}\n')
        replies.flush()
        _serve(requests, replies)


if __name__ == "__main__":
    main()
