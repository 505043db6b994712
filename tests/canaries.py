"""Secrets that are nobody's, put where jobs find real ones; and a search for them in everything that a job leaves behind."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

# By the names under which the tools take them.
CANARIES = {
    "OPENAI_API_KEY": "sk-canary-4f1d0c5e7a9b3d2468ace",
    "HF_TOKEN": "hf_CanaryQwErTyUiOpAsDfGhJkL",
    "MLFLOW_TRACKING_USERNAME": "canary-user-71a3f0",
    "MLFLOW_TRACKING_PASSWORD": "canary-password-9e8d7c6b5a",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/secret/0123456789abcdef0123",
}


def contents(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below a folder, with what is packed in it unpacked."""
    for path in sorted(root.rglob("*")):
        if not path.is_file():
            continue
        try:
            yield path, path.read_bytes()
            if path.suffix == ".parquet":
                yield path, str(pq.read_table(path).to_pydict()).encode("utf-8", "surrogatepass")
        except OSError:
            # Sockets and files of processes that have ended meanwhile.
            continue
        if path.suffix == ".db":
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
                yield path, "\n".join(database.iterdump()).encode()


def found_in(*roots: Path) -> list[str]:
    """Where a canary was found, by its name, and nothing else of it."""
    secrets = {name: value.encode() for name, value in CANARIES.items()}
    return [
        f"{name} in {path}"
        for root in roots
        for path, content in contents(root)
        for name, secret in secrets.items()
        if secret in content
    ]
