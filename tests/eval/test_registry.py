"""eval.registry: registry, README, scripts and the files in results/ say the same, and it says so where they do not."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
import yaml

from eval import registry

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "results" / "registry.yaml"


@pytest.fixture(scope="module")
def files() -> set[str]:
    """The committed files."""
    try:
        words = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, or no git here: the committed files are unknown")
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def entries() -> list[registry.Entry]:
    return registry.load(PATH)


def test_all_agree(entries, files) -> None:
    """Every script, recipe and published file is there, each status is what the outputs say, and nothing in results/
    is without an entry."""
    assert registry.disagreements(entries, files) == []


def test_readme_is_made_from_it(entries, files, tmp_path) -> None:
    """The README's list is what the registry gives; writing it again changes no byte."""
    copy = tmp_path / "README.md"
    copy.write_bytes((ROOT / "README.md").read_bytes())
    registry.write_readme(copy, entries, files)
    assert copy.read_bytes() == (ROOT / "README.md").read_bytes(), "run: python -m eval.registry --readme README.md"
    assert all(f"| {entry.of} | {entry.title} |" in copy.read_text() for entry in entries)


def test_every_table_and_figure_of_the_paper_is_listed(entries) -> None:
    """Tables 1 to 3, Figures 1 to 6 and the appendix, once each; the rest is labelled an extension."""
    of = [entry.of for entry in entries if entry.of != "extension"]
    paper = [*(f"Table {n}" for n in (1, 2, 3)), *(f"Figure {n}" for n in range(1, 7)), "Appendix"]
    assert sorted(of) == sorted(paper)


def test_scripts_take_the_scales_of_their_entries(entries) -> None:
    """The script of a table or figure that has a scale names it in its usage, and takes --dry-run and --seeds."""
    for entry in entries:
        if not entry.name.startswith(("table", "figure")) or not entry.script or entry.name == "table1":
            continue
        text = (ROOT / entry.script).read_text()
        (program,) = [word for word in text.split() if word.startswith("scripts/") and word.endswith(".py")]
        source = (ROOT / program).read_text()
        assert all(f'"{flag}"' in source for flag in ("--scale", "--dry-run", "--seeds")), entry.script
        assert all(scale in text for scale in entry.status), entry.script
        assert entry.command == f"bash {entry.script} --scale tiny --seeds 3"


def measured(entries: list[registry.Entry]) -> registry.Entry:
    return next(entry for entry in entries if entry.status.get("tiny") == "measured" and entry.script)


def change(entries: list[registry.Entry], old: registry.Entry, **values: object) -> list[registry.Entry]:
    return [dataclasses.replace(old, **values) if entry is old else entry for entry in entries]


def test_each_disagreement_is_found(entries, files, tmp_path) -> None:
    """Take a script, a recipe, an output or an entry away, add a file, or state another status: one line names it."""
    entry = measured(entries)
    output = entry.outputs["tiny"][0]
    assert any(output in line for line in registry.disagreements(entries, files - {output}))
    assert f"{entry.name}: {entry.script}: no such file" in registry.disagreements(entries, files - {entry.script})
    recipe = "train/recipes/mistral-7b/reward.yaml"
    assert any(recipe in line for line in registry.disagreements(entries, files - {recipe}))
    without = registry.disagreements([other for other in entries if other is not entry], files)
    assert f"{output}: the output of no entry" in without
    assert registry.disagreements(entries, files | {"results/tiny/extra.md"}) == [
        "results/tiny/extra.md: the output of no entry"
    ]
    extra = "/".join(("scripts", "figure9.sh"))  # as one word it would be a script that a file names
    assert registry.disagreements(entries, files | {extra}) == [f"{extra}: in no entry"]
    added = registry.disagreements(entries, files | {"results/paper/table9.csv"})
    assert added == ["results/paper/table9.csv: in no entry's inputs or expected values"]
    (line,) = registry.disagreements(change(entries, entry, status={"tiny": "not run: no time"}), files)
    assert output in line
    third = next(other for other in entries if other.name == "table3")
    (line,) = registry.disagreements(
        change(entries, third, status={**third.status, "mixtral-8x7b": "measured"}), files
    )  # its file holds the paper's values alone
    assert "0 lines measured" in line


def test_status_follows_the_lines_of_a_table(entries, tmp_path) -> None:
    """A table with some lines not run is `partial`, with none it is `measured`, whatever else is said."""
    name = "results/tiny/table9/table9.csv"
    (tmp_path / name).parent.mkdir(parents=True)
    for lines, right in (("measured", "measured"), ("measured\nnot run", "partial"), ("measured\nitself", "measured")):
        (tmp_path / name).write_text(f"status\n{lines}\n")
        for status in ("measured", "partial: x", "not run: x"):
            entry = registry.Entry("table9", "extension", "t", [], {"tiny": status}, outputs={"tiny": [name]})
            found = registry.disagreements([entry], {name}, tmp_path)
            assert (found == []) == (status.partition(":")[0] == right), (lines, status, found)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("status", {"tiny": "done"}, "done"),
        ("status", {"tiny": "not run"}, "not run"),  # without a reason
        ("status", {"huge": "measured"}, "huge"),
        ("expected", [{"claim": "x", "status": "likely", "source": "y"}], "likely"),
        ("expected", [{"claim": "x"}], "claim"),
        ("colour", "red", "colour"),
        ("title", None, "title"),  # taken away
    ],
)
def test_bad_entries_are_refused(tmp_path, key: str, value: object, said: str) -> None:
    """A status, scale, mark or field that is not known: one line with the entry."""
    listed = yaml.safe_load(PATH.read_text())
    listed["table2"][key] = value
    if value is None:
        del listed["table2"][key]
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump(listed))
    with pytest.raises(registry.InputError, match=f"table2.*{said}"):
        registry.load(tmp_path / "registry.yaml")


def test_readme_without_marks_is_left_alone(run, monkeypatch, tmp_path) -> None:
    """No marks, or one twice: one line, and not a byte changes."""
    for text in (
        "# x\n",
        f"{registry.MARKS[0]}\n{registry.MARKS[0]}\n{registry.MARKS[1]}\n",
        "\n".join(registry.MARKS[::-1]),
    ):
        (tmp_path / "README.md").write_text(text)
        assert registry.MARKS[0] in run(registry.main, "--readme", tmp_path / "README.md").refusal
        assert (tmp_path / "README.md").read_text() == text
