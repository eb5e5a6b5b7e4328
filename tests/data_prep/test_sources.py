"""Reading records: from the Hub, and from damaged files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from layouts import chat, generated, original

from data_prep.files import InputError
from data_prep.rows import LONGEST_TEXT
from data_prep.sources import RELEASED, ULTRAFEEDBACK, ULTRAINTERACT, read_records

GOOD = original("p", [("a", 1), ("b", 2)])
ROW = {"id": "r", "prompt": chat("p", "")[:1], "responses": ["a", "b"], "rewards": [1, 2], "source": "s"}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def truncated_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(generated(50)), path)
    path.write_bytes(path.read_bytes()[:-200])


def damaged_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(generated(3000)), path, row_group_size=600)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = b"\0" * 20_000
    path.write_bytes(data)


ULTRAFEEDBACK_FAULTS: dict[str, tuple[str, bytes | Callable[[Path], None], str]] = {
    "bad JSON line": ("x.jsonl", lines(GOOD) + b'{"source": "s", \n', "x.jsonl:2: not JSON"),
    "not an object": ("x.jsonl", lines(GOOD, [1]), "x.jsonl:2: expected an object"),
    "wrong encoding": ("x.jsonl", lines(GOOD) + b'{"source": "\xe9"}\n', "x.jsonl:2: not JSON"),
    "empty file": ("x.jsonl", b"", "x.jsonl: no records"),
    "wrong column": ("x.jsonl", lines({"prompt": "p"}), "x.jsonl:1: no column 'completions'; found prompt"),
    "wrong type": ("x.jsonl", lines({**GOOD, "completions": "a"}), "holds str, expected list"),
    "no response": ("x.jsonl", lines({**GOOD, "completions": [{}]}), "x.jsonl:1: each of the completions"),
    "lone surrogate": ("x.jsonl", lines(original("p", [("\ud83d", 1), ("b", 2)])), "not valid Unicode"),
    "surrogate in prompt": ("x.jsonl", lines(original("\udc00", [("a", 1), ("b", 2)])), "not valid Unicode"),
    "1 MB response": ("x.jsonl", lines(original("p", [("a" * LONGEST_TEXT, 1), ("b", 2)])), "1,000,000 characters"),
    "only text scores": ("x.jsonl", lines(original("p", [("a", "N/A"), ("b", "good")])), '"unparsable_score": 2'),
    "truncated Parquet": ("x.parquet", truncated_parquet, "x.parquet: not readable as Parquet"),
    "damaged Parquet": ("x.parquet", damaged_parquet, "x.parquet: not readable as Parquet"),
    "empty Parquet": ("x.parquet", b"", "x.parquet: not readable as Parquet"),
}  # fmt: skip
ROW_FAULTS: dict[str, tuple[bytes, str]] = {
    "NaN": (lines({**ROW, "rewards": [1, float("nan")]}), "x.jsonl:1: row 'r': reward 1 is nan"),
    "infinite": (lines({**ROW, "rewards": [1, 10**400]}), "x.jsonl:1: row 'r': reward 1 is inf"),
    "score as text": (lines({**ROW, "rewards": [1, "N/A"]}), "x.jsonl:1: row 'r': reward 1 is 'N/A'"),
    "one response": (lines({**ROW, "responses": ["a"], "rewards": [1]}), "K = 1"),
    "twice": (lines(ROW, ROW), "x.jsonl:2: row 'r' stands already in line 1"),
    "surrogate in id": (lines({**ROW, "id": "\ud800"}), "not valid Unicode"),
    "1 MB response": (lines({**ROW, "responses": ["a", "b" * LONGEST_TEXT]}), "1,000,000 characters"),
    "empty file": (b"", "x.jsonl: no rows"),
}


def assert_refused(done: Any, fragment: str, out: Path) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert fragment in done.stderr
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("fault", ULTRAFEEDBACK_FAULTS)
def test_damaged_records(fault: str, command, tmp_path) -> None:
    """Damaged records give one line with file, row and reason, exit code 2, and leave nothing behind."""
    name, content, fragment = ULTRAFEEDBACK_FAULTS[fault]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    done = command("data_prep.ultrafeedback", "--input", path, "--out", tmp_path / "out")
    assert_refused(done, fragment, tmp_path / "out")


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_damaged_rows(fault: str, command, tmp_path) -> None:
    """The same for files of rows."""
    content, fragment = ROW_FAULTS[fault]
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    done = command("data_prep.pairs", path, "--out", tmp_path / "out", "--strategy", "all-pairs")
    assert_refused(done, fragment, tmp_path / "out")


def test_a_long_response_below_the_limit_passes(command, write, tmp_path) -> None:
    """A response one character shorter than the limit is kept whole."""
    long = "a" * (LONGEST_TEXT - 1)
    path = write("x.jsonl", [original("p", [(long, 1), ("b", 2)])])
    done = command("data_prep.ultrafeedback", "--input", path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert long in (tmp_path / "out" / "train.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "repo"),
    [
        (["data_prep.ultrafeedback"], "openbmb/UltraFeedback"),
        (["data_prep.ultrafeedback", "--released", "reward"], "ChenDRAG/ultrafeedback_reward"),
        (["data_prep.ultrainteract"], "openbmb/UltraInteract_pair"),
    ],
)
def test_offline(arguments: list[str], repo: str, command, tmp_path) -> None:
    """Without network the error is one line that names the data set and the way out."""
    done = command(*arguments, "--out", tmp_path / "out")
    assert_refused(done, f"cannot load {repo}", tmp_path / "out")
    assert "--input" in done.stderr


def test_hub_calls_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set is asked for at a full commit hash and without running its code."""
    calls = []

    def load(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append((arguments, options))
        return [GOOD]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in (ULTRAFEEDBACK, *RELEASED.values(), ULTRAINTERACT):
        for split in source.splits:
            assert [record for _, record in read_records(source, [], split)] == [GOOD]
    assert len(calls) == 6
    for arguments, options in calls:
        assert len(arguments) == 1
        assert set(options) == {"revision", "split"}
        assert len(options["revision"]) == 40
        assert int(options["revision"], 16)


def test_several_files_are_one_set(write) -> None:
    """Records come in the order of the files, each with its own file and line."""
    paths = [write("a.jsonl", [{"n": 1}, {"n": 2}]), write("b.jsonl", [{"n": 3}])]
    found = [(where.rsplit("/", 1)[1], record["n"]) for where, record in read_records(ULTRAFEEDBACK, paths)]
    assert found == [("a.jsonl:1", 1), ("a.jsonl:2", 2), ("b.jsonl:1", 3)]


def test_a_missing_file(tmp_path) -> None:
    """A file that is not there is named."""
    for name in ("x.jsonl", "x.parquet"):
        with pytest.raises(InputError, match="no such file"):
            list(read_records(ULTRAFEEDBACK, [tmp_path / name]))
