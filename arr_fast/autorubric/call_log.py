"""What was asked and answered, on disk by content hash: a run that was killed repeats no call.

One JSON line per finished call, appended and flushed; a line torn by a kill is cut off on opening.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

from arr_fast.errors import ArrFastError

SCHEMA = "arr_fast.call/1"
# Told of a stage: items done, of how many.
Progress = Callable[[int, int], None]


class CallLog:
    """A map from content hash to a JSON value that outlives the process.

    Args:
        path: The file; created with its folder where missing. None keeps values in memory alone.

    Raises:
        ArrFastError: The file holds something else, naming the line.
    """

    def __init__(self, path: Path | None) -> None:
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._handle: IO[str] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read(path)
            self._handle = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any:
        """Returns the value of a key, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a value; on return it is in the file."""
        self.put_all({key: value})

    def put_all(self, values: Mapping[str, Any]) -> None:
        """Keeps several values, in one write: what one call gave is there, or none of it is."""
        lines = [json.dumps({"schema": SCHEMA, "key": k, "value": v}) for k, v in values.items()]
        with self._lock:
            self._values |= values
            if self._handle is not None:
                self._handle.write("".join(line + "\n" for line in lines))
                self._handle.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, raw in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(raw)
                if line["schema"] != SCHEMA:
                    raise KeyError(line["schema"])
                self._values[str(line["key"])] = line["value"]
            except (ValueError, TypeError, KeyError):
                message = f"{path} line {number}: not a log of calls; name another folder"
                raise ArrFastError(message) from None
        if len(whole) < len(data):
            with path.open("r+b") as handle:
                handle.truncate(len(whole))
