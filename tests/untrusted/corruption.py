"""Random damage to every kind of artifact, and whether whoever would use it notices first. Seeded: a failure can be repeated."""

import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.untrusted.small_run import STATES

from sarm.contracts.folders import ACTIVATIONS_FOLDER, CORPUS_FOLDER, PAIRS_FOLDER, SAE_FOLDER, SARM_FOLDER
from sarm.contracts.manifest import CLAIM, StageFolder
from sarm.data.store.checkpoints import Checkpoints
from sarm.settings.checks import UserError

# What a stage claims is of no use once it is finished.
_UNUSED = {CLAIM}


class Artifact(NamedTuple):
    """A folder of a run, whether its user refuses it, and which of its files are damaged."""

    name: str
    folder: str
    is_refused: Callable[[Path], bool]
    is_damaged: Callable[[Path], bool]


def _stage_refuses(schema: str) -> Callable[[Path], bool]:
    """A stage that reads the folder looks at it before it does anything."""

    def is_refused(folder: Path) -> bool:
        try:
            StageFolder(folder.parent / "never-made", "next/v1", {}, {schema: (folder, schema)}).verify_inputs(set())
        except UserError:
            return True
        return False

    return is_refused


def _training_goes_back(folder: Path) -> bool:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = Checkpoints(folder.parent, STATES).latest()
    assert found is not None
    return found.step == 1 and "Going on from step 1" in str(said[0].message)


def _is_manifest(path: Path) -> bool:
    return path.name.startswith("manifest.json")


def _is_content(path: Path) -> bool:
    return path.name not in _UNUSED and not _is_manifest(path)


ARTIFACTS = [
    *(
        Artifact(name, folder, _stage_refuses(schema), _is_content)
        for name, folder, schema in (
            ("corpus", "corpus", CORPUS_FOLDER),
            ("pairs", "pairs", PAIRS_FOLDER),
            ("activations", "activations/text", ACTIVATIONS_FOLDER),
            ("SAE", "sae", SAE_FOLDER),
            ("SARM", "sarm", SARM_FOLDER),
        )
    ),
    Artifact("manifest of activations", "activations/text", _stage_refuses(ACTIVATIONS_FOLDER), _is_manifest),
    Artifact("manifest of a SARM", "sarm", _stage_refuses(SARM_FOLDER), _is_manifest),
    Artifact("training state", "training/sarm/step-000000002", _training_goes_back, _is_content),
    Artifact("manifest of a training state", "training/sarm/step-000000002", _training_goes_back, _is_manifest),
]


def flip(content: bytes, chance: random.Random) -> bytes:
    """One bit."""
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def truncate(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def zero(content: bytes, chance: random.Random) -> bytes:
    """A block, as a disk gives that lost one."""
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.choice((1, 16, 512, 4096)))
    return content[:start] + bytes(stop - start) + content[stop:]


def append(content: bytes, chance: random.Random) -> bytes:
    return content + chance.choice((b"\n", b" ", b"\0", b"more", content[-100:]))


CHANGES = {"bit flip": flip, "truncation": truncate, "zeroed block": zero, "appended bytes": append}
KINDS = (*CHANGES, "deleted file", "swapped files", "file of another run", "added file")


def is_noticed(run: Path, artifact: Artifact, kind: str, chance: random.Random) -> tuple[bool, str]:
    """Damage one file of an artifact, ask its user, and put the file back; says what was done."""
    folder = run / artifact.folder
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and artifact.is_damaged(path))
    path = chance.choice(paths)
    before = {path: path.read_bytes()}
    added: Path | None = None
    if kind in CHANGES:
        content = before[path]
        # Zeros over zeros are no damage.
        while (changed := CHANGES[kind](content, chance)) == content:
            pass
        path.write_bytes(changed)
    elif kind == "deleted file":
        path.unlink()
    elif kind == "swapped files":
        everyone = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in _UNUSED]
        other = chance.choice([p for p in everyone if p.read_bytes() != before[path]])
        before[other] = other.read_bytes()
        path.write_bytes(before[other])
        other.write_bytes(before[path])
    elif kind == "file of another run":
        # Of the same name and form where there is one, else its own with the bytes moved by one.
        others = [p.read_bytes() for p in sorted(run.rglob(path.name)) if p.read_bytes() != before[path]]
        path.write_bytes(chance.choice(others or [before[path][1:] + before[path][:1]]))
    else:
        added = folder / f"part-00000{chance.randrange(3, 9)}{'.parquet' if chance.random() < 0.5 else '.safetensors'}"
        shutil.copyfile(path, added)
    try:
        noticed = artifact.is_refused(folder)
    finally:
        for damaged, content in before.items():
            damaged.write_bytes(content)
        if added is not None:
            added.unlink()
    return noticed, f"{kind} of {path.relative_to(run)}"


def damage(run: Path, number: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Damage `number` times, each artifact and kind in turn; how often each was tried, and what was not noticed."""
    chance = random.Random(seed)
    tried: Counter[tuple[str, str]] = Counter()
    missed = []
    for i in range(number):
        artifact = ARTIFACTS[i % len(ARTIFACTS)]
        kind = KINDS[(i // len(ARTIFACTS)) % len(KINDS)]
        noticed, what = is_noticed(run, artifact, kind, chance)
        tried[artifact.name, kind] += 1
        if not noticed:
            missed.append(what)
    return tried, missed
