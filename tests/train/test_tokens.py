"""Rows to token ids: EOS, BOS, the boundary between prompt and response, and what is counted."""

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from data_prep.files import InputError
from data_prep.rows import Row
from train.engine.tokens import Encoder

ODD = [
    "naïve café, 日本語, עברית, العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é vs e\u0301, ﬁ, ½, 𝔘",
    " leading, trailing, and  double spaces ",
    "tab\t, CRLF\r\n, blank\n\n\nlines, NUL\x00, BOM\ufeff, U+2028\u2028, private \ue000",
    "Ġ Ċ ▁ <0x0A> ## @@ what tokenizers use themselves",
]


def one_row(responses: list[str], content: str = "two and three") -> Row:
    rewards = [float(i) for i in range(len(responses))]
    return Row("a", [{"role": "user", "content": content}], responses, rewards, "test")


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer, max_prompt_tokens=64, max_response_tokens=48)


@pytest.fixture
def merging() -> PreTrainedTokenizerFast:
    """A tokenizer with the merge a + b -> ab, and a template that puts nothing between prompt and response."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])), bos_token="<s>", eos_token="</s>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )  # fmt: skip


def test_prompt_ids_are_the_template_by_hand(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    """A prompt is BOS, then for each turn its marker, its content and EOS, then the marker of the answer: one BOS."""
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"the sum {i}"} for i, role in enumerate(roles)]
    expected = [tokenizer.bos_token_id]
    for message in messages:
        expected.append(tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"))
        expected += tokenizer(message["content"], add_special_tokens=False).input_ids
        expected.append(tokenizer.eos_token_id)
    expected.append(tokenizer.convert_tokens_to_ids("<|assistant|>"))
    encoded = encoder.row(Row("a", messages, ["one", "two"], [0.0, 1.0], "test"))
    assert encoded.prompt_ids == expected
    assert encoder.facts()["bos_per_prompt"] == 1


def test_bos_is_the_templates_business(merging: PreTrainedTokenizerFast) -> None:
    """A template without BOS gives a prompt without BOS; with two, the count says two."""
    merging.chat_template = "{{ messages[0]['content'] }}"
    assert Encoder(merging, 9, 9).row(one_row(["b", "bb"], "a")).prompt_ids == [2]
    assert Encoder(merging, 9, 9).facts()["bos_per_prompt"] == 0
    merging.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"
    assert Encoder(merging, 9, 9).facts()["bos_per_prompt"] == 2


def test_a_response_ends_with_its_only_eos(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder, make_rows: Callable[..., list[Row]]
) -> None:
    """Every response is its own text followed by exactly one EOS."""
    rows = make_rows(20, seed=0)
    for row, encoded in zip(rows, encoder.rows(rows), strict=True):
        assert (encoded.id, encoded.rewards) == (row.id, row.rewards)
        for text, ids in zip(row.responses, encoded.response_ids, strict=True):
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.eos_token_id) == 1
            assert tokenizer.decode(ids[:-1]) == text
    responses = sum(len(row.responses) for row in rows)
    counts = {"prompts": 20, "responses": responses, "responses_cut": 0, "boundary_shifted": 0}
    assert encoder.facts().items() >= {**counts, "eos_inside_response": 0}.items()


def test_prompt_and_response_together_are_the_whole_text(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    """Prompt ids + response ids are the ids of the rendered conversation, all K behind the same prompt ids."""
    row = one_row(["five", " so five", "<five>", "\nfive"])
    encoded = encoder.row(row)
    for text, ids in zip(row.responses, encoded.response_ids, strict=True):
        whole = tokenizer.apply_chat_template(
            [*row.prompt, {"role": "assistant", "content": text}], tokenize=True, return_dict=False
        )
        assert encoded.prompt_ids + ids == list(whole)


def test_cut_responses_are_counted_and_end_without_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """The limit counts EOS: limit - 1 tokens of text fit, one more is cut to the limit and has no EOS target."""
    words = "".join(chr(ord("p") + i) for i in range(10))  # no merges: one token a letter
    assert len(tokenizer(words, add_special_tokens=False).input_ids) == 10
    encoder = Encoder(tokenizer, 64, max_response_tokens=7)
    fits, cut = encoder.row(one_row([words[:6], words[:7]])).response_ids
    assert len(fits) == 7
    assert fits[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(cut) == words[:7]
    assert tokenizer.eos_token_id not in cut
    assert encoder.facts()["responses_cut"] == 1


def test_a_merge_across_the_boundary_is_counted(merging: PreTrainedTokenizerFast) -> None:
    """Where prompt + response would merge, the K responses still share the prompt's ids, and the shift is counted."""
    encoder = Encoder(merging, 9, 9)
    encoded = encoder.row(one_row(["b", "ab", "bb"], "a"))  # joined: "ab" = [4], "aab" = [2, 4], "abb" = [4, 3]
    assert encoded.prompt_ids == [2]
    assert encoded.response_ids == [[3, 1], [4, 1], [3, 3, 1]]
    assert encoder.facts()["boundary_shifted"] == 2


def test_a_prompt_over_the_limit_is_refused(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    """A prompt of exactly the limit passes; of one token more is refused with row, length and limit in one line."""
    row = one_row(["one", "two"])
    length = len(encoder.row(row).prompt_ids)
    assert len(Encoder(tokenizer, length, 48).row(row).prompt_ids) == length
    with pytest.raises(InputError, match=rf"'a'.* {length} tokens.* {length - 1}\b") as refused:
        Encoder(tokenizer, length - 1, 48).row(row)
    assert "\n" not in str(refused.value)


def test_an_eos_written_in_a_response_is_counted(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    """`</s>` in a response's text becomes an EOS token; such responses are counted. Other markers are not EOS."""
    encoded = encoder.row(one_row(["one</s>two", "one", "one<|user|>two"]))
    assert [ids.count(tokenizer.eos_token_id) for ids in encoded.response_ids] == [2, 1, 1]
    assert encoder.facts()["eos_inside_response"] == 1


def test_any_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    """The new tokenizer encodes any string without an unknown token and decodes it to itself."""
    rng = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]  # all of Unicode but the surrogates
    drawn = ["".join(map(chr, rng.choices(points, k=rng.randint(1, 30)))) for _ in range(200)]
    for text in [*ODD, *drawn]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_a_demonstration_is_encoded_as_a_response(encoder: Encoder) -> None:
    """SFT and alignment see the same ids for the same prompt and response."""
    row = one_row(["one more", "five"])
    encoded = encoder.row(row)
    assert encoder.demonstration("a", row.prompt, "five") == (encoded.prompt_ids, encoded.response_ids[1:])


@pytest.mark.parametrize("lacking", ["chat_template", "eos_token"])
def test_a_tokenizer_without_template_or_eos_is_refused(merging: PreTrainedTokenizerFast, lacking: str) -> None:
    """Without a chat template or an EOS there is no saying where a response begins and ends."""
    setattr(merging, lacking, None)
    with pytest.raises(InputError, match="chat template and an EOS"):
        Encoder(merging, 9, 9)


def test_stream_length_is_the_packed_length(encoder: Encoder) -> None:
    """The stream holds the prompt once and each response without its last token, which is never an input."""
    encoded = encoder.row(one_row(["one", "two three", "so we add one more"]))
    lengths = [len(ids) for ids in encoded.response_ids]
    assert encoded.stream_length == len(encoded.prompt_ids) + sum(lengths) - 3


def letters(count: int, first: str = "p") -> str:
    """Text of `count` tokens: neighbouring letters that nothing merges."""
    return "".join(chr(ord(first) + i) for i in range(count))


def test_a_joint_limit_cuts_each_response_for_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    """A response keeps max_tokens less the prompt, or max_response_tokens if that is less; another response of the
    row, short enough, is not touched."""
    row = one_row([letters(3), letters(9)], "one")
    length = len(Encoder(tokenizer, 64, 48).row(row).prompt_ids)
    for response_limit, total, kept in ((48, length + 6, 6), (5, length + 6, 5), (48, length + 10, 10), (48, 0, 10)):
        encoder = Encoder(tokenizer, 64, response_limit, max_tokens=total)
        short, long = encoder.row(row).response_ids
        assert (len(short), len(long)) == (4, kept)
        assert encoder.facts().items() >= {"responses_cut": int(kept < 10), "eos_lost": int(kept < 10)}.items()


def test_a_prompt_that_leaves_no_response_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """One token of response may be left; with none the row is refused by name, in one line."""
    row = one_row(["one", "two"])
    length = len(Encoder(tokenizer, 64, 48).row(row).prompt_ids)
    encoded = Encoder(tokenizer, 64, 48, max_tokens=length + 1).rows([row])
    assert [len(ids) for ids in encoded[0].response_ids] == [1, 1]
    with pytest.raises(InputError, match=rf"'a'.* {length} tokens.*max_tokens = {length} leaves none") as refused:
        Encoder(tokenizer, 64, 48, max_tokens=length).rows([row])
    assert "\n" not in str(refused.value)


def test_keep_end_keeps_the_end_of_a_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """The last tokens of a long prompt stay, its generation prompt with them; the cut and the lost BOS are counted,
    and responses are those behind the whole prompt. A prompt of exactly the limit is not cut."""
    row = one_row(["five", "so"], letters(20, "a"))
    whole = Encoder(tokenizer, 64, 48).row(row)
    for limit in (len(whole.prompt_ids), 9):
        encoder = Encoder(tokenizer, limit, 48, long_prompts="keep_end")
        encoded = encoder.row(row)
        assert encoded.prompt_ids == whole.prompt_ids[-limit:]
        assert encoded.response_ids == whole.response_ids
        assert encoder.prompt(row.prompt, "a")[1] == encoded.prompt_ids
        cut = int(limit == 9)
        assert (encoder.counts["prompts_cut"], encoder.counts["bos_lost"]) == (2 * cut, 2 * cut)
    assert tokenizer.decode(encoded.prompt_ids).endswith("</s><|assistant|>")


def test_rows_are_encoded_the_same_together_and_alone(
    tokenizer: PreTrainedTokenizerFast, make_rows: Callable[..., list[Row]]
) -> None:
    """Chunks change neither ids nor order nor counts: rows of several chunks are those of each row by itself."""
    rows = [*make_rows(600, seed=1), one_row(["one</s>two", " so", "\nfive", *ODD])]
    together, alone = (Encoder(tokenizer, 64, 20, max_tokens=40) for _ in range(2))
    assert together.rows(rows) == [alone.row(row) for row in rows]
    assert together.facts() == alone.facts()
    for row, encoded in zip(rows[-3:], together.rows(rows)[-3:], strict=True):
        text = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
        for response, ids in zip(row.responses, encoded.response_ids, strict=True):
            joined = tokenizer.encode(text + response, add_special_tokens=False)
            assert [*joined[len(encoded.prompt_ids) :], tokenizer.eos_token_id][:20] == ids


def test_many_merges_across_the_boundary_are_refused(merging: PreTrainedTokenizerFast) -> None:
    """One response in twenty may merge with its prompt; more say that template and tokenizer do not fit."""
    few = one_row(["b", *["a"] * 19], "a")
    encoder = Encoder(merging, 9, 9)
    encoder.rows([few])
    assert encoder.facts()["boundary_shifted_share"] == 0.05
    with pytest.raises(InputError, match=r"2 of 20 responses merge.*5%.*generation prompt"):
        encoder.rows([one_row(["b", "ba", *["a"] * 18], "a")])
