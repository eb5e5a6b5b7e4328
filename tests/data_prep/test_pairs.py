"""Pairs and subsets of K responses."""

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import facts, read_lines

from data_prep.pairs import STRATEGIES, convert, keep_responses, make_pairs
from data_prep.rows import Row

SYMMETRIC = ("best-vs-random", "best-vs-rest", "all-pairs")  # those that do not look at the order of responses


def row(rewards: list[float], texts: list[str] | None = None, name: str = "x") -> Row:
    texts = texts or [f"response {i}" for i in range(len(rewards))]
    return Row(name, [{"role": "user", "content": "q"}], texts, [float(r) for r in rewards], "test")


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Rows with many ties and repeated texts."""
    size = draw(st.integers(2, 6))
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=size, max_size=size))
    texts = draw(st.lists(st.sampled_from("abcdefgh"), min_size=size, max_size=size))
    return row(rewards, texts, draw(st.text("xyz", min_size=1, max_size=3)))


@given(rows(), st.sampled_from(STRATEGIES), st.integers(0, 5))
def test_a_pair_never_inverts_or_invents_an_order(one: Row, strategy: str, seed: int) -> None:
    """The chosen side has the strictly higher reward and another text, and both sides are the row's own."""
    for pair in make_pairs(one, strategy, seed)[0]:
        assert pair.rewards[0] > pair.rewards[1]
        assert pair.responses[0] != pair.responses[1]
        assert set(zip(pair.responses, pair.rewards, strict=True)) <= set(zip(one.responses, one.rewards, strict=True))
        if strategy != "all-pairs":
            assert pair.rewards[0] == max(one.rewards)


@given(rows(), st.integers(0, 5))
def test_every_candidate_is_counted_once(one: Row, seed: int) -> None:
    """Kept, tied and identical add up to 1, K - 1 or K (K - 1) / 2, and agree with a direct count."""
    size = len(one.rewards)
    expected = {"best-vs-random": 1, "released": 1, "best-vs-rest": size - 1, "all-pairs": size * (size - 1) / 2}
    for strategy in STRATEGIES:
        pairs, fates = make_pairs(one, strategy, seed)
        assert fates.total() == expected[strategy]
        assert fates["kept"] == len(pairs)
    scored = list(zip(one.rewards, one.responses, strict=True))
    directly = Counter(
        "tied" if a[0] == b[0] else "identical" if a[1] == b[1] else "kept"
        for a, b in itertools.combinations(scored, 2)
    )
    assert make_pairs(one, "all-pairs", seed)[1] == directly


@given(rows(), st.integers(0, 5), st.randoms())
def test_order_of_responses_changes_nothing(one: Row, seed: int, random) -> None:
    """Permuted responses give the same pairs, and the same subsets, byte for byte."""
    order = list(range(len(one.rewards)))
    random.shuffle(order)
    for strategy in SYMMETRIC:
        assert make_pairs(one, strategy, seed) == make_pairs(one.select(order), strategy, seed)
    for count in range(2, 6):
        assert keep_responses(one, count, seed) == keep_responses(one.select(order), count, seed)


@given(rows(), st.integers(0, 5))
def test_strategies_are_nested(one: Row, seed: int) -> None:
    """Pairs of best-vs-random are among those of best-vs-rest, and those among all-pairs."""
    found = [{str(pair) for pair in make_pairs(one, strategy, seed)[0]} for strategy in SYMMETRIC]
    assert found[0] <= found[1] <= found[2]
    assert bool(found[0]) == bool(found[1])


@given(rows(), st.integers(0, 5))
def test_subsets_for_the_ablation_on_k_are_nested(one: Row, seed: int) -> None:
    """A subset holds a best response first and min(N, K) responses, and grows with N."""
    kept = [keep_responses(one, count, seed) for count in range(2, 8)]
    for count, subset in enumerate(kept, start=2):
        assert len(subset.responses) == min(count, len(one.responses))
        assert subset.rewards[0] == max(one.rewards)
        assert subset.rewards == sorted(subset.rewards, reverse=True)
    for small, large in itertools.pairwise(kept):
        assert Counter(small.responses) <= Counter(large.responses)


def test_the_random_rival_is_uniform() -> None:
    """Over 6,000 rows each of the three worse responses is drawn in a third of them (chi-square, p > 1e-6)."""
    drawn = Counter(
        make_pairs(row([5, 1, 2, 3], name=str(i)), "best-vs-random", 0)[0][0].rewards[1] for i in range(6000)
    )
    chi_square = sum((drawn[reward] - 2000) ** 2 / 2000 for reward in (1.0, 2.0, 3.0))
    assert chi_square < 27.6  # 2 degrees of freedom


def test_seed_and_other_rows() -> None:
    """Another seed draws otherwise; more rows change none of the draws for those that were there."""
    few = [row([5, 1, 2, 3], name=str(i)) for i in range(50)]
    more = [row([1, 2, 3], name="new"), *few]
    first = convert(few, "best-vs-random", None, 0)[0]
    assert convert(few, "best-vs-random", None, 1)[0] != first
    assert convert(more, "best-vs-random", None, 0)[0][1:] == first


@pytest.mark.parametrize(
    ("rewards", "rival"), [([9, 1, 2, 3], 2), ([1, 9, 2, 3], 0), ([1, 2, 9, 3], 0), ([1, 2, 3, 9], 0)]
)
def test_released_rule(rewards: list[float], rival: int) -> None:
    """The released set's rival of four: the first response, or the third where the first is the best.

    Worked by hand from the public script: `random.seed(42)` before each prompt makes `random.choice` of four
    pick positions 0, 0, 2, ..., and the best itself is passed over.
    """
    (pair,), _ = make_pairs(row(rewards), "released", 0)
    assert pair.responses == [f"response {rewards.index(9)}", f"response {rival}"]


def test_released_rule_does_not_prefer_among_ties() -> None:
    """Where the released script makes a preference of two equal rewards, the pair is left out and counted."""
    assert make_pairs(row([7, 1, 7, 2]), "released", 0) == ([], Counter(tied=1))


def test_command(command, write, tmp_path) -> None:
    """The command writes what it counts; a row without any order is counted; a second run does nothing."""
    three = [row([3, 1, 2], name="a"), row([1, 1], name="tied"), row([2, 1], ["s", "s"], name="same")]
    path = write("rows.jsonl", [dataclasses.asdict(one) for one in three])
    out = tmp_path / "out"
    first = command("data_prep.pairs", path, "--out", out, "--strategy", "all-pairs")
    assert first.returncode == 0, first.stderr
    assert [(pair["id"], pair["rewards"]) for pair in read_lines(out / "rows.jsonl")] == [
        ("a#0-1", [3, 2]),
        ("a#0-2", [3, 1]),
        ("a#1-2", [2, 1]),
    ]
    assert facts(out)["rows_dropped"] == {"all_tied": 1, "identical": 1}
    assert facts(out)["candidate_pairs"] == {"kept": 3, "tied": 1, "identical": 1}
    before = (out / "rows.jsonl").stat().st_mtime_ns
    second = command("data_prep.pairs", path, "--out", out, "--strategy", "all-pairs")
    assert "up to date" in second.stdout
    assert (out / "rows.jsonl").stat().st_mtime_ns == before
    third = command("data_prep.pairs", path, "--out", out, "--strategy", "best-vs-rest")
    assert "up to date" not in third.stdout


def test_nothing_to_pair(command, write, tmp_path) -> None:
    """Rows without any preference end in one line and exit code 2, and write nothing."""
    path = write("rows.jsonl", [dataclasses.asdict(row([1, 1]))])
    done = command("data_prep.pairs", path, "--out", tmp_path / "out", "--strategy", "best-vs-rest")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
