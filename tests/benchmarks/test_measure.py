"""TRL's trainer sees the same tokens, adapters and reference as the engine; ratios are those of summed times."""

from pathlib import Path

import pytest
import torch

from benchmarks.measure import check_equal, gradients
from benchmarks.ours import our_loss, our_references
from benchmarks.report import ratios, spread, trl_best
from benchmarks.workload import TINY, Lengths, make_rows, new_model
from train.engine.logps import packable
from train.nca_pair import nca_pair_loss

BETA = 0.5


@pytest.mark.parametrize("cached", [False, True])
def test_same_loss_and_gradients_as_trl(cached: bool, tmp_path: Path) -> None:
    """A step of DPOTrainer on two rows has the mean loss and the gradients of ours on the same rows, and is not the
    constant 2 ln 2 of a policy that is compared with itself."""
    pytest.importorskip("trl")
    from benchmarks.peer import TrlSteps

    lengths = Lengths(12, 20, prompt_spread=0.5, response_spread=0.5)
    rows = make_rows(2, lengths, k=2, vocabulary=TINY["vocab_size"])
    ours, steps = packable(new_model(TINY)), TrlSteps(new_model(TINY), rows, tmp_path, beta=BETA, cached=cached)
    theirs = steps.step(0, 1).item()
    loss = our_loss(ours, rows, our_references(ours, rows), nca_pair_loss, beta=BETA)
    loss.backward()
    assert abs(theirs - 2 * torch.tensor(2.0).log().item()) > 1e-4
    check_equal("TRL", (loss.item(), gradients(ours)), (theirs, gradients(steps.trainer.model)))


def test_ratios_are_of_summed_times() -> None:
    """(10 + 6) / (2 + 2 + 1 + 1) prompts a second in one run, (10 + 6) / (2 + 2) with the cache; rows apart."""
    seconds = {"released": [10.0, 6.0], "reference": [1.0, 1.0], "training": [2.0, 2.0],
               "TRL, 1 pair": [4.0, 5.0], "TRL, 2 pairs": [8.0], "TRL with its cache, 1 pair": [3.0]}  # fmt: skip
    part = {"cpu_s": seconds}
    assert ratios(part, "released") == (16 / 6, 4.0)
    assert spread(part, "released", False) == (3.0, 5.0)
    assert spread(part, "released", True) == (2.0, 10 / 3)
    assert trl_best(part, "TRL") == "TRL, 2 pairs"
    assert ratios(part, "TRL, 2 pairs", cached="TRL with its cache, 1 pair") == (8 / 6, 0.75)
