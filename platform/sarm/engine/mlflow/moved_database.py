"""Rewrites the addresses in a sqlite database whose folder of outputs was moved or copied.

MLflow writes absolute addresses of artifacts into its database, so that a copied database would write into the place it was copied from.
An experiment made here has its artifacts beside the database, in `mlartifacts`, and a tag with the database's folder. Where that tag names
another folder, everything that starts with the old address is given the new one, in one transaction.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlparse

from sarm.contracts.manifest import write_atomically
from sarm.settings.checks import UserError

ARTIFACTS = "mlartifacts"
PLACE_TAG = "sarm.outputs"
# Every column of MLflow's tables that holds an address of artifacts of runs and models.
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
# Where MLmodel files name the folder of a model that was registered by reference.
REFERENCES = ("data", "local_base_model_path")
_WAIT_SECONDS = 60.0


def database_of(uri: str) -> Path | None:
    """The file of a sqlite address, None for another one."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:////") else None


def artifacts_of(uri: str) -> str | None:
    """Where the artifacts of a sqlite database go: beside it. None for a server, which decides that itself."""
    database = database_of(uri)
    return None if database is None else (database.parent / ARTIFACTS).as_uri()


def follow(database: Path) -> list[Path]:
    """Give a moved or copied database the addresses of the place where it lies now; returns the places it came from.

    The models that it registered by reference follow too, as far as they lie in the folder. Nothing is done to an experiment whose
    artifacts were never beside the database. Raises UserError if the database cannot be written to.
    """
    if not database.is_file():
        return []
    here = database.parent
    try:
        with closing(sqlite3.connect(database, timeout=_WAIT_SECONDS)) as store:
            old_places = _old_places(store, here)
            if not old_places:
                return []
            with store:
                for old in old_places:
                    _rewrite(store, old, here)
    except sqlite3.Error as error:
        raise UserError(
            f"{database} was moved here and cannot be told so: {error}. Give yourself the right to write to it."
        ) from error
    for old in old_places:
        _rewrite_references(here, old)
    return old_places


def _old_places(store: sqlite3.Connection, here: Path) -> list[Path]:
    if not {"experiments", "runs", "experiment_tags"} <= _tables(store):
        return []
    found = []
    query = (
        "SELECT e.experiment_id, e.artifact_location, t.value FROM experiments e LEFT JOIN experiment_tags t "
        "ON t.experiment_id = e.experiment_id AND t.key = ?"
    )
    for experiment, location, tag in store.execute(query, (PLACE_TAG,)).fetchall():
        old = Path(tag) if tag else _untagged_place(store, experiment, location, here)
        # Another name of the same folder is no move.
        if old is not None and old != here and not _same(old, here):
            found.append(old)
    return list(dict.fromkeys(found))


def _untagged_place(store: sqlite3.Connection, experiment: int, location: str | None, here: Path) -> Path | None:
    """The old folder of an experiment without the tag: only if the artifacts of one of its runs lie beside the database."""
    address = urlparse(location or "")
    path = Path(unquote(address.path))
    if address.scheme != "file" or path.name != ARTIFACTS:
        return None
    runs = store.execute("SELECT run_uuid FROM runs WHERE experiment_id = ?", (experiment,)).fetchall()
    return path.parent if any((here / ARTIFACTS / run).is_dir() for (run,) in runs) else None


def _rewrite(store: sqlite3.Connection, old: Path, here: Path) -> None:
    before, after = (old / ARTIFACTS).as_uri(), (here / ARTIFACTS).as_uri()
    for table, column in _COLUMNS:
        if column in _columns(store, table):
            # Only the folder itself and its contents: `mlartifacts-old` is another folder.
            store.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (after, len(before) + 1, before, len(before) + 1, f"{before}/"),
            )
    store.execute("UPDATE experiment_tags SET value = ? WHERE key = ? AND value = ?", (str(here), PLACE_TAG, str(old)))


def _rewrite_references(here: Path, old: Path) -> None:
    """Let models that were registered by reference point at the new place of a folder that was moved along."""
    from mlflow.models import Model

    for path in (here / ARTIFACTS).glob("*/artifacts/**/MLmodel"):
        described, changed = Model.load(str(path)), False
        for flavor in described.flavors.values():
            for key in REFERENCES:
                place = Path(str(flavor.get(key, "")))
                if place.is_relative_to(old) and (here / place.relative_to(old)).exists():
                    flavor[key], changed = str(here / place.relative_to(old)), True
        if changed:
            write_atomically(path, described.to_yaml())


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _tables(store: sqlite3.Connection) -> set[str]:
    return {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _columns(store: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in store.execute(f"PRAGMA table_info({table})")}
