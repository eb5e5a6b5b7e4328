"""The README says what is there: its links, paths, commands and flags exist."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"(?:python -m|bash) [^`\n#]+", README)))


def test_links_lead_to_files() -> None:
    """Every relative link and picture of the README is a file of the repository."""
    targets = re.findall(r"\]\(([^)]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert len(local) > 10
    assert [target for target in local if not (ROOT / target).is_file()] == []


def test_files_in_code_marks_exist() -> None:
    """Every path in code marks that begins with a folder of the repository is there."""
    named = re.findall(r"`((?:data_prep|train|eval|results|scripts|tests)/[\w./-]*)`", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_flags_exist(command: str) -> None:
    """Every command of the README is a script or module of ours, and each flag that it shows is one it takes."""
    words = command.split()
    if words[0] == "bash":
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        if words[1].endswith("reproduce.sh"):  # hands its arguments on
            source += (ROOT / "scripts/reproduce.py").read_text(encoding="utf-8")
    else:
        spec = importlib.util.find_spec(words[2])
        assert spec is not None, f"no module {words[2]}"
        source = Path(spec.origin).read_text(encoding="utf-8")
        if words[2] in ("eval.mt_bench", "eval.win_rate"):  # the judge's flags are the judge's
            source += (ROOT / "eval/judge.py").read_text(encoding="utf-8")
        if words[2].startswith("train."):  # the engine parses for every objective
            source += (ROOT / "train/engine/run.py").read_text(encoding="utf-8")
            source += "".join(
                f'"--{key.replace("_", "-")}"' for key in re.findall(r"^    (\w+): ", recipe_source(), re.M)
            )
            source += '"--recipe"'
    for flag in re.findall(r"--[a-z-]+", command):
        assert f'"{flag}"' in source or f"{flag})" in source or f"{flag} " in source, f"{command}: no flag {flag}"


def recipe_source() -> str:
    """The file that declares the keys of a recipe, each of which is a flag."""
    return (ROOT / "train/engine/recipe.py").read_text(encoding="utf-8")
