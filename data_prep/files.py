"""Files and errors, for every stage: atomic writes, JSON lines, digests, one-line error messages."""

import contextlib
import errno
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`. Exit codes: 0 done, 2 bad input or full disk (one line on stderr),
    130 / 143 stopped by SIGINT / SIGTERM (what is written stays; the same command resumes)."""

    def terminate(signum: int, frame: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues from what is on disk", file=sys.stderr)
        sys.exit(130)
    except FileNotFoundError as error:
        print(f"error: {error.filename}: no such file or directory; name one that is there", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader (`| head`) went away: not an error, but Python would complain while flushing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        print(f"error: cannot write {error.filename or ''}: {error.strerror}; free or change it, and run again",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it only when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` atomically, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(value: Any, **options: Any) -> str:
    """JSON with non-ASCII kept; NaN and infinities are refused (they are not JSON)."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, to_json(value, indent=1) + "\n")


def write_jsonl(path: Path | str, records: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically; return how many."""
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for count, record in enumerate(records, start=1):  # noqa: B007
            file.write(to_json(record) + "\n")
    return count


def read_jsonl(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each non-empty line; raise InputError with file, line and reason."""
    path = Path(path)
    try:
        with open(path, "rb") as file:  # bytes, so that a wrong encoding is known by its line
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number}: not JSON ({error}); mend or remove the line") from None
                if not isinstance(record, dict):
                    raise InputError(f"{path}:{number}: expected an object, found {type(record).__name__}")
                yield number, record
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory; name a file") from None


def read_json(path: Path | str) -> Any:
    """Read one JSON file; raise InputError with file and reason."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a string."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(paths: Iterable[Path], root: Path) -> str:
    """One digest for several files: of their names relative to `root` and their contents, in name order."""
    listed = sorted((path.relative_to(root).as_posix(), sha256_file(path)) for path in paths)
    return sha256_text(to_json(listed))
