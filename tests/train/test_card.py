"""train.card: the figures are the run's, the metadata is what the Hub reads, nothing private or unescaped gets out."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from data_prep.files import run_command, sha256_text, to_json
from data_prep.manifest import file_digest
from train import card
from train.engine.rundir import RunDirectory

Write = Callable[..., str]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "nca | <b>run")


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Write:
    """Run the command; returns the card, or with `refused` its one line."""

    def call(run: Path, refused: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["train.card", str(run)])
        try:
            run_command(card.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        lines = capsys.readouterr().err.strip().splitlines()
        if refused:
            assert code == 2
            assert len(lines) == 1
            assert not (run / "card.md").exists()
            return lines[0]
        assert code == 0, lines
        return (run / "card.md").read_text()

    return call


def change_manifest(run: Path, change: Callable[[dict], None]) -> None:
    """Change a manifest, and its hash with it."""
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    manifest["hash"] = sha256_text(to_json(manifest["identity"], sort_keys=True))
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_metadata_is_what_the_hub_reads(run, write) -> None:
    """huggingface_hub reads the head back: method, library, and each metric with the last held-out value of the
    trend, read here without the project's code."""
    write(run)
    read = ModelCard.load(run / "card.md").data
    assert read.library_name == "transformers"
    assert {"alignment", "nca"} <= set(read.tags)
    assert read.base_model is None  # a local directory is no model of the Hub
    assert read.license is None
    lines = [json.loads(line) for line in (run / "trend.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "heldout"][-1]
    found = {result.metric_name: result.metric_value for result in read.eval_results}
    expected = {
        "chosen r": last["chosen"]["r"], "rejected r": last["rejected"]["r"], "accuracy": last["accuracy"],
        "margin": last["chosen"]["r"] - last["rejected"]["r"], "KL(pi, mu)": last["kl"],
        "chosen log-ratio": last["chosen"]["r"] / last["beta"],
    }  # fmt: skip
    assert expected == pytest.approx({name: found[name] for name in expected}, abs=1e-6)


def test_text_has_recipe_manifest_command_and_trend(run, write) -> None:
    """The recipe as YAML equals the manifest's; hash, commit and digests stand there; one row for each evaluation."""
    text = write(run)
    manifest = json.loads((run / "manifest.json").read_text())
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    assert recipe == manifest["identity"]["settings"]["recipe"]
    for value in (
        manifest["hash"],
        manifest["identity"]["outputs"]["policy"],
        *manifest["identity"]["inputs"].values(),
    ):
        assert f"`{value}`" in text
    course = text.partition("Over training:")[2].partition("##")[0]
    assert re.findall(r"^\| (\d+) \|", course, re.MULTILINE) == ["0", "2", "4", "6"]
    assert "--eval-rows" in re.search(r"```bash\n(.*?)```", text, re.DOTALL).group(1)


def test_nothing_private_and_nothing_unescaped(run, write) -> None:
    """Paths of this machine are cut, and a name with markup is shown as text by a Markdown renderer."""
    change_manifest(
        run, lambda manifest: manifest.update(command="python -m train.nca --out=/data/me/x --rows /data/me/r `")
    )
    text = write(run)
    assert "/data/me" not in text
    assert str(run.parent) not in text
    assert "--out=.../x --rows .../r `" in text
    body = text.split("---\n", 2)[2]  # below the YAML head
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    assert "<b>" not in shown
    assert "nca | &lt;b&gt;run</h1>" in shown


def test_policy_stays_what_it_was(run, write) -> None:
    """The card changes neither the policy's digest nor whether the run is done; written twice it is the same."""
    digest = file_digest(run / "policy")
    plan = json.loads((run / "plan.json").read_text())
    first = write(run)
    assert file_digest(run / "policy") == digest
    assert RunDirectory(run, plan).is_done
    assert write(run) == first
    (run / "policy" / "config.json").write_text("{}")
    assert file_digest(run / "policy") != digest


def test_long_trend_is_thinned_but_ends_with_the_end() -> None:
    """Of 100 evaluations at most 13 are shown, the first and the last among them."""
    sides = {"r": 0.1, "log_ratio": 0.2, "log_ratio_per_token": 0.01}
    record = {
        "prompts": 9,
        "excluded": 0,
        "beta": 0.5,
        "chosen": sides,
        "rejected": sides,
        "margin": 0,
        "accuracy": 0.5,
    }
    records = [{"step": step, **record} for step in range(0, 1000, 10)]
    steps = re.findall(r"^\| (\d+) \|", card.trend_section(records).partition("Over training:")[2], re.MULTILINE)
    assert (steps[0], steps[-1]) == ("0", "990")
    assert len(steps) <= 13


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("unfinished", "is not finished; run its command again"),
        ("no run", "holds no run"),
        ("changed", "is not what the run left"),
        ("no training", "not a training run"),
    ],
)
def test_other_folders_are_refused(damage, words, run, write) -> None:
    """One line, and no card, for a run that is unfinished, changed, or none."""
    if damage in ("unfinished", "no run"):
        (run / "manifest.json").unlink()
    if damage == "no run":
        (run / "plan.json").unlink()
    if damage == "changed":
        with open(run / "trend.jsonl", "a") as file:
            file.write("\n")
    if damage == "no training":
        change_manifest(run, lambda manifest: manifest["identity"]["outputs"].pop("policy"))
    assert words in write(run, refused=True)


def test_caveats_are_said(run, write) -> None:
    """Cut responses and a commit that does not name the code are among the limits."""

    def change(manifest: dict) -> None:
        manifest["identity"]["facts"]["rows"]["responses_cut"] = 7
        manifest["circumstances"]["dirty"] = True

    change_manifest(run, change)
    limits = write(run).partition("## Limits")[2]
    assert re.search(r"^- 7 of \d+ training responses were cut", limits, re.MULTILINE)
    assert "commit does not name the code" in limits


def test_run_without_a_trend(run, write) -> None:
    """A run of SFT has a card as well: no metrics, and it says that there is no trend."""

    def change(manifest: dict) -> None:
        manifest["identity"]["settings"].pop("objective")
        manifest["identity"]["outputs"].pop("trend.jsonl")

    change_manifest(run, change)
    (run / "trend.jsonl").unlink()
    assert "measured no likelihood trend" in write(run)
    assert ModelCard.load(run / "card.md").data.eval_results is None


def test_adapter(align_run, write, tmp_path) -> None:
    """The card of an adapter names its library, and PEFT's own stays beside the weights: the run stays done."""
    run = align_run(tmp_path / "lora", "--tuning", "lora")
    assert "## Likelihood trend" in write(run)
    assert ModelCard.load(run / "card.md").data.library_name == "peft"
    assert RunDirectory(run, json.loads((run / "plan.json").read_text())).is_done
