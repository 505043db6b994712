"""Stage folders. A stage claims its folder first (`stage.json`), writes its parts, and writes `manifest.json` last.

A folder with a manifest is finished; one with only a claim is unfinished and no reader accepts it; anything else is foreign.
"""

import datetime
import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarm.contracts.untrusted import inside, parse_json, read_json
from sarm.settings.checks import UserError

MANIFEST = "manifest.json"
CLAIM = "stage.json"
# Hashing gives other threads way: several files at a time are as fast as the disk.
_HASHING_THREADS = 4
# What readers look for by its ending: another file of this kind would be read as if it belonged here.
_DATA = (".parquet", ".safetensors")


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds and what it was made from."""

    schema: str
    created: str
    git_commit: str
    config: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Any]
    files: dict[str, str]


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path, schema: str) -> Manifest:
    """The manifest of a finished stage folder.

    Raises UserError if the folder is missing, unfinished, torn, or of another schema.
    """
    if not folder.is_dir():
        raise UserError(f"{schema}: no folder {folder}. Run the stage that writes it first, or pass another --out.")
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(
            f"{schema}: {folder} has no {MANIFEST}, so it is unfinished. Run the stage that writes it again."
        )
    try:
        manifest = parse_manifest(path.read_bytes())
        for name in manifest.files:
            inside(folder, name)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{schema}: {path} is not a manifest ({error}). Delete the folder and run its stage again."
        ) from error
    if manifest.schema != schema:
        raise UserError(
            f"expected {schema} in {folder}, got {manifest.schema}. Run its stage again, or pass another folder."
        )
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise UserError unless every file that the manifest lists is there with the bytes it had when it was written, and no other data."""
    again = f"Delete {folder} and run its stage again."
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if missing := sorted(manifest.files.keys() - there):
        raise UserError(f"{manifest.schema}: {folder / missing[0]} is missing. {again}")
    if strange := sorted(name for name in there - manifest.files.keys() if name.endswith(_DATA)):
        raise UserError(f"{manifest.schema}: {folder / strange[0]} is not of this folder. Move it away.")
    for name, digest in zip(manifest.files, _hashes(folder, list(manifest.files)), strict=True):
        if digest != manifest.files[name]:
            raise UserError(
                f"{manifest.schema}: {folder / name} has changed (sha256 {digest[:12]}, expected {manifest.files[name][:12]}). {again}"
            )


class StageFolder:
    """One stage's folder, from claim to manifest.

    `config` is what decides the result (see `config.identity`); `inputs` are the finished folders that the stage reads.
    """

    def __init__(
        self, folder: Path, schema: str, config: dict[str, Any], inputs: Mapping[str, tuple[Path, str]] | None = None
    ):
        self.folder, self.schema, self.config = folder, schema, json.loads(json.dumps(config))
        self.inputs: dict[str, str] = {}
        self._read: list[tuple[Path, Manifest]] = []
        for name, (path, input_schema) in (inputs or {}).items():
            self._read.append((path, read_manifest(path, input_schema)))
            self.inputs[name] = sha256_of(path / MANIFEST)

    @property
    def read_manifests(self) -> list[Manifest]:
        """Manifests of the folders that the stage reads."""
        return [manifest for _, manifest in self._read]

    def verify_inputs(self, known: set[Path]) -> None:
        """Raise UserError unless the input folders hold what was written there; those in `known` were looked at already, and others join it."""
        for path, manifest in self._read:
            if path not in known:
                verify_files(path, manifest)
                known.add(path)

    def finished(self) -> Manifest | None:
        """The manifest if this very stage is already done, None if it has to be done.

        Raises UserError if the folder holds anything else: another config, other inputs, or files of nobody's.
        """
        record = refuse_other_config(self.folder, self.schema, self.config)
        if record is not None and record["inputs"] != self.inputs:
            old = record["inputs"]
            changed = sorted(name for name in old.keys() | self.inputs.keys() if old.get(name) != self.inputs.get(name))
            raise UserError(
                f"{self.folder} was made from another {', '.join(changed)}. Pass another --out, or delete the folder to make it again."
            )
        return read_manifest(self.folder, self.schema) if (self.folder / MANIFEST).exists() else None

    def claim(self, *, resume: bool = False, **notes: str) -> dict[str, str]:
        """Take the folder, throwing away what an unfinished run of the same stage left unless it can `resume` that; returns that run's notes.

        Notes are small facts that survive a restart, such as the MLflow run id.
        """
        previous = _read_claim(self.folder).get("notes", {}) if (self.folder / CLAIM).exists() else {}
        if self.folder.exists() and not (resume and (self.folder / CLAIM).exists()):
            for path in self.folder.iterdir():
                if path.name != CLAIM:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_claim({**previous, **notes})
        return previous

    def note(self, **notes: str) -> None:
        """Add notes to a claimed folder."""
        self._write_claim({**_read_claim(self.folder).get("notes", {}), **notes})

    def finish(self, counts: Mapping[str, Any], file_hashes: Mapping[str, str] | None = None) -> Manifest:
        """Hash every file that has no hash in `file_hashes` yet, and write the manifest: from now on the folder is finished."""
        known = dict(file_hashes or {})
        names = sorted(
            p.relative_to(self.folder).as_posix()
            for p in self.folder.rglob("*")
            if p.is_file() and p.name not in (CLAIM, MANIFEST)
        )
        unknown = [name for name in names if name not in known]
        known |= dict(zip(unknown, _hashes(self.folder, unknown), strict=True))
        manifest = Manifest(
            schema=self.schema,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            git_commit=git_commit(),
            config=self.config,
            inputs=self.inputs,
            counts=dict(counts),
            files={name: known[name] for name in names},
        )
        write_atomically(self.folder / MANIFEST, _with_checksum(manifest))
        return manifest

    def write(self, save: Callable[[], None]) -> Manifest:
        """Claim the folder, let `save` write into it, and finish it: for conversions, which take seconds.

        They have no run to track, nothing to go on with and no `--out` of their own, so a session (`Session.stage`) would add a cluster's,
        MLflow's and a lock's care for nothing. Raises UserError if the folder is finished or holds anything else.
        """
        if self.finished():
            raise UserError(f"{self.folder} is a finished {self.schema}. Pass another output folder.")
        self.claim()
        save()
        return self.finish({"figures": {}})

    def _write_claim(self, notes: dict[str, str]) -> None:
        write_atomically(
            self.folder / CLAIM,
            json.dumps({"schema": self.schema, "config": self.config, "inputs": self.inputs, "notes": notes}, indent=2),
        )


def _hashes(folder: Path, names: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return list(pool.map(lambda name: sha256_of(folder / name), names))


def _with_checksum(manifest: Manifest) -> str:
    """The manifest as JSON whose last field is the hash of all its other bytes."""
    text = json.dumps({**manifest.__dict__, "checksum": ""}, indent=2, allow_nan=False)
    before, _, after = text.rpartition('""')
    return f'{before}"{hashlib.sha256(text.encode()).hexdigest()}"{after}'


def parse_manifest(content: bytes) -> Manifest:
    """A manifest of any schema from its file's bytes. Raises ValueError or TypeError unless it is a manifest, and the one that was written; those of before checksums have none."""
    text = content.decode("utf-8")
    fields = parse_json(text)
    if (checksum := fields.pop("checksum", None)) is not None:
        before, _, after = text.rpartition(str(checksum))
        if hashlib.sha256(f"{before}{after}".encode()).hexdigest() != checksum:
            raise ValueError("it has changed since it was written")
    return Manifest(**fields)


def record_of(folder: Path, schema: str) -> dict[str, Any] | None:
    """What the folder's manifest or claim says (`config`, `inputs`), None for a new or empty folder.

    Raises UserError if the folder is torn, or belongs to another kind of stage or to nobody.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder. Pass another --out.")
    if (folder / MANIFEST).exists():
        record = dict(read_manifest(folder, schema).__dict__)
    elif (folder / CLAIM).exists():
        record = _read_claim(folder)
        if record.get("schema") != schema:
            raise UserError(f"{folder} is an unfinished {record.get('schema')}, not {schema}. Pass another --out.")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder} holds files that no stage of this platform claimed. Pass another --out or empty it yourself."
        )
    else:
        return None
    return {"inputs": {}, **record}


def difference_of(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The first setting in which a folder's record differs from a stage's config, with both values; empty if none does."""
    return first_difference(record.get("config"), json.loads(json.dumps(config)))


def refuse_other_config(folder: Path, schema: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """`record_of` the folder. Raises UserError unless the folder is new, or belongs to this very stage with this very config."""
    record = record_of(folder, schema)
    if record is not None and (difference := difference_of(record, config)):
        raise UserError(
            f"{folder} was made with {difference}. Pass another --out, or delete the folder to make it again."
        )
    return record


def _read_claim(folder: Path) -> dict[str, Any]:
    try:
        claim = read_json(folder / CLAIM)
    except ValueError as error:
        raise UserError(f"{folder / CLAIM} is torn ({error}). Delete the folder and run its stage again.") from error
    return claim if isinstance(claim, dict) else {}


def write_atomically(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a file that is seen whole or not at all; without `sync` it may be lost with the machine's power."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def finite_or_null(value: Any) -> Any:
    """The same with None for every number that JSON does not have: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def git_commit() -> str:
    """The commit of the code, `unknown` where it does not run from a checkout."""
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"


def first_difference(old: Any, new: Any, name: str = "") -> str:
    """The first setting that differs between two nested configs, with both values; empty if none does."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if difference := first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key):
                return difference
        return ""
    return "" if old == new else f"{name}={old!r}, now asked for {name}={new!r}"
