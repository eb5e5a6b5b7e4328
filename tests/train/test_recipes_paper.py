"""The paper's recipes: headers that keep their word, settings of the paper, files and launch files that exist."""

import argparse
import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from train.engine.planner import RunPlan, plan_run
from train.engine.recipe import AlignmentRecipe
from train.engine.sizes import Architecture, RowStatistics

ROOT = Path(__file__).resolve().parents[2]
SCALES = [ROOT / "train" / "recipes" / scale for scale in ("mistral-7b", "mixtral-8x7b")]
RECIPES = sorted(path for scale in SCALES for path in scale.iterdir())
REWARD, PREFERENCE = (SCALES[0] / f"{name}.yaml" for name in ("reward", "preference"))


@dataclasses.dataclass(frozen=True)
class HeaderRun:
    """One `command:`, `cost:`, `expect:` of a header."""

    command: str
    cost: str
    expect: str


def header(path: Path) -> list[HeaderRun]:
    """The runs that a recipe's header names; a command goes on in lines that begin with `#          `."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(lines).replace("\n#          ", " ")
    found = re.findall(r"^# command: (.*)\n# cost:    (.*)\n# expect:  (.*)$", text, re.MULTILINE)
    assert len(found) == len(re.findall("command: ", text)), f"{path.name}: a command without cost or expectation"
    return [HeaderRun(*run) for run in found]


def planned(command: str) -> tuple[RunPlan, str]:
    """The plan of a command line, and its launch kind, on sets of the published size."""
    words = shlex.split(command)
    launch, devices = "single", 1
    if words[0] == "accelerate":
        launch = Path(words[words.index("--config_file") + 1]).stem.removeprefix("deepspeed_")
        devices = int(words[words.index("--num_processes") + 1])
    else:
        assert words[:2] == ["python", "-m"]
    method = words[words.index("-m") + 1]
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    AlignmentRecipe.add_arguments(parser)
    recipe = AlignmentRecipe.from_arguments(parser.parse_args(words[words.index("-m") + 2 :]))
    model = "mistralai/Mixtral-8x7B-v0.1" if recipe.model == "DIR" else recipe.model
    rows = RowStatistics.assumed(recipe.rows, recipe)
    return plan_run(recipe, method.removeprefix("train."), Architecture.of(model), rows, devices), launch


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_headers_hold_what_the_planner_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of a header parses with its overrides, names this recipe and a method that exists, and its cost is
    the planner's; what is expected carries its mark."""
    monkeypatch.chdir(ROOT)
    runs = header(path)
    assert runs
    for run in runs:
        assert f"--recipe {path.relative_to(ROOT)} " in run.command
        plan, launch = planned(run.command)
        assert importlib.util.find_spec(f"train.{plan.method}")
        assert run.cost == plan.cost(launch), f"write into {path.name}: # cost:    {plan.cost(launch)}"
        assert not re.search(r"\d", run.expect) or re.search(r"\[[VSU]\]|Figure 4|between", run.expect)
    assert len({plan.recipe.model for plan, _ in map(planned, (run.command for run in runs))}) == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_revision_is_invented(path: Path) -> None:
    """A revision is a full commit, or empty with a way to give it in every command."""
    recipe = AlignmentRecipe.load(path, {})
    assert re.fullmatch("|[0-9a-f]{40}", recipe.model_revision)
    if not recipe.model_revision:
        assert all("--model-revision COMMIT" in run.command or "--model DIR" in run.command for run in header(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_rows_are_those_that_prepare_data_writes(path: Path) -> None:
    """Each file of rows is one that scripts/prepare_data.sh makes under `data`, header overrides included."""
    script = (ROOT / "scripts/prepare_data.sh").read_text()
    recipe = AlignmentRecipe.load(path, {})
    named = {recipe.rows, recipe.eval_rows, *re.findall(r"--rows ([^\s,]+)", path.read_text())}
    for rows in named:
        folder, name = rows.removeprefix("data/").split("/")
        assert f'--out "$out/{folder}"' in script, rows
        builder = re.search(rf'-m (data_prep\.\w+)[^\n]*--out "\$out/{folder}"', script)
        split = builder is not None and builder[1] == "data_prep.ultrafeedback"
        assert name in (("train.jsonl", "test.jsonl") if split else ("rows.jsonl",)), rows


def test_settings_are_those_of_the_authors() -> None:
    """Learning rate, schedule, batch, epochs and seed as on all four model cards; beta, lengths and adapters as in the
    released configuration; accumulation as on the cards: 8 on 4 GPUs for rewards, 16 on 2 for preferences."""
    for name, devices, accumulation in (("released-reward", 4, 8), ("released-preference", 2, 16)):
        recipe = AlignmentRecipe.load(REWARD.with_name(f"{name}.yaml"), {})
        assert (recipe.learning_rate, recipe.lr_schedule, recipe.warmup_ratio) == (5e-6, "cosine", 0.1)
        assert (recipe.global_batch, recipe.epochs, recipe.seed) == (32, 1, 42)
        assert (recipe.beta, recipe.max_tokens, recipe.max_prompt_tokens) == (0.01, 1024, 512)
        assert (recipe.lora_rank, recipe.lora_alpha, recipe.tuning) == (16, 16, "qlora")
        assert (recipe.micro_batch, recipe.accumulation(devices), recipe.quirks) == (1, accumulation, "official")


def test_methods_are_compared_under_the_same_settings() -> None:
    """Reward and preference runs, and Table 3's two models, differ in data, alpha and memory alone."""
    reward, preference = (dataclasses.asdict(AlignmentRecipe.load(path, {})) for path in (REWARD, PREFERENCE))
    assert {key for key in reward if reward[key] != preference[key]} == {"rows", "eval_rows", "alpha"}
    mistral, mixtral = (dataclasses.asdict(AlignmentRecipe.load(scale / "ultrainteract.yaml", {})) for scale in SCALES)
    assert {key for key in mistral if mistral[key] != mixtral[key]} == {"model", "micro_batch", "router_aux_loss"}


def test_every_trained_row_of_the_tables_has_a_run() -> None:
    """Table 2: NCA, InfoNCA, DPO x 3, DPO, DPO x 6, KTO, IPO and NCA for pairs; Figure 4: K = 2, 3; Figure 6: a
    point of each grid; Table 3: DPO and NCA on both models; the authors' cards."""
    outs = {re.search(r"--out runs/(\S+)", run.command)[1] for path in RECIPES for run in header(path)}  # type: ignore[index]
    assert outs >= {
        "nca", "infonca", "dpo-x3", "dpo", "dpo-x6", "kto", "ipo", "nca-pair", "nca-K2", "nca-K3",
        "nca-alpha0.1-beta0.03", "nca-pair-beta0.03", "ultrainteract-dpo", "ultrainteract-nca",
        "mixtral-ultrainteract-dpo", "mixtral-ultrainteract-nca", "released-nca", "released-nca-pair", "released-dpo",
    }  # fmt: skip


STAND_IN = '#!/usr/bin/env bash\nprintf "RUN %s python" "$WORLD_SIZE"; printf " %q" "$@"; echo\n'


def script(name: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a Python that prints how it was called."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *words],
        env={**os.environ, "PYTHON": str(tmp_path / "python")}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def settings(command: str) -> set[str]:
    """Method, recipe and overrides of a command, in any order, without where it writes and which copy it reads."""
    words = shlex.split(command)
    words = words[words.index("-m") + 1 :]
    pairs = zip(words[1::2], words[2::2], strict=True)
    ignored = ("--out", "--model", "--model-revision", "--reference-cache")
    return {words[0], *(f"{key} {value}" for key, value in pairs if key not in ignored)}


@pytest.mark.parametrize(
    ("name", "words", "runs"),
    [("train_mistral7b.sh", ["table2", "figure4", "figure6", "table3", "cards"], 49), ("train_mixtral8x7b.sh", [], 2)],
)
def test_the_scripts_hold_every_run(
    name: str, words: list[str], runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run calls each run of the headers with --dry-run; each parses, has a plan on the GPUs that it is given,
    and writes to a place of its own."""
    monkeypatch.chdir(ROOT)
    done = script(name, tmp_path, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^RUN (\d+) (python -m .*) --dry-run$", done.stdout, re.MULTILINE)
    assert len(found) == runs
    scale = SCALES["mixtral" in name]
    for devices, command in found:
        plan, _ = planned(command.replace(" --reference-cache runs/reference", ""))
        assert plan_run(plan.recipe, plan.method, plan.architecture, plan.rows, int(devices)).steps > 1000
    assert len({re.search(r"--out (\S+)", command)[1] for _, command in found}) == runs  # type: ignore[index]
    for path in RECIPES:
        for run in header(path) if path.parent == scale else ():
            assert settings(run.command) in [settings(command) for _, command in found], run.command


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train_mistral7b.sh", ["table9"], "unknown word table9"),
        ("train_mistral7b.sh", ["--dry-run"], "name a part"),
        ("train_mistral7b.sh", ["table2"], "commit is needed"),
        ("train_mixtral8x7b.sh", [], "name the SFT checkpoint"),
    ],
)
def test_the_scripts_refuse_in_one_line(name: str, words: list[str], message: str, tmp_path: Path) -> None:
    """Exit code 2, before anything is set up."""
    done = script(name, tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[0]
    assert "RUN" not in done.stdout
