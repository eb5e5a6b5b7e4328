"""scripts/prepare_data.sh: what it announces, and that its commands work one after the other."""

import importlib
import random
import shlex
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pytest
from layouts import ROOT, facts, generated, read_lines, released_pair, released_reward

from data_prep.compare import compare
from data_prep.rows import read_rows
from data_prep.sources import RELEASED, ULTRAFEEDBACK, ULTRAINTERACT


def dry_run(out: Path) -> str:
    script = ["bash", str(ROOT / "scripts" / "prepare_data.sh"), "--dry-run", "--out", str(out)]
    return subprocess.run(script, cwd="/", capture_output=True, text=True, check=True).stdout


def test_dry_run(tmp_path) -> None:
    """It shows every source with revision, licence and size, needs no network, and writes nothing."""
    shown = dry_run(tmp_path / "my data")
    for source in (ULTRAFEEDBACK, *RELEASED.values(), ULTRAINTERACT):
        (line,) = [line for line in shown.splitlines() if line.startswith(source.repo)]
        assert line.split()[1:] == [
            source.revision, source.licence, f"{source.records:,}", str(source.download_mb), "MB"
        ]  # fmt: skip
    assert "Disk:" in shown
    assert not list(tmp_path.iterdir())


def fake_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub with 120 prompts, the last 20 for testing, and released sets made from them as their scripts do."""
    records = generated(120, words=3)
    scored = {r["instruction"]: [(c["response"], c["overall_score"]) for c in r["completions"]] for r in records}
    reward = [released_reward(prompt, candidates) for prompt, candidates in scored.items()]
    preference = []
    for prompt, candidates in scored.items():
        random.seed(42)
        chosen = max(candidates, key=lambda candidate: candidate[1])
        while (rejected := random.choice(candidates)) is chosen:
            pass
        preference.append(released_pair(prompt, chosen, rejected))
    steps = [
        {"task": "Logic", "trajectory": [{"from": "user", "value": str(i)}], "chosen": "a", "rejected": "b"}
        for i in range(5)
    ]
    sets = {
        "openbmb/UltraFeedback": {"train": records},
        "ChenDRAG/ultrafeedback_reward": {"train_prefs": reward[:100], "test_prefs": reward[100:]},
        "ChenDRAG/ultrafeedback_preference": {"train_prefs": preference[:100], "test_prefs": preference[100:]},
        "openbmb/UltraInteract_pair": {"train": steps},
    }

    def load(repo: str, *, revision: str, split: str) -> list[dict[str, Any]]:
        return sets[repo][split]

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_the_whole_way(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    """The commands of the script run in its order, and rebuilt rows and pairs equal those of a released set.

    The released set is made here by the rules of the authors' scripts, so agreement is not by construction.
    """
    fake_hub(monkeypatch)
    out = tmp_path / "my data"
    commands = [shlex.split(line) for line in dry_run(out).splitlines() if line.startswith("python ")]
    assert len(commands) >= 10
    for times in ("first", "again"):
        for _, _, module, *arguments in commands:
            monkeypatch.setattr("sys.argv", [module, *arguments])
            importlib.import_module(module).main()
        builds = [words for words in commands if "--out" in words]
        assert capsys.readouterr().out.count("up to date") == (len(builds) if times == "again" else 0)

    rebuilt, released = out / "ultrafeedback", out / "released-reward"
    for split, count in (("train", 100), ("test", 20)):
        assert len(read_lines(rebuilt / f"{split}.jsonl")) == count
        same = compare(read_rows(rebuilt / f"{split}.jsonl"), read_rows(released / f"{split}.jsonl"))
        assert same["prompts"] == {"in_both": count, "only_in_a": 0, "only_in_b": 0}
        assert same["scores"] == {"equal": 4 * count}
        assert set(same["orders"]) == {"same", "tied_in_both"}

    pairs = {row.prompt[0]["content"]: row for row in read_rows(out / "pairs-released" / "rows.jsonl")}
    ties = 0
    for theirs in read_rows(out / "released-preference" / "train.jsonl"):
        tied = theirs.rewards[0] == theirs.rewards[1]
        ties += tied
        mine = pairs.get(theirs.prompt[0]["content"])
        assert tied == (mine is None)
        assert tied or (mine.responses, mine.rewards) == (theirs.responses, theirs.rewards)
    assert facts(out / "pairs-released")["rows_dropped"]["all_tied"] == ties > 0
