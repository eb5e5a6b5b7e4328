"""Real small runs: the loss that is minimised, resuming, refusing, repeating, and the records of a run."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from data_prep.files import InputError, read_json, read_jsonl, run_command, write_jsonl
from data_prep.manifest import read_manifest
from data_prep.rows import Row, read_rows, write_rows
from train import sft
from train.engine.batches import EpochSampler
from train.engine.logps import logps_of_rows
from train.engine.models import Checkpoint
from train.engine.recipe import AlignmentRecipe
from train.engine.run import training_arguments
from train.engine.tokens import EncodedRow, Encoder
from train.engine.trainer import RowTrainer, TrendTrainer
from train.engine.trend import Measured, summarise
from train.nca import nca_loss

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVE = partial(nca_loss, alpha=1.0, beta=0.5)
Plain = Callable[[nn.Module, list[int], list[int]], Tensor]


def records(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_jsonl(path)]


def same_outcome(run: Path, other: Path) -> bool:
    """The same policy and the same trend, to the byte."""
    names = ["policy/model.safetensors", "trend.jsonl"]
    return all((run / name).read_bytes() == (other / name).read_bytes() for name in names)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in records(run / "log.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast, files: dict[str, Path]) -> list[EncodedRow]:
    return Encoder(tokenizer, 64, 24).rows(read_rows(files["rows"]))


@pytest.fixture(scope="module")
def heldout(tokenizer: PreTrainedTokenizerFast, files: dict[str, Path]) -> list[EncodedRow]:
    return Encoder(tokenizer, 64, 24).rows(read_rows(files["heldout"]))


@pytest.fixture(scope="module")
def ref_logps(mu: Path, rows: list[EncodedRow], heldout: list[EncodedRow]) -> dict[str, list[float]]:
    both = [*rows, *heldout]
    return {row.id: values for row, values in
            zip(both, logps_of_rows(Checkpoint(str(mu)).load()[0], both, 8), strict=True)}  # fmt: skip


@pytest.fixture
def fit(
    mu: Path, files: dict[str, Path], rows: list[EncodedRow], ref_logps: dict[str, list[float]], tmp_path: Path
) -> Callable[..., RowTrainer]:
    """Train with a constant learning rate and without clipping, so that nothing hides the scale of a gradient."""

    def run(micro: int, reference: dict[str, list[float]] = ref_logps) -> RowTrainer:
        plain = {"lr_schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1e6, "epochs": 1}
        recipe = AlignmentRecipe.load(files["recipe"], {**plain, "micro_batch": micro, "checkpoint_every": 99})
        sampler = EpochSampler([row.stream_length for row in rows], recipe.global_batch, recipe.epochs, recipe.seed)
        model, _ = Checkpoint(str(mu)).load()
        where = training_arguments(tmp_path / str(micro), recipe)
        trainer = RowTrainer(model, where, rows, reference, OBJECTIVE, sampler)
        trainer.train()
        return trainer

    return run


def plain_loop(
    mu: Path, rows: list[EncodedRow], ref_logps: dict[str, list[float]], plain_logps: Plain
) -> tuple[nn.Module, list[float], list[float]]:
    """Three steps of AdamW on the mean NCA loss over 8 prompts; each response in a forward pass of its own."""
    model, _ = Checkpoint(str(mu)).load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    order = list(EpochSampler([row.stream_length for row in rows], 8, 1, seed=0))
    found, norms = [], []
    for start in range(0, 24, 8):
        terms = []
        for row in (rows[i] for i in order[start : start + 8]):
            logps = torch.stack([plain_logps(model, row.prompt_ids, ids) for ids in row.response_ids])
            log_ratios = (logps - torch.tensor(ref_logps[row.id]))[None]
            terms.append(OBJECTIVE(log_ratios, torch.tensor([row.rewards]), torch.ones_like(log_ratios).bool()))
        loss = torch.cat(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        optimizer.step()
        found.append(loss.item())
    return model, found, norms


def test_training_is_a_plain_loop_whatever_the_micro_batch(
    mu: Path, rows: list[EncodedRow], ref_logps: dict[str, list[float]], fit: Callable[..., RowTrainer],
    plain_logps: Plain,
) -> None:  # fmt: skip
    """The loss is the mean over the prompts of the global batch: 8 x 1, 4 x 2 and 1 x 8 (micro-batch x accumulation)
    on ragged K give the losses, gradient norms and weights of a loop without packing, padding or accumulation."""
    assert len({len(row.response_ids) for row in rows}) == 3
    model, expected, norms = plain_loop(mu, rows, ref_logps, plain_logps)
    start = torch.nn.utils.parameters_to_vector(Checkpoint(str(mu)).load()[0].parameters())
    moved = torch.nn.utils.parameters_to_vector(model.parameters()) - start
    for micro in (8, 4, 1):
        trainer = fit(micro)
        history = [line for line in trainer.state.log_history if "loss" in line]
        assert [line["loss"] for line in history] == pytest.approx(expected, rel=1e-4)
        assert [line["grad_norm"] for line in history] == pytest.approx(norms, rel=1e-3)
        ours = torch.nn.utils.parameters_to_vector(trainer.model.parameters()) - start
        # Adam divides by the gradient's size, so the noise of a near-zero gradient shows; over all weights it is small.
        assert (ours - moved).norm() < 1e-2 * moved.norm()


@pytest.mark.parametrize(
    ("method", "loss"),
    [("nca", lambda k: 2 * math.log(2)), ("infonca", math.log), ("dpo", lambda k: math.log(2))],
)  # fmt: skip
def test_the_first_loss_is_that_of_the_reference(
    method: str, loss: Callable[[int], float], rows: list[EncodedRow], align_run: Callable[..., Path], tmp_path: Path
) -> None:
    """At pi = mu the logged loss is 2 ln 2 (NCA), the mean of ln K over the batch (InfoNCA) and ln 2 (DPO)."""
    out = align_run(tmp_path / method, "--epochs", 1, "--evaluate-every", 9, method=method)
    first = list(EpochSampler([row.stream_length for row in rows], 8, 1, seed=0))[:8]
    expected = math.fsum(loss(len(rows[i].response_ids)) for i in first) / 8
    assert losses(out)[0] == pytest.approx(expected, abs=1e-4)
    assert losses(out)[-1] != pytest.approx(expected, abs=1e-3)


def test_the_trend_starts_at_the_reference(finished: Path, rows: list[EncodedRow], heldout: list[EncodedRow]) -> None:
    """trend.jsonl: both sets at steps 0, 2, 4 and 6, all ranks, r = beta * log_ratio, and at step 0 all is 0."""
    found = records(finished / "trend.jsonl")
    assert [(r["step"], r["split"]) for r in found] == [(s, split) for s in (0, 2, 4, 6) for split in
                                                        ("heldout", "train")]  # fmt: skip
    assert [r["epoch"] for r in found[::2]] == pytest.approx([0, 2 / 3, 4 / 3, 2], abs=1e-3)
    for record in found:
        encoded = heldout if record["split"] == "heldout" else rows
        assert record["prompts"] == len(encoded)
        assert [rank["n"] for rank in record["ranks"]] == [
            sum(len(row.rewards) > rank for row in encoded) for rank in range(4)
        ]
        for part in [*record["ranks"], record["chosen"], record["rejected"]]:
            assert part["r"] == pytest.approx(0.5 * part["log_ratio"])
            assert part["r_per_token"] == pytest.approx(0.5 * part["log_ratio_per_token"])
        assert ("kl" in record) == (record["split"] == "heldout")
        if record["step"] == 0:
            assert all(abs(rank["log_ratio"]) < 1e-4 for rank in record["ranks"])
            assert abs(record.get("kl", 0.0)) < 1e-4
            assert record["accuracy"] == 0.5
        else:
            assert any(abs(rank["log_ratio"]) > 1e-2 for rank in record["ranks"])


def test_the_last_trend_is_that_of_the_saved_policy(
    finished: Path, mu: Path, rows: list[EncodedRow], heldout: list[EncodedRow], plain_logps: Plain
) -> None:
    """The records of the last step follow from policy/ and mu alone, by plain forward passes."""
    policy, reference = (Checkpoint(str(path)).load()[0].eval() for path in (finished / "policy", mu))
    last = {record["split"]: record for record in records(finished / "trend.jsonl") if record["step"] == 6}

    def values(model: nn.Module, row: EncodedRow) -> list[float]:
        return [plain_logps(model, row.prompt_ids, ids).item() for ids in row.response_ids]

    with torch.no_grad():
        for split, encoded in (("heldout", heldout), ("train", rows)):
            measured = [
                Measured(row.rewards, values(policy, row), values(reference, row), [len(r) for r in row.response_ids])
                for row in encoded
            ]
            expected = summarise(measured, 0.5)
            assert last[split]["margin"] == pytest.approx(expected["margin"], abs=1e-4)
            assert last[split]["accuracy"] == pytest.approx(expected["accuracy"])
            for ours, theirs in zip(last[split]["ranks"], expected["ranks"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_the_manifest_states_what_was_done(finished: Path, rows: list[EncodedRow]) -> None:
    """Counts of rows and work, the arithmetic, and dropout off though the checkpoint asks for 0.1."""
    facts = read_manifest(finished)["identity"]["facts"]
    assert facts["model"]["attention_dropout"] == 0.0
    assert facts["model"]["dtype"] == "float32"
    assert facts["model"]["parameters"] == facts["model"]["trainable"] > 0
    assert (facts["processes"], facts["global_batch"]) == (1, 8)
    assert facts["rows"]["bos_per_prompt"] == 1
    assert facts["rows"]["prompts"] == len(rows)
    assert facts["rows"]["responses"] == sum(len(row.response_ids) for row in rows)
    seen = [rows[i] for i in EpochSampler([row.stream_length for row in rows], 8, 2, seed=0)]
    assert facts["work"] == {
        "steps": 6, "prompts_seen": 48, "responses_seen": sum(len(row.response_ids) for row in seen),
        "tokens_seen": sum(row.stream_length for row in seen),
    }  # fmt: skip


def test_a_seed_repeats_and_another_differs(finished: Path, align_run: Callable[..., Path], tmp_path: Path) -> None:
    """The same command gives the same bytes and the same manifest hash; another seed another policy."""
    again = align_run(tmp_path / "again")
    assert same_outcome(again, finished)
    assert read_manifest(again)["hash"] == read_manifest(finished)["hash"]
    other = align_run(tmp_path / "other", "--seed", 1)
    assert not same_outcome(other, finished)


def test_a_killed_run_ends_as_an_undisturbed_one(
    align_run: Callable[..., Path], arguments: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL after a checkpoint, then the same command: byte-identical policy and trend, the same manifest hash."""
    longer = ["--epochs", 20, "--evaluate-every", 10, "--checkpoint-every", 10, "--reference-cache", tmp_path / "ref"]
    undisturbed = align_run(tmp_path / "undisturbed", *longer)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "train.nca", *arguments(out, *longer)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        while not list(out.glob("checkpoint-*/complete.json")):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"{out}: continues after step " in done.stdout
    assert same_outcome(out, undisturbed)
    assert read_manifest(out)["hash"] == read_manifest(undisturbed)["hash"]


class Interruption:
    """The NCA loss, interrupted like a key press in the n-th micro-batch of a run (two make a step)."""

    def __init__(self, n: int):
        self.left = n

    def __call__(self, *values: Tensor, **options: float) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return nca_loss(*values, **options)


def test_a_damaged_checkpoint_is_removed_and_the_one_before_used(
    finished: Path, align_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that is truncated, or was never sealed, is removed, said so, and the run ends as if undisturbed."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        align_run(out, loss=Interruption(11))  # in step 6
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-10")
    with open(out / "checkpoint-10" / "model.safetensors", "r+b") as weights:
        weights.truncate(1000)
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-5")
    (out / "checkpoint-5" / "complete.json").unlink()
    capsys.readouterr()
    align_run(out)
    said = capsys.readouterr().out
    assert f"{out / 'checkpoint-10'}: unfinished or damaged, removed" in said
    assert f"{out / 'checkpoint-5'}: unfinished or damaged, removed" in said
    assert f"{out}: continues after step 4" in said
    assert same_outcome(out, finished)


def test_with_no_whole_checkpoint_a_run_starts_again(
    finished: Path, align_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only checkpoint is damaged: nothing of it is used, and the run ends as if undisturbed."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        align_run(out, loss=Interruption(7))  # in step 4
    with open(out / "checkpoint-2" / "optimizer.pt", "r+b") as state:
        state.truncate(1000)
    align_run(out)
    assert "continues" not in capsys.readouterr().out
    assert same_outcome(out, finished)


def test_checkpoints_by_the_clock(finished: Path, align_run: Callable[..., Path], tmp_path: Path) -> None:
    """`checkpoint_minutes`: here after every step, so that an interruption in step 6 loses that step alone; the policy
    is that of the run with checkpoints by steps."""
    out = tmp_path / "run"
    often = ["--checkpoint-every", 0, "--checkpoint-minutes", 1e-9]
    with pytest.raises(KeyboardInterrupt):
        align_run(out, *often, loss=Interruption(11))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-5"]
    align_run(out, *often)
    assert same_outcome(out, finished)
    seldom = align_run(tmp_path / "seldom", "--checkpoint-every", 0, "--checkpoint-minutes", 60)
    assert not list(seldom.glob("checkpoint-*"))
    assert same_outcome(seldom, finished)


def test_an_adapter_run_resumes_to_the_same_bytes(align_run: Callable[..., Path], tmp_path: Path) -> None:
    """LoRA with gradient checkpointing in bfloat16, interrupted in step 5: adapters and trend as if undisturbed."""
    words = ["--tuning", "lora", "--lora-rank", 4, "--dtype", "bfloat16", "--gradient-checkpointing", "true"]
    undisturbed, out = align_run(tmp_path / "undisturbed", *words), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        align_run(out, *words, loss=Interruption(9))
    align_run(out, *words)
    for name in ("policy/adapter_model.safetensors", "trend.jsonl"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


def test_gradient_checkpointing_changes_nothing(finished: Path, align_run: Callable[..., Path], tmp_path: Path) -> None:
    """Activations computed again are the same activations."""
    assert same_outcome(align_run(tmp_path / "run", "--gradient-checkpointing", "true"), finished)


def test_what_is_missing_on_the_command_line_is_named(align_run: Callable[..., Path], tmp_path: Path) -> None:
    """Neither the recipe nor the command says where the model or the rows are; a logger that is not installed."""
    for words, said in ((["--model", ""], "--model"), (["--rows", ""], "--rows"), (["--eval-rows", ""], "--eval-rows"),
                        (["--report-to", "nonesuch"], "nonesuch")):  # fmt: skip
        with pytest.raises(InputError, match=said) as refused:
            align_run(tmp_path / "run", *words)
        assert "\n" not in str(refused.value)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    align_run: Callable[..., Path], mu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--dry-run` on the small model: its parameters, steps and memory, and no directory."""
    out = align_run(tmp_path / "run", "--dry-run")
    said = capsys.readouterr().out
    assert "steps       6 of 8 prompts" in said
    assert "hours on 1 device(s)" in said
    assert not out.exists()
    with pytest.raises(InputError, match="global_batch = 8 is not a multiple"):
        align_run(tmp_path / "run", "--dry-run", "--devices", 3)


def test_resuming_between_two_evaluations(align_run: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint that is no evaluation step adds no record: the trend is that of an undisturbed run."""
    apart = ["--evaluate-every", 2, "--checkpoint-every", 3, "--reference-cache", tmp_path / "reference"]
    undisturbed = align_run(tmp_path / "undisturbed", *apart)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        align_run(out, *apart, loss=Interruption(9))  # in step 5
    align_run(out, *apart)
    assert [r["step"] for r in records(out / "trend.jsonl")] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert same_outcome(out, undisturbed)
    logged = [(line["step"], line["loss"]) for line in records(out / "log.jsonl") if "loss" in line]
    assert logged == [(line["step"], line["loss"]) for line in records(undisturbed / "log.jsonl") if "loss" in line]


def test_a_finished_run_is_left_alone_and_a_changed_one_refused(
    finished: Path, align_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command does no work; a changed recipe or changed rows exit with 2 and name what changed."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    align_run(out, loss=Interruption(1))  # the loss is never asked
    assert capsys.readouterr().out == f"{out}: done already, nothing to do\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [Row("a", [{"role": "user", "content": "x"}], ["y", "z"], [1.0, 2.0], "test")] * 1)
    for change, name in ((["--learning-rate", 1e-5], "learning_rate"), (["--rows", rows], "inputs.rows")):
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda change=change: align_run(out, *change))
        assert stopped.value.code == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith(f"error: {out}: ")
        assert name in message
        assert "--fresh" in message
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_fresh_replaces_a_run(finished: Path, align_run: Callable[..., Path], tmp_path: Path) -> None:
    """--fresh removes what is there, the run with the changed recipe takes its place, whole and only itself."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "checkpoint-99").mkdir()
    align_run(out, "--fresh", "--epochs", 1)
    assert read_manifest(out)["identity"]["settings"]["recipe"]["epochs"] == 1
    assert [r["step"] for r in records(out / "trend.jsonl")] == [0, 0, 2, 2, 3, 3]
    assert not (out / "checkpoint-99").exists()


@pytest.mark.parametrize("manifest", ["whole", "damaged"])
def test_fresh_redoes_a_finished_run(
    manifest: str, finished: Path, align_run: Callable[..., Path], tmp_path: Path
) -> None:
    """--fresh says "remove what an earlier run left": under the same plan too, and whatever state it is in."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    if manifest == "damaged":
        (out / "manifest.json").write_text("{")
    before = (out / "trend.jsonl").stat().st_mtime_ns
    align_run(out, "--fresh")
    assert (out / "trend.jsonl").stat().st_mtime_ns != before
    assert same_outcome(out, finished)


def test_fresh_removes_runs_only(align_run: Callable[..., Path], tmp_path: Path) -> None:
    """--out with the folder of all runs, or a home directory, by mistake: --fresh removes no folder that is no run."""
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="runs"):
        align_run(tmp_path / "runs", "--fresh")
    assert (tmp_path / "runs" / "other" / "manifest.json").exists()


def test_a_damaged_policy_is_finished_again(finished: Path, align_run: Callable[..., Path], tmp_path: Path) -> None:
    """A finished run whose weights were altered is not taken for done; its last checkpoint gives them back."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with open(out / "policy" / "model.safetensors", "r+b") as weights:
        weights.truncate(1000)
    align_run(out)
    assert same_outcome(out, finished)
    assert read_manifest(out)["hash"] == read_manifest(finished)["hash"]


def test_a_loss_that_is_not_finite_stops_with_the_row(
    rows: list[EncodedRow], ref_logps: dict[str, list[float]], fit: Callable[..., RowTrainer]
) -> None:
    """NaN never reaches the weights: training stops and names step and row."""
    order = list(EpochSampler([row.stream_length for row in rows], 8, 1, seed=0))
    bad = rows[order[12]].id  # in the second step
    with pytest.raises(InputError, match=f"step 2: the loss of row '{bad}' is not finite"):
        fit(4, {**ref_logps, bad: [float("nan")] * len(ref_logps[bad])})


def trend_trainer(
    mu: Path, recipe: AlignmentRecipe, path: Path, rows: list[EncodedRow], heldout: list[EncodedRow],
    train_reference: dict[str, list[float]], heldout_reference: dict[str, list[float]],
) -> TrendTrainer:  # fmt: skip
    (model, tokenizer), (reference, _) = Checkpoint(str(mu)).load(), Checkpoint(str(mu)).load()
    return TrendTrainer(
        model, training_arguments(path, recipe, evaluate_every=2), rows, train_reference, OBJECTIVE,
        EpochSampler([row.stream_length for row in rows], 8, 1, seed=0),
        heldout=heldout, heldout_ref_logps=heldout_reference, train_subset=rows, reference=reference, kl_rows=heldout,
        tokenizer=tokenizer, beta=0.5, max_response_tokens=8, trend_path=path / "trend.jsonl", batch_size=8,
        start_tolerance=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("wrong", ["none", "heldout", "train", "misaligned"])
def test_a_reference_of_another_model_is_refused_at_step_0(
    wrong: str, mu: Path, make_mu: Callable[[Path, int], Path], files: dict[str, Path], rows: list[EncodedRow],
    heldout: list[EncodedRow], ref_logps: dict[str, list[float]], tmp_path: Path,
) -> None:  # fmt: skip
    """No step is taken unless log pi = log mu on both sets, row by row: values of another model, or those of the
    right model given to the wrong rows, are refused."""
    other = Checkpoint(str(make_mu(tmp_path / "other", 2))).load()[0]
    both = [*rows, *heldout]
    foreign = {row.id: values for row, values in zip(both, logps_of_rows(other, both, 8), strict=True)}
    # Two rows with their rewards in the same order: exchanged, their log-ratios cancel in the mean of every rank.
    pairs = [row for row in heldout if len(row.rewards) == 2]
    first, second = next((a, b) for a in pairs for b in pairs
                         if a is not b and (a.rewards[0] < a.rewards[1]) == (b.rewards[0] < b.rewards[1]))  # fmt: skip
    exchanged = {**ref_logps, first.id: ref_logps[second.id], second.id: ref_logps[first.id]}
    train_reference = foreign if wrong == "train" else ref_logps
    heldout_reference = {"heldout": foreign, "misaligned": exchanged}.get(wrong, ref_logps)
    trainer = trend_trainer(
        mu, AlignmentRecipe.load(files["recipe"], {"epochs": 1}), tmp_path / "run", rows, heldout, train_reference,
        heldout_reference,
    )  # fmt: skip
    if wrong == "none":
        trainer.train()
        assert trainer.state.global_step == 3
        return
    with pytest.raises(InputError, match="the policy is not the reference"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_input_that_cannot_be_trained_on_is_one_line(
    make_rows: Callable[..., list[Row]], align_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Too few rows for a global batch, and held-out rows without any preference, are bad input and say so."""
    few, tied = tmp_path / "few.jsonl", tmp_path / "tied.jsonl"
    write_rows(few, make_rows(5, seed=1))
    records = [{**vars(row), "rewards": [1.0] * len(row.rewards)} for row in make_rows(3, seed=1)]
    write_jsonl(tied, records)
    with pytest.raises(InputError, match="5 rows"):
        align_run(tmp_path / "a", "--rows", few)
    with pytest.raises(InputError, match="tied"):
        align_run(tmp_path / "b", "--eval-rows", tied)


def test_sft_trains_a_policy_that_alignment_can_start_from(
    files: dict[str, Path], align_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """python -m train.sft: the negative log-likelihood falls, the policy loads as mu, a second call does nothing."""
    rows = read_rows(files["rows"])
    demonstrations, out = tmp_path / "demonstrations.jsonl", tmp_path / "mu"
    write_jsonl(demonstrations, [{"id": row.id, "prompt": row.prompt, "response": row.responses[0], "source": "test"}
                                 for row in rows])  # fmt: skip
    shape = {"vocabulary": 300, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward": 64,
             "positions": 128, "epochs": 8, "max_grad_norm": 20.0}  # fmt: skip
    recipe = yaml.safe_load(files["recipe"].read_text()) | shape
    for key in ("beta", "alpha", "evaluate_every", "kl_prompts"):
        del recipe[key]
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(recipe))
    words = ["sft", "--demonstrations", demonstrations, "--recipe", path, "--out", out]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    sft.main()
    policy, tokenizer = Checkpoint(str(out / "policy")).load()
    first = EpochSampler([row.stream_length for row in encode(tokenizer, rows)], 8, 8, seed=0)
    lengths = [len(row.response_ids[0]) for row in encode(tokenizer, rows)]
    tokens = sum(lengths[i] for i in list(first)[:8]) / 8
    assert losses(out)[0] == pytest.approx(tokens * math.log(policy.config.vocab_size), rel=0.05)  # nearly uniform
    assert sum(losses(out)[-3:]) < 0.8 * sum(losses(out)[:3])  # the last epoch against the first
    capsys.readouterr()
    sft.main()
    assert capsys.readouterr().out == f"{out}: done already, nothing to do\n"
    monkeypatch.undo()
    aligned = align_run(tmp_path / "aligned", "--model", out / "policy", "--epochs", 1)
    assert losses(aligned)[0] == pytest.approx(2 * math.log(2), abs=1e-4)


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[EncodedRow]:
    """Rows with their first response only, as SFT sees them."""
    encoder = Encoder(tokenizer, 64, 24)
    return [EncodedRow(row.id, *encoder.demonstration(row.id, row.prompt, row.responses[0]), [0.0]) for row in rows]


def test_the_log_holds_every_step(finished: Path) -> None:
    """log.jsonl: a line for each of 6 steps with loss, gradient norm and learning rate; recipe and plan beside it."""
    lines = [line for line in records(finished / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["grad_norm"] > 0 for line in lines)
    # Linear from 3e-3 to 0 after a warm-up of one step (a tenth of 6, rounded up); logged is the rate that was used.
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 3e-3, 2.4e-3, 1.8e-3, 1.2e-3, 6e-4])
    plan = read_json(finished / "plan.json")
    assert plan["settings"]["method"] == "nca"
    assert json.dumps(read_manifest(finished)["identity"]["settings"]) == json.dumps(plan["settings"])
