"""How the repository is built: stages in one direction, commands that exist, nothing private, no unsafe loading."""

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("data_prep", "train", "eval", "benchmarks")  # in the order of the data
CODE = sorted(path for stage in (*STAGES, "scripts") for path in (ROOT / stage).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}


def repository_files() -> list[Path]:
    """All text files that are, or would be, committed."""
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, or no git here: the committed files are unknown")
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and path.suffix not in (".png", ".safetensors")]


def imported(tree: ast.AST) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_a_later_one(stage) -> None:
    """data_prep -> train -> eval: what is imported of the project belongs to this stage or an earlier one."""
    later = set(STAGES[STAGES.index(stage) + 1 :]) | {"scripts", "tests"}
    files = sorted((ROOT / stage).rglob("*.py"))
    assert len(files) > 5
    for path in files:
        roots = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert not roots & later, path


def test_engine_knows_no_objective() -> None:
    """The engine imports no method: the loss is handed to it."""
    methods = {path.stem for path in (ROOT / "train").glob("*.py")} - {"__init__"}
    for path in (ROOT / "train" / "engine").rglob("*.py"):
        assert not imported(ast.parse(path.read_text())) & {f"train.{method}" for method in methods}, path


def test_commands_exist() -> None:
    """Every `python -m module` of this project that a file names can be run: it has a main part."""
    found = set()
    command = re.compile(rf"-m ((?:{'|'.join(STAGES)})(?:\.[a-z_0-9]+)+)")
    for path in repository_files():
        found |= set(command.findall(path.read_text(errors="replace")))
    assert len(found) > 10
    for module in sorted(found):
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        path = Path(spec.origin)
        if path.name == "__init__.py":
            path = path.with_name("__main__.py")
        assert 'if __name__ == "__main__":' in path.read_text(), module


def test_files_named_in_commands_exist() -> None:
    """Every recipe and script that a file names is there."""
    found = set()
    for path in repository_files():
        text = path.read_text(errors="replace")
        found |= set(re.findall(r"\b(train/recipes/[\w/-]+\.yaml|scripts/[\w-]+\.(?:sh|py))\b", text))
    assert len(found) > 4
    assert [name for name in sorted(found) if not (ROOT / name).is_file()] == []


def test_no_private_paths() -> None:
    """No committed file names a place on the machine it was written on."""
    private = [re.compile("/".join(words)) for words in (("", "work", "(main|shared|venv)"), ("shared", "data/"))]
    private += [re.compile("/(root|home/[a-z]+)/")]
    for path in repository_files():
        text = path.read_text(errors="replace")
        assert not [pattern.pattern for pattern in private if pattern.search(text)], path


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def test_no_remote_code() -> None:
    """trust_remote_code is never anything but False, as an argument, a dictionary's key or an assignment."""
    said = 0
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            values: list[ast.AST | None] = []
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                values = [node.value]
            elif isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                values = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "trust_remote_code"]
            for value in values:
                assert isinstance(value, ast.Constant), path
                assert value.value is False, path
                said += 1
    assert said


def test_only_safetensors() -> None:
    """No pickle in any form: no such module, no torch.load or torch.save, no allow_pickle; models are loaded with
    use_safetensors."""
    loaded = 0
    for path in CODE:
        tree = ast.parse(path.read_text())
        assert not {name.partition(".")[0] for name in imported(tree)} & UNSAFE_MODULES, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
                assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), path
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                assert node.arg != "allow_pickle" or not is_true(node.value), path
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
                and "Model" in ast.unparse(node.func)
            ):
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                assert is_true(keywords.get("use_safetensors")), path
                loaded += 1
    assert loaded
