"""Training states on disk: written whole or not at all, verified before use, the one before kept to fall back on.

`step-000000042/` holds each part as `NAME.safetensors` and `NAME.json`, then `manifest.json` with the sha256 of every file, then
`manifest.json.sha256` in the format of `sha256sum`. It is written under another name and renamed once everything is on the disk.

torch is imported by what reads and writes tensors: a stage that has its states looked for may still be refused.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from sarm.contracts.manifest import first_difference, sha256_of
from sarm.settings.checks import UserError

if TYPE_CHECKING:
    from torch import Tensor

Everyone = Callable[[Any], list[Any]]
# Parts as tensors and JSON, copied from what training goes on to change.
Snapshot = Mapping[str, tuple[dict[str, "Tensor"], str]]
_SCHEMA = "checkpoint/v1"
_MANIFEST, _SUM, _STOP = "manifest.json", "manifest.json.sha256", "stop-requested"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_STEP = re.compile(r"step-(\d{9,})")


class Written(NamedTuple):
    """The hashes of the files that a worker wrote, or why it could not."""

    files: dict[str, str]
    error: str | None


class _DamagedError(Exception):
    """A checkpoint that must not be used; the text says which file and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified state. Parts are read when asked for, so that each worker reads its own."""

    step: int
    folder: Path
    parts: tuple[str, ...]

    def read(self, part: str) -> Any:
        """What `save` was given under this name; raises UserError if there was none."""
        if part not in self.parts:
            raise UserError(
                f"{self.folder} has no part {part}, it has {', '.join(self.parts)}. Delete it to start over."
            )
        from safetensors.torch import load_file

        from sarm.data.store.state_tree import join_state

        return join_state(load_file(self.folder / f"{part}.safetensors"), (self.folder / f"{part}.json").read_text())


def alone(value: Any) -> list[Any]:
    """What all workers have where there is one; `torch.distributed` has `all_gather_object` for more."""
    return [value]


def snapshot(parts: Mapping[str, Any]) -> Snapshot:
    """Copies, in host memory, of what training goes on to change; raises TypeError for what is no state."""
    from sarm.data.store.state_tree import split_state

    return {name: split_state(state) for name, state in parts.items()}


class Checkpoints:
    """The states of one training in one folder, which all of its workers see.

    `identity` is what decides the training's result (config, seed, hashes of inputs): states of another one are refused.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int = 2):
        if keep < 2:
            raise ValueError(
                f"keep must be at least 2, got {keep}: the last but one is what a damaged last falls back on."
            )
        self.folder, self._identity, self._keep = folder, json.loads(json.dumps(identity)), keep

    def save(self, step: int, parts: Mapping[str, Any], everyone: Everyone = alone, is_first: bool = True) -> None:
        """Write a state; all workers call it together, each with its own parts, and `is_first` on one of them.

        A part is a nesting of dicts, lists, tuples, tensors, numbers, strings and None. `everyone(value)` returns the values of
        all workers to each of them. When `save` returns, the state is on the disk. Raises OSError if it could not be written
        (by any worker), and the states before it are untouched.
        """
        self.commit(step, self.write(step, snapshot(parts)), everyone, is_first)

    def write(self, step: int, parts: Snapshot) -> Written:
        """The first half of `save`: this worker's files, in a folder that no reader takes for a state. A thread may do it."""
        try:
            return Written(self._write_parts(self._pending(step), parts), None)
        except (OSError, SafetensorError) as error:
            return Written({}, str(error))

    def commit(self, step: int, mine: Written, everyone: Everyone = alone, is_first: bool = True) -> None:
        """The second half of `save`, by all workers once each has written: the state appears, whole, under its name."""
        pending, all_parts = self._pending(step), everyone(mine)
        failed = [part.error for part in all_parts if part.error]
        committed = None
        if not failed and is_first:
            try:
                self._commit(step, pending, {k: v for part in all_parts for k, v in part.files.items()})
            except OSError as error:
                committed = str(error)
        failed += [error for error in everyone(committed) if error]
        if failed:
            if is_first:
                shutil.rmtree(pending, ignore_errors=True)
            raise OSError(f"the training state of step {step} could not be written to {self.folder}: {failed[0]}")

    def latest(self) -> Checkpoint | None:
        """The newest state that is whole, None if none was ever saved; older ones are used with a warning.

        Raises UserError if there are states and none is whole, or the newest is of another training.
        """
        refused: list[str] = []
        for step, folder in reversed(self._saved()):
            try:
                found = self._verified(step, folder)
            except _DamagedError as damage:
                refused.append(str(damage))
                continue
            if refused:
                warnings.warn(f"{'; '.join(refused)}. Going on from step {step} instead.", stacklevel=2)
            return found
        if refused:
            raise UserError(
                f"no training state in {self.folder} is whole: {'; '.join(refused)}. Delete the folder to start over."
            )
        return None

    def newest_step(self) -> int:
        """The step of the newest state, whole or not; -1 if there is none."""
        return max((step for step, _ in self._saved()), default=-1)

    def request_stop(self) -> None:
        """Ask the workers to save and stop; they see it, since the folder is shared."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _STOP).touch()

    def withdraw_stop(self) -> None:
        """Forget what `request_stop` asked for."""
        (self.folder / _STOP).unlink(missing_ok=True)

    def is_stop_requested(self) -> bool:
        """Whether the workers shall save and stop."""
        return (self.folder / _STOP).exists()

    def delete(self) -> None:
        """Remove all states, once what they led to is safe elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _saved(self) -> list[tuple[int, Path]]:
        found = [(_STEP.fullmatch(path.name), path) for path in self.folder.glob("step-*")]
        return sorted((int(match[1]), path) for match, path in found if match)

    def _pending(self, step: int) -> Path:
        return self.folder / f".step-{step:09}"

    def _write_parts(self, pending: Path, parts: Snapshot) -> dict[str, str]:
        from safetensors.torch import save_file

        pending.mkdir(parents=True, exist_ok=True)
        written = {}
        for name, (tensors, text) in parts.items():
            assert _NAME.fullmatch(name), f"a part is named like rank-3, got {name!r}"
            save_file(tensors, pending / f"{name}.safetensors")
            (pending / f"{name}.json").write_text(text)
            for path in (pending / f"{name}.safetensors", pending / f"{name}.json"):
                _to_disk(path)
                written[path.name] = sha256_of(path)
        return written

    def _commit(self, step: int, pending: Path, files: dict[str, str]) -> None:
        for path in pending.iterdir():
            if path.name not in files:
                path.unlink()
        if missing := sorted(name for name in files if not (pending / name).is_file()):
            raise OSError(
                f"{missing[0]} of another worker is not to be seen: the folder must be one that all workers share"
            )
        manifest = {"schema": _SCHEMA, "step": step, "identity": self._identity, "files": files}
        (pending / _MANIFEST).write_text(json.dumps(manifest, indent=2))
        (pending / _SUM).write_text(f"{sha256_of(pending / _MANIFEST)}  {_MANIFEST}\n")
        for path in (pending / _MANIFEST, pending / _SUM, pending):
            _to_disk(path)
        target = self.folder / f"step-{step:09}"
        # Only a damaged state, or one of a future that was given up, can be in the way.
        stale = [path for number, path in self._saved() if number >= step]
        for path in stale:
            aside = path.with_name(f".stale-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        pending.rename(target)
        _to_disk(self.folder)
        for _, path in self._saved()[: -self._keep]:
            shutil.rmtree(path)
        for path in self.folder.glob(".st*-*"):
            shutil.rmtree(path)

    def _verified(self, step: int, folder: Path) -> Checkpoint:
        try:
            manifest_bytes, expected = (folder / _MANIFEST).read_bytes(), (folder / _SUM).read_bytes()
            if expected != f"{sha256_of(folder / _MANIFEST)}  {_MANIFEST}\n".encode():
                raise _DamagedError(f"{folder / _MANIFEST} has changed since it was written")
            manifest = json.loads(manifest_bytes)
            files: dict[str, str] = manifest["files"]
            there = {path.name for path in folder.iterdir()}
            if odd := sorted(there ^ {*files, _MANIFEST, _SUM}):
                raise _DamagedError(f"{folder / odd[0]} is {'missing' if odd[0] not in there else 'not of this state'}")
            for name, digest in files.items():
                if sha256_of(folder / name) != digest:
                    raise _DamagedError(
                        f"{folder / name} has changed since it was written ({(folder / name).stat().st_size} bytes)"
                    )
        except OSError as error:
            raise _DamagedError(f"{folder} cannot be read: {error}") from error
        if manifest["schema"] != _SCHEMA or manifest["step"] != step:
            raise _DamagedError(f"{folder} holds {manifest['schema']} of step {manifest['step']}")
        if difference := first_difference(manifest["identity"], self._identity):
            raise UserError(
                f"the training state in {folder} was made with {difference}. Pass another --out, or delete {self.folder} to start over."
            )
        return Checkpoint(step, folder, tuple(sorted(name[:-5] for name in files if name.endswith(".json"))))


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
