"""One driver of a pass over a made-up corpus: `driver.py ADDRESS FOLDER`. It may be killed at any time and started again."""

import sys
import time
from pathlib import Path

import ray

from sarm.contracts.passes import Target
from sarm.contracts.tables import activations_table
from sarm.data.formats.models import model_folder
from sarm.data.store.blocks import plan_blocks
from sarm.engine.passes import Pass
from sarm.engine.ray.block_actor import Output
from sarm.engine.ray.passes import run_over
from sarm.engine.ray.room import Cluster, Node
from sarm.passes.activations import TextActivations
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings
from sarm.settings.run import RunSettings

MODEL = ModelSettings(name="tiny:llama", layer=1, max_length=128)
TARGET = Target("document", 1)
STALL_SECONDS = 90.0


class Slow(TextActivations):
    """Slow enough for a kill to find it at work."""

    def compute(self, prepared, beat):
        time.sleep(0.5)
        return super().compute(prepared, beat)


def row_ids(table):
    return table.column("row_id").to_pylist()


def make_pass(folder: Path, actor=Slow) -> Pass:
    output = Output(folder / "out", activations_table(64, {"dtype": "float16", "layer": 1}))
    return Pass(
        name="chaos",
        blocks=plan_blocks([folder / "corpus.parquet"], 1),
        columns=("row_id", "text"),
        keep=None,
        actor=actor,
        arguments={
            "model": MODEL,
            "folder": model_folder(MODEL),
            "extraction": ExtractionSettings(),
            "schemas": {TARGET: output.table_schema},
        },
        outputs={TARGET: output},
        id_columns=("row_id",),
        input_ids=row_ids,
        output_id="row_id",
    )


def main(address: str, folder: Path) -> None:
    ray.init(address=address, log_to_driver=False, logging_level="error")
    started = time.monotonic()
    run = RunSettings(out=folder, num_actors=2, cpus_per_worker=1)
    cluster = Cluster(nodes=(Node(1), Node(2), Node(2)), is_local=False)
    counts = run_over(make_pass(folder), run, cluster, stall_seconds=STALL_SECONDS)[TARGET]
    print(
        f"done rows={counts['rows']} audited={counts['audited_rows']} seconds={time.monotonic() - started:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    # By its own name, so that actors find the classes of this file.
    from tests.chaos import driver

    driver.main(sys.argv[1], Path(sys.argv[2]))
