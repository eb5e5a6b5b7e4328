"""Rows to token ids: the prompt once, each response after it, counted truncation."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data_prep.files import InputError, sha256_text
from data_prep.rows import Row
from train.engine.official import break_tie, cut_jointly, end_of_turn, first_turn, parse_quirks
from train.engine.recipe import AlignmentRecipe

CHUNK = 512  # rows that are tokenized together
BOUNDARY_LIMIT = 0.05  # share of responses that may have merged with the end of their prompt


@dataclasses.dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row. The K responses share `prompt_ids`; each ends with EOS unless it was cut.

    unattended: a token id that nothing attends to (a quirk of the released code, see train.engine.official).
    """

    id: str
    prompt_ids: list[int]
    response_ids: list[list[int]]
    rewards: list[float]
    unattended: int | None = None

    @property
    def stream_length(self) -> int:
        """Tokens of the packed stream: the prompt once, and each response without its last token."""
        return len(self.prompt_ids) + sum(len(ids) - 1 for ids in self.response_ids)


class Conversation(NamedTuple):
    """What is encoded together: chat messages, and the answers to them."""

    name: str
    prompt: list[dict[str, str]]
    responses: list[str]


class Encoder:
    """Encodes prompts and responses with one tokenizer, and counts what happened on the way.

    Text is rendered by the tokenizer's chat template, which alone decides about BOS and turn markers; the
    response is what follows the generation prompt, and one EOS is appended to it. A response is cut for itself:
    to max_response_tokens, and to what its prompt leaves of max_tokens. `quirks` change all this to what the
    released code does (train.engine.official).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_response_tokens: int, *,
        max_tokens: int = 0, long_prompts: str = "refuse", quirks: frozenset[str] = frozenset(),
    ):  # fmt: skip
        """Limits in tokens, the response's with its EOS. InputError without a chat template or EOS.

        max_tokens: of the prompt and one response together; 0: no such limit. long_prompts: refuse a prompt over its
        limit, or keep_end (its last max_prompt_tokens tokens). quirks: from `train.engine.official.parse_quirks`.
        """
        if not tokenizer.chat_template or tokenizer.eos_token_id is None:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer needs a chat template and an EOS token")
        if "joint_truncation" in quirks and not (max_tokens > max_prompt_tokens and long_prompts == "keep_end"):
            raise InputError(
                "the quirk joint_truncation cuts to max_prompt_tokens and the rest of max_tokens; set max_tokens above "
                "max_prompt_tokens, and long_prompts to keep_end"
            )
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.max_tokens, self.long_prompts, self.quirks = max_tokens, long_prompts, quirks
        self.end_of_turn = end_of_turn(self._without_bos) if {"doubled_eos", "first_turn"} & quirks else ""
        self.unattended = tokenizer.eos_token_id if "doubled_eos" in quirks else None
        self.counts = dict.fromkeys(
            ("prompts", "prompts_cut", "bos_lost", "responses", "responses_cut", "eos_lost", "boundary_shifted",
             "eos_inside_response"), 0
        )  # fmt: skip

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, recipe: AlignmentRecipe) -> "Encoder":
        """The encoder of a run."""
        return cls(
            tokenizer, recipe.max_prompt_tokens, recipe.max_response_tokens, max_tokens=recipe.max_tokens,
            long_prompts=recipe.long_prompts, quirks=parse_quirks(recipe.quirks),
        )  # fmt: skip

    def prompt(self, messages: list[dict[str, str]], name: str) -> tuple[str, list[int]]:
        """Text and ids of a prompt, up to where the response begins; InputError if it is too long. With keep_end the
        ids may be fewer than the text's."""
        text, _ = self._texts(Conversation(name, messages, []))
        return text, self._cut_prompt(name, self._ids([text])[0])

    def row(self, row: Row) -> EncodedRow:
        """Encode one row."""
        return self._rows([row])[0]

    def rows(self, rows: Iterable[Row]) -> list[EncodedRow]:
        """Encode rows, in their order; InputError where many responses merge with the end of their prompts, which
        says that tokenizer and chat template do not belong together."""
        rows, found, before = list(rows), [], dict(self.counts)
        with tqdm(total=len(rows), desc="tokens", unit="row", disable=len(rows) <= CHUNK) as bar:
            for start in range(0, len(rows), CHUNK):
                found += self._rows(rows[start : start + CHUNK])
                bar.update(len(found) - start)
        shifted, responses = (self.counts[name] - before[name] for name in ("boundary_shifted", "responses"))
        if shifted > BOUNDARY_LIMIT * responses:
            raise InputError(
                f"{self.tokenizer.name_or_path}: {shifted} of {responses} responses merge with the last token of their "
                f"prompt, more than {BOUNDARY_LIMIT:.0%}; end the chat template's generation prompt with a token that "
                "nothing merges with"
            )
        return found

    def demonstration(
        self, name: str, prompt: list[dict[str, str]], response: str
    ) -> tuple[list[int], list[list[int]]]:
        """Encode a prompt with its one demonstrated response: prompt ids, and a list of one response's ids."""
        return self._encode([Conversation(name, prompt, [response])])[0]

    def facts(self) -> dict[str, Any]:
        """What to put into a manifest: counts, the template's hash, and how many BOS a prompt starts with."""
        text, _ = self._texts(Conversation("template check", [{"role": "user", "content": "x"}], []))
        return {
            **self.counts,
            "boundary_shifted_share": round(self.counts["boundary_shifted"] / max(self.counts["responses"], 1), 6),
            "chat_template_sha256": sha256_text(self.tokenizer.chat_template),
            "bos_per_prompt": self._ids([text])[0].count(self.tokenizer.bos_token_id),
            "quirks": sorted(self.quirks),
        }

    def _rows(self, rows: list[Row]) -> list[EncodedRow]:
        encoded = self._encode([Conversation(row.id, row.prompt, row.responses) for row in rows])
        rewards = [break_tie(row.rewards) if "tie_break" in self.quirks else row.rewards for row in rows]
        return [
            EncodedRow(row.id, *ids, values, self.unattended)
            for row, ids, values in zip(rows, encoded, rewards, strict=True)
        ]

    def _encode(self, conversations: list[Conversation]) -> list[tuple[list[int], list[list[int]]]]:
        """Prompt ids and the responses' ids, cut, of each conversation. All texts go to the tokenizer together."""
        texts = [self._texts(conversation) for conversation in conversations]
        prompts = self._ids([prompt for prompt, _ in texts])
        owners = [i for i, (_, responses) in enumerate(texts) for _ in responses]
        responses = [response for _, responses in texts for response in responses]
        if "separate_tokenization" in self.quirks:
            found = self._ids(responses)
        else:
            found = self._ids([texts[i][0] + response for i, response in zip(owners, responses, strict=True)])
            for n, i in enumerate(owners):
                if found[n][: len(prompts[i])] == prompts[i]:
                    found[n] = found[n][len(prompts[i]) :]
                else:  # a merge across the boundary: all K responses must still share the prompt's ids
                    self.counts["boundary_shifted"] += 1
                    found[n] = self._ids([responses[n]])[0]
        ids = iter(found)
        return [
            self._cut(conversation.name, prompt, [next(ids) for _ in conversation.responses])
            for conversation, prompt in zip(conversations, prompts, strict=True)
        ]

    def _texts(self, conversation: Conversation) -> tuple[str, list[str]]:
        """Text of the prompt up to where the response begins, and of the responses; InputError if the template
        refuses."""
        name, prompt, responses = conversation
        try:
            if "first_turn" in self.quirks:
                turns = [first_turn(prompt, response, self._without_bos) for response in responses or [""]]
                prompt, responses = turns[0][0], [text for _, text in turns]
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except (TemplateError, InputError) as error:
            raise InputError(f"row {name!r}: the chat template refuses the prompt ({error})") from None
        if "doubled_eos" in self.quirks:
            responses = [response + self.end_of_turn for response in responses]
        return text, responses

    def _without_bos(self, messages: list[dict[str, str]], generation: bool) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        return text.removeprefix(self.tokenizer.bos_token or "")

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids

    def _cut(
        self, name: str, prompt_ids: list[int], response_ids: list[list[int]]
    ) -> tuple[list[int], list[list[int]]]:
        """Append EOS, keep to the limits, and count."""
        eos, of_template = self.tokenizer.eos_token_id, self.unattended is not None
        whole = [[*ids, eos] for ids in response_ids]
        if "joint_truncation" in self.quirks:
            prompt, kept = cut_jointly(prompt_ids, whole, self.max_tokens, self.max_prompt_tokens)
            self._count_cut(prompt_ids, prompt)
        else:
            prompt = self._cut_prompt(name, prompt_ids)
            room = self.max_response_tokens
            if self.max_tokens:
                room = min(room, self.max_tokens - len(prompt))
            if room < 1:
                raise InputError(
                    f"row {name!r}: the prompt has {len(prompt)} tokens, max_tokens = {self.max_tokens} leaves none "
                    "for a response; lower max_prompt_tokens or drop the row"
                )
            kept = [ids[:room] for ids in whole]
        cut = [ids for ids, full in zip(kept, whole, strict=True) if len(ids) < len(full)]
        self.counts["prompts"] += 1
        self.counts["responses"] += len(kept)
        self.counts["responses_cut"] += len(cut)
        self.counts["eos_lost"] += sum(eos not in ids for ids in cut)
        self.counts["eos_inside_response"] += sum(ids.count(eos) > of_template for ids in response_ids)
        return prompt, kept

    def _cut_prompt(self, name: str, ids: list[int]) -> list[int]:
        if len(ids) > self.max_prompt_tokens and self.long_prompts == "refuse":
            raise InputError(
                f"row {name!r}: the prompt has {len(ids)} tokens, the limit is {self.max_prompt_tokens}; "
                "raise max_prompt_tokens, set long_prompts to keep_end, or drop the row"
            )
        kept = ids[-self.max_prompt_tokens :]
        self._count_cut(ids, kept)
        return kept

    def _count_cut(self, ids: list[int], kept: list[int]) -> None:
        lost = ids[: len(ids) - len(kept)]
        self.counts["prompts_cut"] += bool(lost)
        self.counts["bos_lost"] += self.tokenizer.bos_token_id in lost
