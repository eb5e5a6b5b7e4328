"""The row: the one contract between data and training.

A row is a prompt with K >= 2 responses and their scalar rewards. A preference pair is a row with K = 2.
K may differ from row to row. All validation of rows lives here.

On disk: JSON lines or Parquet (through `datasets`), beside a manifest.json.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.files import InputError, atomic_path, read_jsonl, write_jsonl

ROLES = ("system", "user", "assistant")
LONGEST_TEXT = 1_000_000  # characters; no model answers at such length, it is a sign of damaged data


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt and its K scored responses.

    id:        unique in its file
    prompt:    chat messages, each {"role": ..., "content": ...}; the last one is not the assistant's
    responses: K >= 2 non-empty strings
    rewards:   K finite floats, higher is better, in the order of `responses`
    source:    where the prompt comes from
    """

    id: str
    prompt: list[dict[str, str]]
    responses: list[str]
    rewards: list[float]
    source: str

    def __post_init__(self) -> None:
        """Raise InputError, naming row and reason, unless the contract above holds."""

        def refuse(reason: str) -> None:
            raise InputError(f"row {self.id!r}: {reason}")

        if not isinstance(self.id, str) or not self.id:
            refuse("id must be a non-empty string")
        check_text(self.id, "id", refuse)
        if not isinstance(self.source, str):
            refuse("source must be a string")
        check_text(self.source, "source", refuse)
        check_messages(self.prompt, refuse)
        if not isinstance(self.responses, list) or not all(isinstance(text, str) for text in self.responses):
            refuse("responses must be a list of strings")
        if len(self.responses) < 2:
            refuse(f"K = {len(self.responses)} responses, at least 2 are needed; drop the row")
        for index, text in enumerate(self.responses):
            if not text.strip():
                refuse(f"response {index} is empty; drop the response")
            check_text(text, f"response {index}", refuse)
        if not isinstance(self.rewards, list) or len(self.rewards) != len(self.responses):
            refuse("rewards must be a list with one number for each response")
        for index, reward in enumerate(self.rewards):
            if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
                refuse(f"reward {index} is {reward!r}, a finite number is needed; drop the response")

    @property
    def best(self) -> int:
        """Index of the response with the highest reward (the first one among equals)."""
        return max(range(len(self.rewards)), key=lambda i: self.rewards[i])

    def select(self, indices: Iterable[int], suffix: str = "") -> "Row":
        """The row with only these responses, in this order; `suffix` is appended to the id."""
        indices = list(indices)
        return dataclasses.replace(
            self,
            id=self.id + suffix,
            responses=[self.responses[i] for i in indices],
            rewards=[self.rewards[i] for i in indices],
        )


def check_messages(prompt: Any, refuse: Any) -> None:
    """Call `refuse(reason)` unless `prompt` is a list of chat messages that awaits an assistant's turn."""
    if not isinstance(prompt, list) or not prompt:
        refuse("prompt must be a non-empty list of chat messages")
    for message in prompt:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            refuse("each prompt message must have exactly the keys role and content")
        if message["role"] not in ROLES:
            refuse(f"unknown role {message['role']!r}; known are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            refuse("message content must be a string")
        check_text(message["content"], "the prompt", refuse)
    if prompt[-1]["role"] == "assistant":
        refuse("the prompt ends with an assistant message; there is nothing to answer")


def check_text(text: str, where: str, refuse: Any) -> None:
    """Call `refuse(reason)` for text that is too long or cannot be written as UTF-8 (lone surrogates)."""
    if len(text) >= LONGEST_TEXT:
        refuse(f"{where} has {len(text):,} characters; shorten or remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        refuse(f"{where} has a character that is not valid Unicode (position {error.start}); repair the text")


FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def _from_record(record: dict[str, Any]) -> Row:
    missing, unknown = set(FIELDS) - set(record), set(record) - set(FIELDS)
    if missing or unknown:
        raise InputError(
            f"missing fields {sorted(missing)}, unknown fields {sorted(unknown)}; a row has {list(FIELDS)}"
        )
    rewards = record["rewards"]
    if isinstance(rewards, list):  # JSON writes 3.0 as 3
        rewards = [_as_float(reward) for reward in rewards]
    return Row(**{**record, "rewards": rewards})


def _as_float(value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_prompts(path: Path | str) -> list[dict[str, Any]]:
    """Lines of {id, prompt: chat messages, ...}, before there are responses; InputError with file, line and reason."""
    prompts, seen = [], set()
    for number, record in read_jsonl(path):

        def refuse(reason: str, number: int = number) -> None:
            raise InputError(f"{path}:{number}: {reason}")

        if not isinstance(record.get("id"), str) or record["id"] in seen:
            refuse("the id is missing or stands twice")
        check_messages(record.get("prompt"), refuse)
        seen.add(record["id"])
        prompts.append(record)
    if not prompts:
        raise InputError(f"{path}: no prompts")
    return prompts


def read_rows(path: Path | str) -> list[Row]:
    """Read and validate a .jsonl or .parquet file of rows; raise InputError with file, row and reason."""
    path = Path(path)
    rows, seen = [], {}
    for number, record in _records(path):
        try:
            row = _from_record(record)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if row.id in seen:
            raise InputError(f"{path}:{number}: row {row.id!r} stands already in line {seen[row.id]}")
        seen[row.id] = number
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".parquet":
        return read_parquet(path)
    raise InputError(f"{path}: unknown kind of file; rows are .jsonl or .parquet")


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, record) for each row; raise InputError with file, row and reason."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Small batches: a batch as Python objects takes several times its size on disk.
            for batch in file.iter_batches(batch_size=512):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not readable as Parquet after row {number} ({reason}); renew it") from None


def write_rows(path: Path | str, rows: Iterable[Row]) -> int:
    """Write rows to .jsonl or .parquet, atomically; return how many. The same rows give the same bytes."""
    path = Path(path)
    if path.suffix == ".jsonl":
        return write_jsonl(path, (vars(row) for row in rows))
    if path.suffix != ".parquet":
        raise InputError(f"{path}: unknown kind of file; rows are written as .jsonl or .parquet")
    from datasets import Dataset

    records = [vars(row) for row in rows]
    with atomic_path(path) as temporary:
        Dataset.from_list(records).to_parquet(temporary)
    return len(records)
