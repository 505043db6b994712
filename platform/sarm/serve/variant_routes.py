"""Edited heads over HTTP: `/v1/models/NAME/variants`. Each is scored from the moment on that it is posted, and kept in a folder over restarts."""

import json
import logging
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sarm.audit.steering import Edit
from sarm.contracts.manifest import write_atomically
from sarm.serve.faults import RequestError
from sarm.serve.heads import BASE, Heads, read_edit
from sarm.serve.schemas import Variant
from sarm.settings.checks import UserError

log = logging.getLogger("sarm.serve")
MAX_VARIANTS = 64
_CLOCK_STEP = 0.1
Stamp = tuple[int, int, int] | None


class Variants:
    """The variants of one model's heads, and the folder that keeps those that were posted; without one they last as long as the server."""

    def __init__(self, heads: Heads, folder: Path | None):
        self._heads, self._folder = heads, folder
        self._fixed = set(heads.names)
        self._changed, self._looked = -1, 0.0
        # What each file was when it was read: another under the same name is another variant.
        self._read: dict[str, Stamp] = {}
        self._lock = threading.Lock()
        self.look(is_start=True)

    def look(self, names: Collection[str] | None = None, *, is_start: bool = False) -> None:
        """Take over what other servers have posted to the folder, or deleted from it: replicas of a server share one.

        With `names`, only if one of them is no variant that the server was started with. A file that holds no edit of this head is no variant;
        at the start it raises UserError.
        """
        if self._folder is None or (names is not None and self._fixed.issuperset(names)):
            return
        with self._lock:
            try:
                changed = self._folder.stat().st_mtime_ns
            except OSError:
                return
            # A folder's clock has steps: two changes within one look alike.
            if changed == self._changed and self._looked - changed / 1e9 > _CLOCK_STEP:
                return
            self._looked = time.time()
            there = {path.stem: path for path in sorted(self._folder.glob("*.json")) if path.stem not in self._fixed}
            stamps = {name: _stamp(path) for name, path in there.items()}
            for name in [name for name, stamp in self._read.items() if stamps.get(name) != stamp]:
                del self._read[name]
                if name in self._heads.names:
                    self._heads.remove(name)
            for name in sorted(there.keys() - self._read.keys()):
                self._read[name] = stamps[name]
                try:
                    self._heads.add(name, read_edit(there[name]))
                except UserError as error:
                    if is_start:
                        raise
                    log.warning("a file of the variants folder is passed over: %s", error)
            self._changed = changed

    def listed(self) -> dict[str, Any]:
        """Every head with the number of latents that it edits, and whether it can be deleted."""
        self.look()
        return {
            "variants": [
                {"name": name, "edited": self._heads.num_edited(name), "fixed": name in self._fixed}
                for name in self._heads.names
            ]
        }

    def post(self, variant: Variant) -> dict[str, Any]:
        """Add a variant.

        Raises RequestError: 409 for a name that is taken, 422 for an edit of another head, 429 when there are too many.
        """
        self.look()
        if variant.name in self._heads.names:
            raise RequestError(409, "variant_exists", "there is a variant of this name; delete it first")
        if len(self._heads.names) > MAX_VARIANTS:
            raise RequestError(429, "too_many_variants", f"there are {MAX_VARIANTS} variants; delete one first")
        records = [one.model_dump() for one in variant.weights]
        try:
            self._heads.add(variant.name, Edit.from_json(records))
        except UserError as error:
            raise RequestError(422, "bad_edit", "the edit does not fit this model's head", detail=str(error)) from error
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                path = self._folder / f"{variant.name}.json"
                write_atomically(path, json.dumps({"weights": records}))
                self._read[variant.name] = _stamp(path)
            except OSError as error:
                self._heads.remove(variant.name)
                raise RequestError(507, "not_kept", f"the variant cannot be written: {error.strerror}") from error
        return self.listed()

    def delete(self, name: str) -> dict[str, Any]:
        """Delete a variant. Raises RequestError: 404 for one that is not there, 409 for one that the server was started with."""
        self.look()
        if name in self._fixed:
            raise RequestError(409, "fixed_variant", f"{BASE} and the variants that the server was started with stay")
        if name not in self._heads.names and name not in self._read:
            raise RequestError(404, "unknown_variant", "there is no such variant")
        if self._folder is not None:
            (self._folder / f"{name}.json").unlink(missing_ok=True)
        self._read.pop(name, None)
        if name in self._heads.names:
            self._heads.remove(name)
        return self.listed()


def _stamp(path: Path) -> Stamp:
    """What tells a file from another that took its place; None for one that is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
