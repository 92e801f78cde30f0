"""Outcomes of long runs, kept line by line and found again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar


class Record(Protocol):
    """A dataclass with the key by which it is found again."""

    key: str


@dataclass(frozen=True)
class Rows:
    """What was found of one problem.

    Attributes:
        key: All that decides it.
        rows: Of a table.
    """

    key: str
    rows: tuple[dict[str, Any], ...]


T = TypeVar("T", bound=Record)


class Records(Generic[T]):
    """Records by their key, and in a file of one JSON object a line.

    Args:
        path: The file; a last line that was cut off is left out. None keeps nothing.
        kind: Class of the records.
    """

    def __init__(self, path: Path | None, kind: type[T]) -> None:
        self.path, self._known = path, {}
        text = path.read_text() if path is not None and path.exists() else ""
        # what was cut off must not run into the next record
        self._due = "\n" if text and not text.endswith("\n") else ""
        for line in text.splitlines():
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                continue
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            try:
                self._known[fields["key"]] = kind(**values)
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} holds records of another table, or of another version; choose another output, or delete it"
                ) from error

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> T:
        return self._known[key]

    def add(self, record: T) -> None:
        """Keep a record."""
        self._known[record.key] = record
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as f:
                f.write(self._due + json.dumps(asdict(record)) + "\n")
            self._due = ""
