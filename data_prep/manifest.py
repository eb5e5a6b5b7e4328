"""manifest.json: what is needed to believe an output, and to know whether it is still up to date.

    {"hash":          SHA-256 of `identity`; score records and tables point to it,
     "identity":      what decides the bytes of the output: module, settings, inputs, code, versions, outputs,
     "command":       the command line, as typed,
     "circumstances": what does not: commit, wall time, peak memory, platform}

A stage is up to date when its settings, inputs and code are those of the manifest and its outputs still
have the recorded digests. The manifest is written last, so an output without one is unfinished.
"""

import ast
import functools
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.files import InputError, read_json, sha256_file, sha256_text, sha256_tree, to_json, write_json

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("data_prep", "train", "eval")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy", "pandas", "matplotlib")


def code_digest(module: str) -> str:
    """Digest of the source that `python -m module` can run: its file and all of this project that it imports."""
    return sha256_tree(_sources(module), ROOT)


def _sources(module: str) -> set[Path]:
    found: set[Path] = set()
    names = {module, f"{module}.__main__"}  # the latter is what `python -m` runs of a package
    while names:
        path = _file_of(names.pop())
        if path is not None and path not in found:
            found.add(path)
            names.add(path.relative_to(ROOT).parent.as_posix().replace("/", "."))  # a package's __init__ runs first
            names |= _imports(path, path.stat().st_mtime_ns)
    return found


@functools.cache
def _imports(path: Path, modified: int) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _file_of(name: str) -> Path | None:
    if name.partition(".")[0] not in STAGES:
        return None
    path = ROOT.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@functools.cache
def versions() -> dict[str, str]:
    """Python and the packages that a number can depend on ("-" where one is not installed)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "-"
    return found


def file_digest(path: Path | str) -> str:
    """Digest of an input: a file's bytes, or all files of a directory (a model)."""
    path = Path(path)
    if path.is_dir():
        return sha256_tree([p for p in path.rglob("*") if p.is_file()], path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    return sha256_file(path)


def plan(module: str, settings: Mapping[str, Any], inputs: Mapping[str, Path | str]) -> dict[str, Any]:
    """The part of an identity that is known before the work: which module, with which settings, from which inputs."""
    return {
        "module": module,
        "settings": dict(settings),
        "inputs": {name: file_digest(path) for name, path in sorted(inputs.items())},
        "code": code_digest(module),
        "versions": versions(),
    }


def write_manifest(
    directory: Path | str,
    planned: Mapping[str, Any],
    *,
    outputs: list[str],
    facts: Mapping[str, Any] | None = None,
    circumstances: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `directory/manifest.json` for finished work and return it.

    planned: from `plan`. outputs: files or folders in `directory`. facts: deterministic findings such as
    counts. circumstances: anything measured that may differ in a second run.
    """
    directory = Path(directory)
    identity = {
        **planned,
        "facts": dict(facts or {}),
        "outputs": {name: file_digest(directory / name) for name in sorted(outputs)},
    }
    manifest = {
        "hash": sha256_text(to_json(identity, sort_keys=True)),
        "identity": identity,
        "command": command_line(),
        "circumstances": {**git_state(), **cost(), "platform": platform.platform(), **(circumstances or {})},
    }
    write_json(directory / "manifest.json", manifest)
    return manifest


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """Read `directory/manifest.json` and check that its hash is that of its identity."""
    path = Path(directory) / "manifest.json"
    manifest = read_json(path)
    try:
        stated, computed = manifest["hash"], sha256_text(to_json(manifest["identity"], sort_keys=True))
    except (KeyError, TypeError):
        raise InputError(f"{path}: not a manifest of this project; rebuild {directory}") from None
    if stated != computed:
        raise InputError(f"{path}: its hash does not match its content; rebuild {directory}")
    return manifest


def up_to_date(directory: Path | str, planned: Mapping[str, Any]) -> bool:
    """Whether `directory` holds the finished, undamaged output of exactly this plan."""
    directory = Path(directory)
    if not (directory / "manifest.json").exists():
        return False
    identity = read_manifest(directory)["identity"]
    if any(identity.get(key) != value for key, value in planned.items()):
        return False
    return all(
        (directory / name).exists() and file_digest(directory / name) == digest
        for name, digest in identity["outputs"].items()
    )


def command_line() -> str:
    """The running command as one would type it: `python -m package.module ...`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return " ".join(["python -m" if spec else "python", name, *sys.argv[1:]])


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit of the checkout and whether tracked files differ from it; None outside a checkout."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *STAGES)
    except OSError:  # no git on this machine
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def cost() -> dict[str, float]:
    """Wall and CPU seconds since the start of this process, and its peak resident memory in MB."""
    import psutil  # here, so that commands which write nothing run without any package installed

    usage = resource.getrusage(resource.RUSAGE_SELF)
    scale = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    return {
        "wall_s": round(time.time() - psutil.Process().create_time(), 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / scale, 1),
    }
