"""Mode `official`: each quirk of the released code by itself on ids worked out by hand, and all of them together
against a plain computation of the released kind."""

import copy
import gzip
import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from released import TEMPLATE, released_logps, released_sequences, zephyr_tokenizer
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import MistralForCausalLM, PreTrainedTokenizerFast

from data_prep.files import InputError
from data_prep.rows import Row
from train.engine.logps import logps_of_rows, packable
from train.engine.models import new_mistral, new_tokenizer, nf4_compute
from train.engine.official import QUIRKS, alpha_of, break_tie, cut_jointly, parse_quirks, rank_share
from train.engine.tokens import Encoder
from train.infonca import infonca_loss
from train.labels import soft_labels
from train.nca import nca_loss

# Ids of `zephyr_tokenizer`: EOS 1, markers 2 to 4, "\n" 5, a 6, b 7, ab 8, the mark before a text 9, c 10, d 11, ...
EOS = 1
SYSTEM, USER, ASSISTANT = (
    [4, 9, 5, 1, 9, 5],
    [2, 9, 5],
    [1, 9, 5, 3, 9, 5],
)  # a user's content stands between the latter


@pytest.fixture(scope="module")
def zephyr() -> PreTrainedTokenizerFast:
    return zephyr_tokenizer()


@pytest.fixture(scope="module")
def model(zephyr: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """A small random Mistral whose log-probs depend on the context, with the attention of the released code's time."""
    model = new_mistral(zephyr, hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=64, positions=128, seed=5)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_attn_implementation("eager")
    return model.eval()


@pytest.fixture(scope="module")
def packed(model: MistralForCausalLM) -> MistralForCausalLM:
    """The same model, taking packed streams."""
    return packable(copy.deepcopy(model))


def encoder(tokenizer: PreTrainedTokenizerFast, quirks: str, prompt: int = 64, total: int = 128) -> Encoder:
    return Encoder(tokenizer, prompt, total, max_tokens=total, long_prompts="keep_end", quirks=parse_quirks(quirks))


def one_row(question: str, *responses: str) -> Row:
    rewards = [float(-i) for i in range(len(responses))]
    return Row("a", [{"role": "user", "content": question}], list(responses), rewards, "test")


def random_rows(count: int, k: int, longest: int) -> list[Row]:
    """Single-turn rows of uneven lengths, best response first, ties included."""
    rng = random.Random(k)

    def text(most: int) -> str:
        return "".join(rng.choices("abcdefghij\n", k=rng.randint(0, most))) + "a"

    return [
        Row(str(i), [{"role": "user", "content": text(2 * longest)}], [text(longest) for _ in range(k)],
            sorted((rng.choice([1.0, 4.5, 7.0]) for _ in range(k)), reverse=True), "test")
        for i in range(count)
    ]  # fmt: skip


def test_quirks_are_named_one_by_one_or_all_together() -> None:
    """Nothing, all, or a list; an unknown name is refused with the known ones."""
    assert parse_quirks("") == frozenset()
    assert parse_quirks("official") == QUIRKS
    assert len(QUIRKS) == 7
    assert parse_quirks("tie_break, doubled_eos") == {"tie_break", "doubled_eos"}
    with pytest.raises(InputError, match=r"double_eos unknown.*doubled_eos"):
        parse_quirks("tie_break,double_eos")


def test_separate_tokenization_encodes_the_response_as_a_text_of_its_own(zephyr: PreTrainedTokenizerFast) -> None:
    """Joined, the response is the tail of one text; apart, it begins with the mark of a text. No BOS in either."""
    row = one_row("abc", "ab", "ba")
    joined, apart = (encoder(zephyr, quirks).row(row) for quirks in ("", "separate_tokenization"))
    assert joined.prompt_ids == apart.prompt_ids == [*USER, 8, 10, *ASSISTANT]
    assert joined.response_ids == [[8, EOS], [7, 6, EOS]]
    assert apart.response_ids == [[9, 8, EOS], [9, 7, 6, EOS]]


def test_doubled_eos_keeps_the_templates_end_of_turn(zephyr: PreTrainedTokenizerFast) -> None:
    """A response is its text, the template's EOS and newline, and a second EOS; both are targets, none is attended."""
    encoded = encoder(zephyr, "doubled_eos").row(one_row("abc", "ab", "ba"))
    assert encoded.response_ids == [[8, EOS, 9, 5, EOS], [7, 6, EOS, 9, 5, EOS]]
    assert encoded.unattended == EOS
    plain = encoder(zephyr, "").row(one_row("abc", "ab", "ba"))
    assert [ids.count(EOS) for ids in plain.response_ids] == [1, 1]
    assert plain.unattended is None


def test_unattended_tokens_change_nothing_behind_them(
    zephyr: PreTrainedTokenizerFast, model: MistralForCausalLM, packed: MistralForCausalLM
) -> None:
    """With the quirk, the tokens behind an EOS have the log-probs of a sequence in which it is masked; without it,
    others."""
    rows = [one_row("abc", "ab", "ba")]
    sequences = [
        ([*USER, 8, 10, *ASSISTANT, *ids], [], [-100] * 11 + ids)
        for ids in ([8, EOS, 9, 5, EOS], [7, 6, EOS, 9, 5, EOS])
    ]
    expected = {
        masked: released_logps(
            model, [(ids, [int(not masked or i != EOS) for i in ids], labels) for ids, _, labels in sequences]
        )
        for masked in (True, False)
    }
    (quirk,) = encoder(zephyr, "doubled_eos").rows(rows)
    attended = type(quirk)(quirk.id, quirk.prompt_ids, quirk.response_ids, quirk.rewards)
    found = logps_of_rows(packed, [quirk, attended], 1)
    assert found[0] == pytest.approx(expected[True], abs=1e-4)
    assert found[1] == pytest.approx(expected[False], abs=1e-4)
    assert min(abs(a - b) for a, b in zip(*found, strict=True)) > 1e-2


def test_joint_truncation_by_hand() -> None:
    """Judged on the longest response: nothing is cut where all fits, however long the prompt; then the prompt; then
    every response of the row, to what a full prompt would leave, although this prompt is short."""
    prompt, short = list(range(10)), [1, 2]
    assert cut_jointly(prompt, [short, [3] * 6], 16, 8) == (prompt, [short, [3] * 6])
    assert cut_jointly(prompt, [short, [3] * 7], 16, 8) == (prompt[2:], [short, [3] * 7])
    assert cut_jointly(prompt, [[2] * 8, [3] * 9], 16, 8) == (prompt[2:], [[2] * 8, [3] * 8])
    assert cut_jointly([0], [[2] * 12, [3] * 16], 16, 8) == ([0], [[2] * 8, [3] * 8])


def test_joint_truncation_is_not_the_papers(zephyr: PreTrainedTokenizerFast) -> None:
    """Behind a short prompt the paper's mode cuts the one long response to what is left; the quirk cuts both to
    max_tokens - max_prompt_tokens. What is lost is counted."""
    row = one_row("a", "b" * 14, "b" * 30)  # 10 tokens of prompt; 15 and 31 of response, with EOS
    kept = {}
    for quirks in ("", "joint_truncation"):
        used = encoder(zephyr, quirks, prompt=20, total=32)
        kept[quirks] = used.row(row)
        assert len(kept[quirks].prompt_ids) == 10
        facts = used.facts()
        cut = 2 if quirks else 1
        assert (facts["responses_cut"], facts["eos_lost"], facts["prompts_cut"]) == (cut, cut, 0)
    assert [len(ids) for ids in kept[""].response_ids] == [15, 22]
    assert [len(ids) for ids in kept["joint_truncation"].response_ids] == [12, 12]


@pytest.mark.parametrize(("prompt", "total", "long"), [(8, 8, "keep_end"), (8, 0, "keep_end"), (8, 16, "refuse")])
def test_joint_truncation_needs_its_limits(zephyr: PreTrainedTokenizerFast, prompt: int, total: int, long: str) -> None:
    """Without a joint limit above the prompt's, or where long prompts are refused, the quirk means nothing."""
    with pytest.raises(InputError, match=r"joint_truncation.*max_tokens.*keep_end"):
        Encoder(zephyr, prompt, 9, max_tokens=total, long_prompts=long, quirks=frozenset({"joint_truncation"}))


def test_first_turn_is_the_prompt_behind_an_empty_system_message(zephyr: PreTrainedTokenizerFast) -> None:
    """One turn: an empty system message comes first, the response stays. More turns: they go into the response. With a
    system message the user's turn is repeated there, marker and all, as the released code does it."""
    first = encoder(zephyr, "first_turn")
    encoded = first.row(one_row("abc", "ab", "ba"))
    assert encoded.prompt_ids == [*SYSTEM, *USER, 8, 10, *ASSISTANT]
    assert encoded.response_ids == [[8, EOS], [7, 6, EOS]]
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    encoded = first.row(Row("a", messages, ["d", "e"], [1.0, 0.0], "test"))
    assert encoded.prompt_ids == [*SYSTEM, *USER, 6, *ASSISTANT]
    assert encoded.response_ids[0] == [7, EOS, 9, 5, *USER, 10, *ASSISTANT, 11, EOS]
    messages = [{"role": "system", "content": "c"}, {"role": "user", "content": "a"}]
    encoded = first.row(Row("a", messages, ["d", "e"], [1.0, 0.0], "test"))
    assert encoded.prompt_ids == [4, 9, 5, 10, EOS, 9, 5, *USER, 6, *ASSISTANT]
    assert encoded.response_ids[0] == [2, 9, 5, 6, *ASSISTANT, 11, EOS]


def test_tie_break_makes_labels_one_hot(zephyr: PreTrainedTokenizerFast) -> None:
    """0.01 for the first of the best. At the released temperature a tie becomes odds of exp(100) against 1, and the
    losses are those of a hard label; without it the tie shares."""
    assert break_tie([6.5, 7.5, 7.5]) == [6.5, 7.51, 7.5]
    row = Row("a", [{"role": "user", "content": "a"}], ["a", "b", "c"], [7.5, 7.5, 6.5], "test")
    broken, plain = (torch.tensor([encoder(zephyr, quirks).row(row).rewards], dtype=torch.float64)
                     for quirks in ("tie_break", ""))  # fmt: skip
    mask, alpha = torch.ones(1, 3, dtype=torch.bool), alpha_of(1e-4)
    labels = soft_labels(broken, mask, alpha)[0]
    assert math.log(labels[0] / labels[1]) == pytest.approx(100, abs=1e-6)
    assert soft_labels(plain, mask, alpha)[0].tolist() == [0.5, 0.5, 0]
    log_ratios = torch.tensor([[0.7, -0.2, 1.1]], dtype=torch.float64)
    r = [0.1 * value for value in log_ratios[0].tolist()]
    log_sigmoid = [-math.log1p(math.exp(-value)) for value in r]
    by_hand = -log_sigmoid[0] - sum(-math.log1p(math.exp(value)) for value in r) / 3
    assert nca_loss(log_ratios, broken, mask, alpha=alpha, beta=0.1).item() == pytest.approx(by_hand, abs=1e-12)
    by_hand = math.log(sum(map(math.exp, r))) - r[0]
    assert infonca_loss(log_ratios, broken, mask, alpha=alpha, beta=0.1).item() == pytest.approx(by_hand, abs=1e-12)


def test_temperature_alpha_is_the_papers_alpha() -> None:
    """Scores divided by temperature_alpha, then softmax, are the labels of the paper's alpha = temperature_alpha, and
    not of its reciprocal, as a comment in the released code has it."""
    scores, temperature = torch.tensor([[8.5, 7.25, 6.0, 3.5]], dtype=torch.float64), 0.8
    mask = torch.ones(1, 4, dtype=torch.bool)
    released = (scores / temperature).softmax(-1)
    torch.testing.assert_close(soft_labels(scores, mask, alpha_of(temperature)), released)
    assert (soft_labels(scores, mask, 1 / temperature) - released).abs().max() > 0.05
    with pytest.raises(InputError, match="above 0"):
        alpha_of(0.0)


def test_float16_compute_is_read_by_the_models() -> None:
    """4-bit weights compute in float16 with the quirk, in the recipe's dtype without."""
    for quirks, dtype in (("official", "float16"), ("tie_break", "bfloat16"), ("", "bfloat16")):
        assert nf4_compute(SimpleNamespace(quirks=quirks, dtype="bfloat16")) == dtype


@pytest.mark.parametrize("devices", [2, 4])
def test_a_devices_share_is_what_datasets_and_accelerate_deal(devices: int) -> None:
    """The released test split is shuffled by `datasets` and dealt by accelerate, a prompt at a time."""
    shuffled = datasets.Dataset.from_dict({"row": range(40)}).shuffle(seed=42)["row"]
    for rank in range(devices):
        batches = BatchSampler(SequentialSampler(range(40)), 1, drop_last=False)
        dealt = [i for batch in BatchSamplerShard(batches, num_processes=devices, process_index=rank) for i in batch]
        assert rank_share(40, rank, devices) == [shuffled[i] for i in dealt]


@pytest.mark.parametrize("k", [2, 4])
def test_all_quirks_together_are_the_released_computation(
    zephyr: PreTrainedTokenizerFast, model: MistralForCausalLM, packed: MistralForCausalLM, k: int
) -> None:
    """Ids and targets of each response equal those of the plain collator, rows over every limit included, and the
    packed log-probs equal those of one full, padded, masked sequence for each response."""
    rows, (prompt, total) = random_rows(40, k, 16), (28, 46)
    encoded = encoder(zephyr, "official", prompt, total).rows(rows)
    plain = [released_sequences(zephyr, row, total, prompt) for row in rows]
    lengths = [len(row.prompt_ids) for row in encoded]
    assert max(lengths) > prompt  # fits, so it is not cut
    assert prompt in lengths  # cut
    assert any(len(ids) == total - prompt for row in encoded for ids in row.response_ids)  # cut
    for row, sequences in zip(encoded, plain, strict=True):
        for ids, (whole, _, labels) in zip(row.response_ids, sequences, strict=True):
            assert row.prompt_ids + ids == whole
            assert labels == [-100] * len(row.prompt_ids) + ids
    found = logps_of_rows(packed, encoded, 4)
    for logps, sequences in zip(found, plain, strict=True):
        assert logps == pytest.approx(released_logps(model, sequences), abs=2e-4)
    # The mask matters: with EOS attended to, most log-probs are others.
    attended = [released_logps(model, [(ids, [1] * len(ids), labels) for ids, _, labels in s]) for s in plain]
    assert sum(abs(a - b) > 1e-2 for x, y in zip(found, attended, strict=True) for a, b in zip(x, y, strict=True)) > 20


def test_real_pairs_have_the_released_ids() -> None:
    """Real UltraFeedback pairs at the released limits, long ones among them: the ids of the plain collator."""
    data = Path(os.environ.get("NCA_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    path = data / "ultrafeedback_binarized_sample" / "train_clean.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent; set NCA_TEST_DATA to the folder of real data")
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line.strip()]
    records = [record for record in records if record["chosen"].strip() and record["rejected"].strip()][:120]
    rows = [
        Row(str(i), [{"role": "user", "content": record["prompt"]}], [record["chosen"], record["rejected"]],
            [1.0, 0.0], "test")
        for i, record in enumerate(records)
    ]  # fmt: skip
    tokenizer = new_tokenizer((text for row in rows for text in row.responses), 1000)
    tokenizer.chat_template = TEMPLATE
    used = encoder(tokenizer, "official", 512, 1024)
    for row, encoded in zip(rows, used.rows(rows), strict=True):
        wholes = [ids for ids, _, _ in released_sequences(tokenizer, row, 1024, 512)]
        assert [encoded.prompt_ids + ids for ids in encoded.response_ids] == wholes
    assert used.counts["prompts_cut"] > 3
    assert used.counts["responses_cut"] > 10
