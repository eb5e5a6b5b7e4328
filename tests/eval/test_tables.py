"""eval.tables: every cell is a record, or says that nothing was run."""

import csv
from pathlib import Path

import pytest
from synthetic import CRITERIA, METHODS, REGIMES, by_seed_end, by_seed_score, student, write_results

from eval import tables

LABELS = ("SFT on best of 4", "KTO", "IPO", "DPO", "DPO x 3", "NCA, pairs", "InfoNCA", "NCA")
NAMES = dict(zip(METHODS, LABELS, strict=True))
SCORES = {
    "reward": ("sampled", "all", "reward"),
    "win vs DPO": ("sampled", "all", "win_rate_vs_dpo"),
    "win vs mu": ("sampled", "all", "win_rate_vs_mu"),
    **{
        f"{source}, {decoding}": (decoding, source, criterion)
        for source, criterion in CRITERIA.items() if source != "all" for decoding in ("sampled", "greedy")
    },
}  # fmt: skip
ENDS = {
    "KL(pi, mu)": ("kl",),
    "chosen": ("chosen", "log_ratio"),
    "rejected": ("rejected", "log_ratio"),
    "accuracy": ("accuracy",),
}
DECIMALS = {"win vs DPO": 3, "win vs mu": 3}


def cells(text: str) -> dict[tuple[str, str, str], str]:
    """(regime, method, column) to the cell of the tables in a Markdown text."""
    found, regime, head = {}, "", []
    for line in text.splitlines():
        if line.startswith("## "):
            regime = line.split()[1].lower()
        words = [word.strip() for word in line.strip("|").split("|")] if line.startswith("|") else []
        if words[:1] == ["method"]:
            head = words
        elif words and not words[0].startswith("---"):
            found |= {(regime, words[0], column): cell for column, cell in zip(head, words, strict=True)}
    return found


def values(folder: Path, policy: str, column: str) -> list[float]:
    """The seeds' numbers behind a cell."""
    if column in SCORES:
        return list(by_seed_score(folder, policy, *SCORES[column]))
    return list(by_seed_end(folder, policy, *ENDS[column]))


def test_cells_are_the_records(run, tmp_path) -> None:
    """Each cell of tables.md and each line of tables.csv is the mean and t interval of the seeds' records."""
    folder = write_results(tmp_path)
    assert run(tables.main, "--results", folder).code == 0
    found = cells((folder / "tables.md").read_text())
    with open(folder / "tables.csv", newline="") as file:
        rows = {(row["regime"], row["policy"], row["column"]): row for row in csv.DictReader(file)}
    for regime in REGIMES:
        for method, label in NAMES.items():
            for column in (*SCORES, *ENDS):
                seeds = values(folder, f"{method}-{regime}", column)
                value, low, high = student(seeds)
                d = DECIMALS.get(column, 2)
                shown = f"{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]"
                itself = method == "dpo" and column == "win vs DPO"
                assert found[regime, label, column] == ("-" if itself else shown), (regime, label, column)
                row = rows[regime, f"{method}-{regime}", column]
                exact = [float(row[name]) for name in ("value", "low", "high", "seed_0", "seed_1", "seed_2")]
                assert exact == pytest.approx([value, low, high, *seeds], abs=1e-6)
            k = 2 if method in ("dpo", "kto", "ipo", "nca_pair") else 4
            assert found[regime, label, "K"] == str(k)
            assert found[regime, label, "responses"] == str(len(f"{method}-{regime}"))
            assert found[regime, label, "tokens"] == "1,234,567"
        assert found[regime, "mu (SFT)", "chosen"] == found[regime, "mu (SFT)", "win vs DPO"] == "-"
        value, low, high = student(values(folder, "mu", "reward"))
        assert found[regime, "mu (SFT)", "reward"] == f"{value:.2f} [{low:.2f}, {high:.2f}]"


def test_not_run(run, tmp_path) -> None:
    """A method without records keeps its line, every cell of it `not run`, and has no line in the CSV."""
    folder = write_results(tmp_path, without=["nca-hard"])
    assert run(tables.main, "--results", folder).code == 0
    found = cells((folder / "tables.md").read_text())
    for column in (*SCORES, *ENDS):
        assert found["hard", "NCA", column] == "not run"
        assert found["gentle", "NCA", column] != "not run"
    assert [key for key, cell in found.items() if cell == "not run" and key[1] != "NCA"] == []
    assert found["hard", "NCA", "responses"] == "-"
    text = (folder / "tables.csv").read_text()
    assert "hard,nca-hard," not in text
    assert "nan" not in text.lower()


def test_one_seed(run, tmp_path) -> None:
    """With one seed a score has its interval over prompts, a trend number none, and the notes say which."""
    folder = write_results(tmp_path, seeds=(4,))
    assert run(tables.main, "--results", folder).code == 0
    text = (folder / "tables.md").read_text()
    found = cells(text)
    (value,) = values(folder, "nca-hard", "reward")
    assert found["hard", "NCA", "reward"] == f"{value:.2f} [{value - 0.25:.2f}, {value + 0.5:.2f}]"
    (value,) = values(folder, "nca-hard", "chosen")
    assert found["hard", "NCA", "chosen"] == f"{value:.2f}"
    assert "bootstrap over prompts" in text
    assert "Student" not in text


def test_same_records_same_bytes(run, tmp_path) -> None:
    """Run twice, the files are the same."""
    folder = write_results(tmp_path)
    runs = []
    for _ in range(2):
        assert run(tables.main, "--results", folder).code == 0
        runs.append([(folder / name).read_bytes() for name in ("tables.md", "tables.csv")])
    assert runs[0] == runs[1]


def test_missing_records(run, tmp_path) -> None:
    """Without records there is no table: one line."""
    for name in ("scores", "trend", "manifests"):
        folder = write_results(tmp_path / name)
        (folder / f"{name}.jsonl").unlink()
        assert f"{name}.jsonl" in run(tables.main, "--results", folder).refusal
        assert not (folder / "tables.md").exists()
