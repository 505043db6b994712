"""The watch's memory: one folder a stream, one small file a step, written as each step ends; read again after a restart."""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarm.audit.drift import Sums
from sarm.contracts.manifest import write_atomically
from sarm.contracts.untrusted import read_json

_ABOUT, _ROLLOUTS = "stream.json", "rollouts.json"
Names = tuple[str, str, str, str]


class Kept(NamedTuple):
    """A finished step, as `DriftStream.add` takes it."""

    step: int
    sums: Sums
    signals: dict[str, float]


class WatchStore:
    """Streams of the folder, by run, split, model and variant."""

    def __init__(self, folder: Path):
        self._folder = folder

    def keep(self, key: Sequence[str], number: int, kept: Kept) -> None:
        """Write the `number`-th step of a stream."""
        folder = self._of(key)
        if not (folder / _ABOUT).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / _ABOUT, json.dumps(dict(zip(("run", "split", "model", "variant"), key, strict=True))))  # fmt: skip
        path = folder / f"{number:08d}.npz"
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(
                file,
                step=kept.step,
                num=kept.sums.num,
                latents=kept.sums.latents.astype(np.int32),
                counts=kept.sums.counts.astype(np.int32),
                totals=kept.sums.totals,
                names=np.array(list(kept.signals), str),
                values=np.array(list(kept.signals.values()), np.float64),
            )
        temporary.replace(path)

    def keep_rollouts(self, key: Sequence[str], rollouts: Sequence[Any]) -> None:
        """Write what alarms show."""
        write_atomically(self._of(key) / _ROLLOUTS, json.dumps(list(rollouts)))

    def rollouts(self, key: Sequence[str]) -> list[dict[str, Any]]:
        """What alarms have shown."""
        path = self._of(key) / _ROLLOUTS
        found: list[dict[str, Any]] = read_json(path) if path.exists() else []
        return found

    def keys(self) -> list[Names]:
        """Every stream, the latest to have been written last."""
        found = sorted(self._folder.glob(f"*/{_ABOUT}"), key=lambda path: (path.parent.stat().st_mtime_ns, path))
        read = [read_json(path) for path in found]
        return [(about["run"], about["split"], about["model"], about["variant"]) for about in read]

    def steps(self, key: Sequence[str]) -> Iterator[Kept]:
        """The steps of a stream in order. One that is torn, or behind the one before, ends them: it is left of an earlier run."""
        return _steps(self._of(key))

    def forget(self, key: Sequence[str]) -> None:
        """Delete a stream."""
        folder = self._of(key)
        for path in (*folder.glob("*.npz"), folder / _ROLLOUTS, folder / _ABOUT):
            path.unlink(missing_ok=True)

    def _of(self, key: Sequence[str]) -> Path:
        return self._folder / hashlib.sha256("\x1f".join(key).encode()).hexdigest()[:24]


def _steps(folder: Path) -> Iterator[Kept]:
    last = -1
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as found:
                totals_A = found["totals"].astype(np.float64)
                sums = Sums(int(found["num"]), found["latents"].astype(np.int64), found["counts"].astype(np.int64), totals_A)  # fmt: skip
                signals = dict(zip(found["names"].tolist(), found["values"].tolist(), strict=True))
                kept = Kept(int(found["step"]), sums, signals)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return
        if kept.step <= last:
            return
        last = kept.step
        yield kept
