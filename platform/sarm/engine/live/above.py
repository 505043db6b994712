"""A stream that stands for one of the terminal while a display is drawn there: whole lines go above it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TextIO


class _Display(Protocol):
    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    def is_open_here(self) -> bool: ...

    def print(self, stream: TextIO, whole: str) -> None: ...

    def aside(self) -> AbstractContextManager[None]: ...


class Above:
    """`stream`, of which `display` prints the lines. Without a display it is `stream`."""

    def __init__(self, display: _Display, stream: TextIO):
        self._display, self._stream = display, stream
        self.rest = ""
        """What has no end yet, such as a library's bar."""

    def write(self, text: str) -> int:
        """Print what ends with a newline, and keep the rest."""
        if not self._display.is_open_here():
            self.release()
            return self._stream.write(text)
        with self._display.lock:
            whole, end, rest = (self.rest + text).rpartition("\n")
            # A carriage return takes back what stood before it.
            self.rest = rest.rpartition("\r")[2]
            if end:
                self._display.print(self._stream, whole + end)
        return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        """Each as `write` does."""
        for text in texts:
            self.write(text)

    def handed_over(self) -> AbstractContextManager[None]:
        """While the body runs, another process writes to the terminal, and nothing is drawn there."""
        return self._display.aside()

    def release(self) -> None:
        """Print what has no end yet."""
        if self.rest:
            rest, self.rest = self.rest, ""
            self._stream.write(rest)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
