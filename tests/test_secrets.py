"""No secret of the environment is in anything that the whole chain left behind. Judges' keys: tests/stages/test_interpreting.py."""

import json
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tests.canaries import CANARIES, found_in


def test_the_chain_leaves_no_secret_in_files_database_artifacts_or_logs(finished: Path, ray_logs: Path) -> None:
    outputs = finished.parent
    assert {"mlflow.db", "mlartifacts", "job.log", "tiny"} <= {path.name for path in outputs.iterdir()}
    logs = [path for path in ray_logs.rglob("*") if path.is_file()]
    assert len([path for path in logs if path.suffix in (".log", ".out", ".err")]) > 10, "Ray wrote its logs here"
    assert found_in(outputs, ray_logs) == []


def test_the_search_sees_what_is_there(tmp_path: Path) -> None:
    secret = CANARIES["HF_TOKEN"]
    (tmp_path / "note.json").write_text(json.dumps({"token": secret}))
    pq.write_table(pa.table({"text": ["plain", secret]}), tmp_path / "rows.parquet", compression="zstd")
    with sqlite3.connect(tmp_path / "runs.db") as database:
        database.execute("create table params (value text)")
        database.execute("insert into params values (?)", (CANARIES["OPENAI_API_KEY"],))
    assert {line.split()[0] for line in found_in(tmp_path)} == {"HF_TOKEN", "OPENAI_API_KEY"}
    assert {Path(line.split()[2]).name for line in found_in(tmp_path)} == {"note.json", "rows.parquet", "runs.db"}
