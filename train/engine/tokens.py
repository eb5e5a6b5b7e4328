"""Rows to token ids: the prompt once, each response after it, counted truncation."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data_prep.files import InputError, sha256_text
from data_prep.rows import Row
from train.engine.recipe import AlignmentRecipe


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


class Encoder:
    """Encodes prompts and responses with one tokenizer, and counts what happened on the way.

    Text is rendered by the tokenizer's chat template, which alone decides about BOS and turn markers; the
    response is what follows the generation prompt, and one EOS is appended to it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_response_tokens: int):
        """Limits in tokens, the response's with its EOS. InputError without a chat template or EOS."""
        if not tokenizer.chat_template or tokenizer.eos_token_id is None:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer needs a chat template and an EOS token")
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.counts = dict.fromkeys(
            ("prompts", "responses", "responses_cut", "boundary_shifted", "eos_inside_response"), 0
        )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, recipe: AlignmentRecipe) -> "Encoder":
        """The encoder of a run."""
        return cls(tokenizer, recipe.max_prompt_tokens, recipe.max_response_tokens)

    def prompt(self, messages: list[dict[str, str]], name: str) -> tuple[str, list[int]]:
        """Text and ids of a prompt, up to where the response begins; InputError if it is too long."""
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InputError(f"row {name!r}: the chat template refuses the prompt ({error})") from None
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) > self.max_prompt_tokens:
            raise InputError(
                f"row {name!r}: the prompt has {len(ids)} tokens, the limit is {self.max_prompt_tokens}; "
                "raise max_prompt_tokens or drop the row"
            )
        return text, ids

    def row(self, row: Row) -> EncodedRow:
        """Encode one row."""
        text, prompt_ids = self.prompt(row.prompt, row.id)
        responses = [self._response(text, prompt_ids, response) for response in row.responses]
        self.counts["prompts"] += 1
        return EncodedRow(row.id, prompt_ids, responses, row.rewards)

    def demonstration(
        self, name: str, prompt: list[dict[str, str]], response: str
    ) -> tuple[list[int], list[list[int]]]:
        """Encode a prompt with its one demonstrated response: prompt ids, and a list of one response's ids."""
        text, prompt_ids = self.prompt(prompt, name)
        self.counts["prompts"] += 1
        return prompt_ids, [self._response(text, prompt_ids, response)]

    def rows(self, rows: Iterable[Row]) -> list[EncodedRow]:
        """Encode rows, in their order."""
        return [self.row(row) for row in rows]

    def _response(self, prompt_text: str, prompt_ids: list[int], response: str) -> list[int]:
        joined = self.tokenizer(prompt_text + response, add_special_tokens=False).input_ids
        if joined[: len(prompt_ids)] == prompt_ids:
            ids = joined[len(prompt_ids) :]
        else:  # a merge across the boundary: all K responses must still share the prompt's ids
            self.counts["boundary_shifted"] += 1
            ids = self.tokenizer(response, add_special_tokens=False).input_ids
        eos = self.tokenizer.eos_token_id
        self.counts["responses"] += 1
        self.counts["eos_inside_response"] += eos in ids
        ids = [*ids, eos]
        if len(ids) > self.max_response_tokens:
            self.counts["responses_cut"] += 1
            ids = ids[: self.max_response_tokens]
        return ids

    def facts(self) -> dict[str, Any]:
        """What to put into a manifest: counts, the template's hash, and how many BOS a prompt starts with."""
        _, ids = self.prompt([{"role": "user", "content": "x"}], "template check")
        return {
            **self.counts,
            "chat_template_sha256": sha256_text(self.tokenizer.chat_template),
            "bos_per_prompt": sum(i == self.tokenizer.bos_token_id for i in ids),
        }
