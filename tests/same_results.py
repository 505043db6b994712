"""Whether a change of the code keeps its results: every figure, row and weight that tiny runs of all jobs write.

    python tests/same_results.py record outputs/same     before the change
    python tests/same_results.py compare outputs/same    after it; status 1 if anything differs

A recording runs everything twice. What differs between two runs of one program (times, addresses, identifiers) cannot be
compared, and is listed; all the rest has to be equal, to the last bit.
"""

import argparse
import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

Leaves = dict[str, str]

_LEFT_OUT = (".db", ".lock", ".log", ".png")
# MLflow's own copies, whose folders are named by run, and what waits to be sent to it.
_FOLDERS_LEFT_OUT = {"mlartifacts", "outbox"}

# Of one run; `$OUT` is its folder.
COMMANDS = [
    "jobs/pipeline.py tiny --out $OUT/tiny",
    "tune/ablation.py tiny --out $OUT/ablation",
    "jobs/interpret.py $OUT/tiny/contexts --out $OUT/tiny/explanations --judging.judges wise@$JUDGE --judging.keys $HOST=env:JUDGE_KEY",
    "jobs/interpret.py $OUT/tiny/contexts --out $OUT/extractive",
    "jobs/feature_pages.py tiny --out $OUT/tiny --redo-from feature_pages",
    "jobs/audit_features.py --sarm $OUT/tiny/sarm --select $OUT/tiny/pairs --target $OUT/tiny/pairs --off-target rm_bench=$OUT/chat.jsonl --out $OUT/audit",
    "jobs/steer.py --out $OUT/audit --name doubled --edit scale --strength 2",
    "jobs/relabel.py --out $OUT/audit --poison 0.05 --denoise 0.05 --seeds 2",
    "jobs/evaluate.py --model $OUT/tiny/sarm --benchmarks rm_bench=$OUT/chat.jsonl reward_bench_2=$OUT/safety.jsonl --out $OUT/benchmarks",
    "jobs/evaluate.py --model $OUT/tiny/scalar_head --benchmarks rm_bench=$OUT/chat.jsonl reward_bench_2=$OUT/safety.jsonl --out $OUT/benchmarks-b",
    "jobs/compare.py $OUT/benchmarks $OUT/benchmarks-b --out $OUT/compared",
    "jobs/reward_card.py --model $OUT/tiny/sarm --conversation $OUT/chat.json --out $OUT/card.html",
    "jobs/rate.py $OUT/tiny/explanations --sheet $OUT/sheet.csv",
    "jobs/convert_sae.py $OUT/tiny/sae $OUT/saelens --format saelens",
    "jobs/convert_sae.py $OUT/tiny/sae $OUT/sparsify --format sparsify",
    "jobs/convert_sarm.py $OUT/tiny/sarm $OUT/papers --format papers",
]


def run_all(out: Path) -> None:
    """Run every command into the folder `out`. Raises RuntimeError if one fails."""
    from tests.documented_world import _bring_files
    from tests.engine.judge_server import JudgeServer
    from tests.interpret.planted import guessing

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    _bring_files(out)
    with (
        tempfile.TemporaryDirectory(prefix="sarm-", dir="/tmp", ignore_cleanup_errors=True) as logs,
        JudgeServer(guessing).serving() as judge,
    ):
        host = judge.url.split("://")[1].split("/")[0]
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")},
            "OUT": str(out), "JUDGE": judge.url, "HOST": host, "JUDGE_KEY": "none", "RAY_TMPDIR": logs,
            "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1", "SARM_CACHE": str(Path(logs) / "cache"),
        }  # fmt: skip
        for command in COMMANDS:
            print(f"  {command}", flush=True)
            done = subprocess.run(
                ["bash", "-c", f"{sys.executable} {command}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def leaves_of(out: Path) -> Leaves:
    """What every file under `out` says, one entry for each value, column and tensor. Folders and addresses of the run are left out."""
    found: Leaves = {}
    for path in sorted(out.rglob("*")):
        inside = path.relative_to(out)
        name = inside.as_posix()
        left_out = path.suffix in _LEFT_OUT or ".aside" in name or _FOLDERS_LEFT_OUT.intersection(inside.parts)
        if path.is_file() and not left_out:
            found.update({f"{name} :: {key}": value for key, value in _of_file(path, out)})
    return found


def _of_file(path: Path, out: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".parquet":
        yield from _of_table(path, out)
    elif path.suffix == ".safetensors":
        yield from _of_tensors(path)
    elif path.suffix == ".json":
        yield from _of_json(json.loads(_text(path, out)), "")
    elif path.suffix in (".html", ".md", ".csv", ".jsonl", ".jinja", ".txt", ".py", ""):
        for number, line in enumerate(_text(path, out).splitlines()):
            yield f"line {number}", _hash(line.encode())
    else:
        yield "", _hash(path.read_bytes())


def _of_table(path: Path, out: Path) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    yield "rows", str(table.num_rows)
    for column in table.column_names:
        yield column, _hash(_plain(json.dumps(table[column].to_pylist(), default=repr), out).encode())


def _of_tensors(path: Path) -> Iterator[tuple[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            yield name, f"{tensor.dtype} {tuple(tensor.shape)} {_hash(tensor.contiguous().view(-1).numpy().tobytes())}"


def _of_json(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _of_json(inner, f"{key}.{name}")
    elif isinstance(value, list):
        yield f"{key}.length", str(len(value))
        for number, inner in enumerate(value):
            yield from _of_json(inner, f"{key}[{number}]")
    else:
        yield key, repr(value)


def _text(path: Path, out: Path) -> str:
    return _plain(path.read_text(errors="replace"), out)


def _plain(text: str, out: Path) -> str:
    return re.sub(r"127\.0\.0\.1:\d+", "HOST", text.replace(str(out), "OUT").replace(str(ROOT), "ROOT"))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def compared(recorded: list[Leaves], now: Leaves) -> tuple[list[str], list[str], int]:
    """(what differs, what cannot be compared, how many entries were equal) of a run against two recorded ones."""
    first, second = recorded
    by_nature = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    certain = {key: value for key, value in first.items() if second.get(key) == value}
    other = [f"{key}: {certain[key]} -> {now.get(key, 'gone')}" for key in certain if now.get(key) != certain[key]]
    new = [f"{key}: new" for key in now.keys() - first.keys() - second.keys()]
    return sorted([*other, *new]), by_nature, len(certain) - len(other)


def kinds(keys: list[str]) -> list[str]:
    """The entries by kind, with how many of each: numbers and hashes inside names are left out."""
    counts = collections.Counter(re.sub(r"[0-9a-f]{8,}|\d+", "N", key.split(": ")[0]) for key in keys)
    return [f"{count:6,}  {kind}" for kind, count in counts.most_common()]


def main() -> None:
    """Record or compare, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    names = ("first", "second") if arguments.what == "record" else ("now",)
    for name in names:
        print(f"{name} run:", flush=True)
        run_all(folder / "run")
        (folder / f"{name}.json").write_text(json.dumps(leaves_of(folder / "run"), indent=0))
    recorded = [json.loads((folder / f"{name}.json").read_text()) for name in ("first", "second")]
    now = recorded[1] if arguments.what == "record" else json.loads((folder / "now.json").read_text())
    differs, by_nature, equal = compared(recorded, now)
    print(f"\n{len(by_nature):,} entries differ between two runs of one program:", *kinds(by_nature)[:60], sep="\n")
    print(f"\n{equal:,} entries are equal, {len(differs):,} differ", *kinds(differs)[:60], *differs[:40], sep="\n")
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    main()
