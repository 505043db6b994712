"""What judges have answered: an append-only log a judge, which is the cache as well. One JSON object a line, the last of a key counts.

A line is one write to a file opened for appending: a kill leaves whole lines and at most one torn end, which is not read.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sarm.contracts.judging import Reply
from sarm.settings.checks import UserError
from sarm.settings.judging import JudgeSpec


def content_key(*parts: Any) -> str:
    """The address of a request: the hash of everything that decides its answer."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class AnswerLog:
    """The log of one judge in `folder`; raises UserError where it cannot be written."""

    def __init__(self, folder: Path, spec: JudgeSpec):
        digest = hashlib.sha256(f"{spec.base_url}\x1f{spec.model}".encode()).hexdigest()[:8]
        self.path = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', spec.model)[-60:]}-{digest}.jsonl"
        self._known: dict[str, dict[str, Any]] = {}
        self.num_torn = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"the judges' log {self.path} cannot be written ({error.strerror}). Set SARM_CACHE to a folder that can.") from error  # fmt: skip
        for line in content.splitlines():
            try:
                row = json.loads(line)
                self._known[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                self.num_torn += 1
        if content and not content.endswith(b"\n"):
            os.write(self._file, b"\n")

    def find(self, key: str) -> Reply | None:
        """The last reply under a key."""
        if (row := self._known.get(key)) is None:
            return None
        return Reply(**{**{name: row[name] for name in _FIELDS if name in row}, "cached": True})

    def note(self, key: str) -> Mapping[str, Any] | None:
        """A fact of another kind than replies, such as what the server can do."""
        return self._known.get(key)

    def add(self, key: str, reply: Reply, **more: Any) -> None:
        """Append a reply; whole or not at all."""
        self.add_note(key, **asdict(reply), **more)

    def add_note(self, key: str, **facts: Any) -> None:
        """Append a fact."""
        row = {"key": key, **facts}
        self._known[key] = row
        os.write(self._file, (json.dumps(row, ensure_ascii=True) + "\n").encode())

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)


_FIELDS = ("status", "answer", "reason", "text", "prompt_tokens", "completion_tokens", "estimated", "requests")
