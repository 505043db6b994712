"""A terminal's screen, as much of it as lines, carriage returns, erasing and moving up take; and a pseudo-terminal that a test writes to."""

import contextlib
import fcntl
import os
import re
import select
import struct
import termios
from collections.abc import Iterator

_PIECES = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", re.DOTALL)


class Screen:
    """What was written to it, line by line; lines that are too long go on in the next row, as a terminal's do."""

    def __init__(self, columns: int):
        self.columns, self.rows, self.row, self.column = columns, [""], 0, 0
        self.is_coloured = False

    def feed(self, text: str) -> "Screen":
        for number, letter, sign in _PIECES.findall(text):
            if sign:
                self._put(sign)
            elif letter == "J":
                del self.rows[self.row + 1 :]
                self.rows[self.row] = self.rows[self.row][: self.column]
            elif letter == "A":
                self.row -= int(number or 1)
            else:
                assert letter == "m", f"a sequence that leaves something to be mended: {number}{letter}"
                self.is_coloured |= bool(re.search(r"\b(3[0-7]|9[0-7])\b", number))
        return self

    def _put(self, sign: str) -> None:
        if sign == "\r":
            self.column = 0
        elif sign == "\n":
            self._down()
        else:
            if self.column == self.columns:
                self._down()
                self.column = 0
            row = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = row[: self.column] + sign + row[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")


class Pty:
    """A pseudo-terminal: `inner` is what a program writes to."""

    def __init__(self, columns: int, rows: int = 24):
        self.outer, self.inner = os.openpty()
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int = 24) -> None:
        fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds: float = 0.0) -> str:
        """All that has been written, once nothing has come for so long."""
        said = b""
        with contextlib.suppress(OSError):
            while select.select([self.outer], [], [], seconds)[0]:
                said += os.read(self.outer, 65536)
        return said.decode("utf-8", "replace")


@contextlib.contextmanager
def opened(columns: int, rows: int = 24) -> Iterator[Pty]:
    pty = Pty(columns, rows)
    try:
        yield pty
    finally:
        for descriptor in (pty.outer, pty.inner):
            with contextlib.suppress(OSError):
                os.close(descriptor)
