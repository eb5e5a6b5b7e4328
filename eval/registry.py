"""results/registry.yaml: every table and figure, how it is made, what the paper says, and what was measured here.

    python -m eval.registry [--readme README.md]

Says where the registry, the scripts and the files in results/ disagree (exit code 2), and with --readme writes the
README's list between its two marks.
"""

import argparse
import dataclasses
import re
import subprocess
from pathlib import Path

import yaml

from data_prep.files import InputError, run_command, write_text
from eval.published import STATUSES, read_csv

ROOT = Path(__file__).resolve().parent.parent
SCALES = ("tiny", "mistral-7b", "mixtral-8x7b")
MARKS = ("<!-- eval.registry: begin -->", "<!-- eval.registry: end -->")
STATUS = re.compile(r"measured|(partial|not run): .+")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One table or figure. of: what it is in the paper, or `extension`. outputs, status: by scale."""

    name: str
    of: str
    title: str
    expected: list[dict[str, str]]
    status: dict[str, str]
    script: str = ""
    command: str = ""
    recipes: list[str] = dataclasses.field(default_factory=list)
    inputs: list[str] = dataclasses.field(default_factory=list)
    outputs: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def load(path: Path) -> list[Entry]:
    """Read and validate the registry; InputError with the entry and the reason."""
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    known = {field.name: field for field in dataclasses.fields(Entry)}
    entries = []
    for name, found in listed.items() if isinstance(listed, dict) else ():
        wrong = set(found) - set(known) if isinstance(found, dict) else {"no mapping"}
        wrong |= {key for key in ("of", "title", "expected", "status") if key not in (found or {})}
        if wrong:
            raise InputError(f"{path}: {name}: {', '.join(sorted(wrong))} missing or unknown")
        entry = Entry(name=name, **found)
        for scale, status in entry.status.items():
            if scale not in SCALES or not STATUS.fullmatch(status):
                raise InputError(f"{path}: {name}: {scale}: {status!r}; a scale of {', '.join(SCALES)} with "
                                 "`measured`, `partial: what is missing` or `not run: why`")  # fmt: skip
        if not set(entry.outputs) <= set(entry.status):
            raise InputError(f"{path}: {name}: outputs of a scale without a status")
        for item in entry.expected:
            if set(item) != {"file"} and (set(item) != {"claim", "status", "source"} or item["status"] not in STATUSES):
                raise InputError(f"{path}: {name}: expected {item}: give a file, or claim, status and source")
        entries.append(entry)
    if not entries:
        raise InputError(f"{path}: no entries; restore it from the repository")
    return entries


def committed(root: Path) -> set[str]:
    """The committed files; all files where this is no git checkout."""
    try:
        done = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True)
        return {name for name in done.stdout.split("\0") if name and (root / name).is_file()}
    except (OSError, subprocess.CalledProcessError):
        parts = ("results", "scripts", "train/recipes")
        return {p.relative_to(root).as_posix() for part in parts for p in (root / part).rglob("*") if p.is_file()}


def under(output: str, files: set[str]) -> set[str]:
    """The files that an output stands for."""
    return {name for name in files if name == output or (output.endswith("/") and name.startswith(output))}


def disagreements(entries: list[Entry], files: set[str], root: Path = ROOT) -> list[str]:
    """What does not fit together, one line each. files: the committed ones."""
    said, claimed = [], set()
    for entry in entries:
        named = [*filter(None, [entry.script]), *entry.recipes, *entry.inputs]
        named += [item["file"] for item in entry.expected if "file" in item]
        said += [f"{entry.name}: {name}: no such file" for name in named if name not in files]
        if entry.command.startswith("bash ") and entry.command.split()[1] != entry.script:
            said.append(f"{entry.name}: the command does not run {entry.script}")
        for scale, outputs in entry.outputs.items():
            there = [under(output, files) for output in outputs]
            claimed |= set().union(*there)
            said += _status(entry.name, scale, entry.status[scale], outputs, there, root)
        for scale in set(entry.status) - set(entry.outputs):
            if not entry.status[scale].startswith("not run"):
                said.append(f"{entry.name}, {scale}: {entry.status[scale]}, without outputs")
    results = {name for name in files if name.startswith("results/") and name != "results/registry.yaml"}
    paper = {name for name in results if name.startswith("results/paper/")}
    used = {name for entry in entries for name in entry.inputs}
    used |= {item.get("file", "") for entry in entries for item in entry.expected}
    said += [f"{name}: in no entry's inputs or expected values" for name in sorted(paper - used)]
    said += [f"{name}: the output of no entry" for name in sorted(results - paper - claimed)]
    scripts = {name for name in files if re.fullmatch(r"scripts/(table|figure)\w+\.sh", name)}
    said += [f"{name}: in no entry" for name in sorted(scripts - {entry.script for entry in entries})]
    return said


def _status(name: str, scale: str, status: str, outputs: list[str], there: list[set[str]], root: Path) -> list[str]:
    """Whether a scale's status is what its files say; a table's CSV says which of its lines were not run."""
    lacking = [output for output, found in zip(outputs, there, strict=True) if not found]
    if status.startswith("not run"):
        # a table of the paper's values alone may be there
        lines = [row["status"] for table in _tables(name, there, root) for row in read_csv(root / table)]
        if len(lacking) < len(outputs) and (not lines or "measured" in lines):
            return [f"{name}, {scale}: {status}; but {', '.join(set(outputs) - set(lacking))} is there"]
        return []
    if lacking:
        return [f"{name}, {scale}: {status}; but {', '.join(lacking)} is not there"]
    for table in _tables(name, there, root):
        lines = [row["status"] for row in read_csv(root / table)]
        found = "not run" if "measured" not in lines else "partial" if "not run" in lines else "measured"
        if found != status.partition(":")[0]:
            return [f"{name}, {scale}: {status}; but {table} has {lines.count('measured')} lines measured and "
                    f"{lines.count('not run')} not run"]  # fmt: skip
    return []


def _tables(name: str, there: list[set[str]], root: Path) -> list[str]:
    """Tables of the paper among the outputs: their lines have a status."""
    named = sorted(found for files in there for found in files if found.endswith(f"/{name}/{name}.csv"))
    return [table for table in named if "status" in next(iter(read_csv(root / table)), {})]


def shown(entry: Entry, scale: str, files: set[str]) -> str:
    """The status at a scale, with a link to what a reader wants to see first."""
    status = entry.status[scale]
    found = [name for output in entry.outputs.get(scale, []) for name in sorted(under(output, files))]
    first = [name for ending in (f"/{entry.name}.md", ".md", ".png") for name in found if name.endswith(ending)]
    word, colon, reason = status.partition(":")
    return (f"[{word}]({first[0]})" if first else word) + colon + reason


def readme_block(entries: list[Entry], files: set[str]) -> str:
    """The README's list, with its marks. files: the committed ones."""
    lines = [MARKS[0], "| | what | made by | tiny | Mistral-7B | Mixtral-8x7B |", "|---|---|---|---|---|---|"]
    for entry in entries:
        script = f"[`{entry.script}`]({entry.script})" if entry.script else "-"
        cells = [shown(entry, scale, files) if scale in entry.status else "-" for scale in SCALES]
        lines.append(f"| {entry.of} | {entry.title} | {script} | {' | '.join(cells)} |")
    return "\n".join([*lines, MARKS[1]])


def write_readme(path: Path, entries: list[Entry], files: set[str]) -> None:
    """Replace what stands between the marks; InputError where they are not there once each."""
    text = path.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in MARKS) or text.index(MARKS[0]) > text.index(MARKS[1]):
        raise InputError(f"{path}: needs once each, in this order: {MARKS[0]} and {MARKS[1]}")
    before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
    write_text(path, before + readme_block(entries, files) + after)


def main() -> None:
    """Check, and write the README's list."""
    parser = argparse.ArgumentParser(prog="python -m eval.registry")
    parser.add_argument("--readme", type=Path, help="file with the two marks")
    arguments = parser.parse_args()
    entries = load(ROOT / "results" / "registry.yaml")
    files = committed(ROOT)
    if arguments.readme:
        write_readme(arguments.readme, entries, files)
    said = disagreements(entries, files)
    if said:
        raise InputError(f"results/registry.yaml: {len(said)} disagreements: {'; '.join(said)}")
    print(f"results/registry.yaml: {len(entries)} entries agree with the scripts and files")


if __name__ == "__main__":
    run_command(main)
