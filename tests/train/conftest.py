"""Shared by the tests of the engine: a small random mu, ragged rows, the plain log-prob, and runs of the commands."""

import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from data_prep.files import write_text
from data_prep.rows import Row, write_rows
from train.dpo import dpo_loss
from train.engine.models import new_mistral, new_tokenizer
from train.engine.run import align
from train.engine.rundir import save_policy
from train.engine.tokens import EncodedRow
from train.infonca import infonca_loss
from train.nca import nca_loss

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the sum of two and three is five so we add one more then stop here with a short proof"
WORDS = TEXT.split()
METHODS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "nca": (nca_loss, ("alpha", "beta")),
    "infonca": (infonca_loss, ("alpha", "beta")),
    "dpo": (dpo_loss, ("beta",)),
}
# A run of 6 steps on 24 rows. Held-out evaluations and checkpoints fall on the same steps.
RECIPE = """
learning_rate: 3.0e-3
lr_schedule: linear
warmup_ratio: 0.1
weight_decay: 0.0
adam_beta1: 0.9
adam_beta2: 0.95
max_grad_norm: 1.0
epochs: 2
global_batch: 8
micro_batch: 4
max_prompt_tokens: 64
max_response_tokens: 24
log_every: 1
checkpoint_every: 2
seed: 0
beta: 0.5
alpha: 1.0
evaluate_every: 2
kl_prompts: 20
"""

torch.set_num_threads(1)  # equal bytes need equal numbers of threads, here and in the subprocesses


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a subprocess: offline, one thread, this project on the path."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The miniature's kind of tokenizer, trained on a few words."""
    return new_tokenizer(iter([TEXT] * 3), 300)


@pytest.fixture(scope="session")
def make_mu(tokenizer: PreTrainedTokenizerFast) -> Callable[[Path, int], Path]:
    """Save a small random model into a directory. Its configuration asks for dropout, as a checkpoint may."""

    def make(path: Path, seed: int) -> Path:
        model = new_mistral(
            tokenizer, hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=64, positions=128, seed=seed
        )
        for parameter in model.parameters():  # larger than at initialisation, so that the context matters
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.config.attention_dropout = 0.1
        save_policy(path, model, tokenizer)
        return path

    return make


@pytest.fixture(scope="session")
def mu(make_mu: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the reference policy."""
    return make_mu(tmp_path_factory.mktemp("models") / "mu", 1)


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[Row]]:
    """Random rows of K responses each (K drawn from `ks`), of uneven lengths, without tied rewards."""

    def make(count: int, seed: int, ks: Sequence[int] = (2, 3, 4), name: str = "row") -> list[Row]:
        rng = random.Random(seed)

        def text(most: int) -> str:
            return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

        rows = []
        for index in range(count):
            k = rng.choice(ks)
            prompt = [{"role": "user", "content": text(6)}]
            rewards = [float(reward) for reward in rng.sample(range(1, 11), k)]
            rows.append(Row(f"{name}-{index}", prompt, [text(8) for _ in range(k)], rewards, "test"))
        return rows

    return make


@pytest.fixture(scope="session")
def encoded_rows() -> Callable[..., list[EncodedRow]]:
    """Random token ids: ragged K, ragged lengths, some responses of a single token."""

    def make(count: int, seed: int, vocabulary: int = 61, longest: int = 9) -> list[EncodedRow]:
        rng = random.Random(seed)

        def ids(least: int, most: int) -> list[int]:
            return [rng.randrange(vocabulary) for _ in range(rng.randint(least, most))]

        return [
            EncodedRow(f"row-{i}", ids(1, longest), [ids(1, longest) for _ in range(k)], [float(j) for j in range(k)])
            for i in range(count)
            for k in [rng.randint(2, 5)]
        ]

    return make


@pytest.fixture(scope="session")
def plain_logps() -> Callable[[nn.Module, list[int], list[int]], Tensor]:
    """log pi(y|x) by one forward pass of `transformers` over [x, y] alone: no packing, padding, mask or positions."""

    def logps(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        predicted = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
        return predicted.gather(-1, torch.tensor(response)[:, None]).sum()

    return logps


@pytest.fixture(scope="session")
def files(make_rows: Callable[..., list[Row]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training rows, held-out rows and the recipe, on disk."""
    directory = tmp_path_factory.mktemp("inputs")
    paths = {name: directory / file for name, file in
             (("rows", "rows.jsonl"), ("heldout", "heldout.jsonl"), ("recipe", "small.yaml"))}  # fmt: skip
    write_rows(paths["rows"], make_rows(24, seed=3))
    # More held-out rows than one batch of samples for the KL (16), so that two processes share them.
    write_rows(paths["heldout"], make_rows(20, seed=4, name="heldout"))
    write_text(paths["recipe"], RECIPE)
    return paths


@pytest.fixture(scope="session")
def arguments(mu: Path, files: dict[str, Path]) -> Callable[..., list[str]]:
    """The command line of a run into `out`; later words override earlier ones."""

    def build(out: Path, *more: Any) -> list[str]:
        words = ["--model", mu, "--rows", files["rows"], "--eval-rows", files["heldout"], "--recipe", files["recipe"]]
        return [str(word) for word in [*words, "--out", out, *more]]

    return build


@pytest.fixture(scope="session")
def align_run(arguments: Callable[..., list[str]]) -> Callable[..., Path]:
    """Run `python -m train.METHOD` in this process; returns the run directory. `loss` stands in for the method's."""

    def run(out: Path, *more: Any, method: str = "nca", loss: Callable[..., Tensor] | None = None) -> Path:
        objective, uses = METHODS[method]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"train.{method}", *arguments(out, *more)])
            align(method, loss or objective, uses)
        return out

    return run


@pytest.fixture(scope="session")
def finished(align_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed NCA run of 6 steps. Tests read it and leave it as it is."""
    return align_run(tmp_path_factory.mktemp("runs") / "nca")
