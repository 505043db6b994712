"""Pieces of evidence: what one command measures in under 50 minutes, kept as a small JSON file that is committed.

A piece is measured once. A file that was made with other settings than the code has now is stale: it is measured again, and tables
leave it out.
"""

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sarm.contracts.manifest import write_atomically

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "evidence"


@dataclass(frozen=True)
class Piece:
    """`settings` are all that decides what is measured, as JSON; `measure(work)` does it, with `work` for what pieces of a study share."""

    name: str
    settings: Mapping[str, Any]
    measure: Callable[[Path], dict[str, Any]]

    @property
    def command(self) -> str:
        """What measures this piece alone."""
        return f"make evidence PIECES={self.name}"


def read(piece: Piece, folder: Path = FOLDER) -> dict[str, Any] | None:
    """What the piece found; None if it was not measured, or with other settings."""
    path = _path(piece, folder)
    if not path.exists():
        return None
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept if kept["settings"] == json.loads(json.dumps(piece.settings)) else None


def measure(piece: Piece, work: Path, folder: Path = FOLDER) -> dict[str, Any]:
    """Measure a piece and keep what it found."""
    began = time.monotonic()
    found = piece.measure(work)
    kept = {
        "piece": piece.name,
        "command": piece.command,
        "settings": piece.settings,
        "machine": machine(),
        "measured": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - began),
        "found": found,
    }
    path = _path(piece, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(kept, indent=1) + "\n")
    return kept


def missing(pieces: Iterable[Piece], folder: Path = FOLDER) -> list[Piece]:
    """Those that are yet to be measured."""
    return [piece for piece in pieces if read(piece, folder) is None]


def chosen(pieces: Sequence[Piece], names: Sequence[str]) -> list[Piece]:
    """The pieces of these names, or whose names begin with one of them and a slash; all, without names. Raises ValueError for a name that is none."""
    for name in names:
        if not any(_is_of(piece, name) for piece in pieces):
            raise ValueError(f"no piece {name!r}. There are: {', '.join(piece.name for piece in pieces)}")
    return [piece for piece in pieces if not names or any(_is_of(piece, name) for name in names)]


def machine() -> dict[str, Any]:
    """What may decide how sums are rounded."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _is_of(piece: Piece, name: str) -> bool:
    return piece.name == name or piece.name.startswith(f"{name}/")


def _path(piece: Piece, folder: Path) -> Path:
    return folder / f"{piece.name}.json"
