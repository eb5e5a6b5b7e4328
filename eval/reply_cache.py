"""The file behind `eval.judge`: one JSON line for each paid reply, on disk before it counts.

It is only appended to. A line that a stop cut short is dropped; of lines with equal keys the last one counts.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.files import InputError


class ReplyCache:
    """Lines {key, ...} of one file, open for one asker at a time."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file = -1

    def read(self) -> dict[str, dict[str, Any]]:
        """The lines by key; InputError with file and line for one that is damaged. Changes nothing."""
        return self._read()[0]

    @contextlib.contextmanager
    def open(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Yield the lines by key and allow `append`; InputError while another process does the same."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{self.path}: another run is asking through this cache; wait for it") from None
            lines, whole = self._read()
            os.ftruncate(self._file, whole)
            yield lines
        finally:
            os.close(self._file)

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and wait until it is on disk; a failed write leaves no half line behind."""
        data = (json.dumps(line) + "\n").encode()  # ASCII: a lone surrogate in a reply cannot break the file
        with self._lock:
            size = os.fstat(self._file).st_size
            try:
                if os.write(self._file, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise

    def _read(self) -> tuple[dict[str, dict[str, Any]], int]:
        """The lines by key, and the number of bytes in whole lines."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        lines = {}
        for number, text in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                line = json.loads(text)
                lines[line["key"]] = line
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.path}:{number}: not a reply; mend or remove the line") from None
        return lines, whole
