"""The likelihood trend against numbers worked by hand, and against its definition on random prompts."""

import math
import random
import statistics

import pytest

from data_prep.files import InputError
from train.engine.trend import TIE, Measured, kl_estimate, summarise

# Log-ratios: (2, -1, 0.5) for a, (-1, 1, 1) for b; c has all its rewards tied.
A = Measured([3.0, 1.0, 2.0], [-8.0, -21.0, -9.5], [-10.0, -20.0, -10.0], [2, 10, 4])
B = Measured([1.0, 5.0, 5.0], [-7.0, -4.0, -11.0], [-6.0, -5.0, -12.0], [1, 4, 5])
C = Measured([4.0, 4.0], [-50.0, -60.0], [-1.0, -1.0], [3, 3])


def test_two_prompts_by_hand() -> None:
    """Ranks best first, ties in the row's order, the all-tied prompt left out and counted."""
    record = summarise([A, B, C], beta=0.1)
    assert (record["beta"], record["prompts"], record["excluded"]) == (0.1, 2, 1)
    # By rank: a gives its responses 0, 2, 1; b its responses 1, 2, 0.
    assert [rank["rank"] for rank in record["ranks"]] == [1, 2, 3]
    assert [rank["n"] for rank in record["ranks"]] == [2, 2, 2]
    expected = {
        "reward": [(3 + 5) / 2, (2 + 5) / 2, (1 + 1) / 2],
        "logps": [(-8 - 4) / 2, (-9.5 - 11) / 2, (-21 - 7) / 2],
        "log_ratio": [(2 + 1) / 2, (0.5 + 1) / 2, (-1 - 1) / 2],
        "r": [0.15, 0.075, -0.1],
        "logps_per_token": [(-8 / 2 - 4 / 4) / 2, (-9.5 / 4 - 11 / 5) / 2, (-21 / 10 - 7 / 1) / 2],
        "log_ratio_per_token": [(2 / 2 + 1 / 4) / 2, (0.5 / 4 + 1 / 5) / 2, (-1 / 10 - 1 / 1) / 2],
        "r_per_token": [0.0625, 0.01625, -0.055],
    }
    for name, values in expected.items():
        assert [rank[name] for rank in record["ranks"]] == pytest.approx(values), name
    # Rejected: strictly below the best, averaged within the prompt first: a's responses 1 and 2; b's response 0.
    assert record["chosen"] == pytest.approx({name: values[0] for name, values in expected.items()})
    assert record["rejected"]["log_ratio"] == pytest.approx(((-1 + 0.5) / 2 + -1) / 2)
    assert record["rejected"]["logps"] == pytest.approx(((-21 - 9.5) / 2 - 7) / 2)
    assert record["rejected"]["logps_per_token"] == pytest.approx(((-21 / 10 - 9.5 / 4) / 2 - 7) / 2)
    assert record["rejected"]["reward"] == pytest.approx((1.5 + 1) / 2)
    assert record["margin"] == pytest.approx(0.1 * (1.5 - -0.625))
    assert record["accuracy"] == 1.0


def test_accuracy_counts_a_tie_one_half() -> None:
    """Pairs of the chosen and each worse response; log-ratios within TIE of each other are a tie."""
    won, lost, tied = 1.0, -1.0, 0.5 * TIE
    prompt = Measured([9.0, 1.0, 2.0, 3.0, 9.0], [0.0, -won, -lost, tied, -7.0], [0.0] * 5, [1] * 5)
    assert summarise([prompt], 1.0)["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    # The mean is over prompts, not over pairs.
    pair = Measured([1.0, 2.0], [1.0, 0.0], [0.0, 0.0], [1, 1])
    assert summarise([prompt, pair], 1.0)["accuracy"] == pytest.approx((0.5 + 0) / 2)


def test_ragged_ranks_are_averaged_over_the_prompts_that_have_them() -> None:
    """Rank 3 of a K = 2 prompt does not exist and does not count as 0."""
    pair = Measured([2.0, 1.0], [-1.0, -2.0], [0.0, 0.0], [1, 2])
    record = summarise([A, pair], 1.0)
    assert [rank["n"] for rank in record["ranks"]] == [2, 2, 1]
    assert record["ranks"][2]["logps"] == -21.0


def test_only_tied_prompts_are_refused() -> None:
    """There is nothing to measure."""
    with pytest.raises(InputError, match="tied"):
        summarise([C, C], 1.0)


def test_random_prompts_by_the_definition() -> None:
    """summarise equals a direct transcription of its definitions on random ragged prompts with many ties."""
    rng = random.Random(0)
    beta = 0.3
    for _ in range(50):
        prompts = []
        for _ in range(rng.randint(1, 8)):
            k = rng.randint(2, 5)
            prompts.append(Measured(
                [float(rng.randint(1, 4)) for _ in range(k)], [-rng.uniform(1, 30) for _ in range(k)],
                [-rng.uniform(1, 30) for _ in range(k)], [rng.randint(1, 20) for _ in range(k)],
            ))  # fmt: skip
        used = [p for p in prompts if max(p.rewards) > min(p.rewards)]
        if not used:
            continue
        record = summarise(prompts, beta)
        assert record["excluded"] == len(prompts) - len(used)

        def ratio(p: Measured, i: int) -> float:
            return p.logps[i] - p.ref_logps[i]

        best = [min(i for i, s in enumerate(p.rewards) if s == max(p.rewards)) for p in used]
        worse = [[i for i, s in enumerate(p.rewards) if s < max(p.rewards)] for p in used]
        chosen = statistics.fmean(beta * ratio(p, i) for p, i in zip(used, best, strict=True))
        rejected = statistics.fmean(
            statistics.fmean(beta * ratio(p, i) for i in others) for p, others in zip(used, worse, strict=True)
        )
        accuracy = statistics.fmean(
            statistics.fmean(ratio(p, i) > ratio(p, j) for j in others)
            for p, i, others in zip(used, best, worse, strict=True)
        )
        assert record["chosen"]["r"] == pytest.approx(chosen)
        assert record["rejected"]["r"] == pytest.approx(rejected)
        assert record["margin"] == pytest.approx(chosen - rejected)
        assert record["accuracy"] == pytest.approx(accuracy)
        for rank, found in enumerate(record["ranks"]):
            have = [p for p in used if len(p.rewards) > rank]
            places = [sorted(range(len(p.rewards)), key=lambda i, p=p: (-p.rewards[i], i))[rank] for p in have]
            assert found["n"] == len(have)
            for name, value in {
                "reward": [p.rewards[i] for p, i in zip(have, places, strict=True)],
                "r_per_token": [beta * ratio(p, i) / p.tokens[i] for p, i in zip(have, places, strict=True)],
            }.items():
                assert found[name] == pytest.approx(statistics.fmean(value))
        assert len(record["ranks"]) == max(len(p.rewards) for p in used)


def test_kl_estimate_by_hand() -> None:
    """Mean and standard error over prompts; per token it is the ratio of sums, not a mean of ratios."""
    found = kl_estimate([1.0, -0.5, 2.5], [2, 1, 7])
    assert found["kl"] == pytest.approx(1.0)
    assert found["kl_standard_error"] == pytest.approx(math.sqrt((0 + 2.25 + 2.25) / 2 / 3))
    assert found["kl_per_token"] == pytest.approx(3.0 / 10)
    assert found["sample_tokens"] == pytest.approx(10 / 3)
    assert kl_estimate([0.25], [4])["kl_standard_error"] == 0.0
