"""Ray Data passes: Parquet files through a pool of actors that hold a model, into Parquet files."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from sarm.config import Run, UserError
from sarm.runtime.actors import Source
from sarm.runtime.cluster import Cluster
from sarm.runtime.parquet_sink import ParquetSink, read_counts, remove_temporaries

_BATCH_ROWS = 64
# Ray's own default lets a starved pipeline hang for half an hour.
_NO_PROGRESS_SECONDS = 300


def run_over(
    source: Source,
    files: Sequence[Path],
    keep: Callable[[pa.Table], pa.Table] | None,
    actor: type,
    arguments: dict[str, Any],
    table_schema: pa.Schema,
    folder: Path,
    rows_per_file: int,
    run: Run,
    cluster: Cluster,
) -> dict[str, Any]:
    """Stream the rows of Parquet files that `keep` keeps through `run.num_actors` actors into `folder`; returns the sink's counts.

    Raises UserError if the actors do not fit the cluster, or no row comes out.
    """
    data = ray.data.read_parquet([str(path) for path in files])
    if keep is not None:
        data = data.map_batches(keep, batch_format="pyarrow")
    through_actors(
        data, _BATCH_ROWS, source, actor, arguments, ParquetSink(folder, table_schema, rows_per_file), run, cluster
    )
    counts = read_counts(folder)
    if counts["rows"] == 0:
        raise UserError(
            f"{source.name}: nothing usable came out of {source.num_rows} rows: {counts['rejected'] or 'no reason given'}. Look at the source."
        )
    return counts


def through_actors(
    data: ray.data.Dataset,
    batch_rows: int,
    source: Source,
    actor: type,
    arguments: dict[str, Any],
    sink: ParquetSink,
    run: Run,
    cluster: Cluster,
) -> None:
    """Stream a data set in batches of `batch_rows` rows through `run.num_actors` actors into a sink.

    Raises UserError if the actors do not fit the cluster.
    """
    data = mapped(data, batch_rows, source, actor, arguments, run, cluster)
    folder = Path(sink.path)
    folder.mkdir(parents=True, exist_ok=True)
    data.write_datasink(sink)
    remove_temporaries(folder)


def mapped(
    data: ray.data.Dataset,
    batch_rows: int,
    source: Source,
    actor: type,
    arguments: dict[str, Any],
    run: Run,
    cluster: Cluster,
) -> ray.data.Dataset:
    """What `run.num_actors` actors make of a data set, computed as it is read.

    Raises UserError if the actors do not fit the cluster.
    """
    context = DataContext.get_current()
    # The same order whatever the number of actors: what trains on it is then the same as well.
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = _NO_PROGRESS_SECONDS
    # The actors print progress with tokens and time left; Ray's lines count blocks.
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    threads = cluster.cpus_each(run, run.num_actors)
    return data.map_batches(
        actor,
        fn_constructor_kwargs={**arguments, "source": source, "threads": threads},
        batch_size=batch_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=run.num_actors),
        num_cpus=threads,
        num_gpus=1 if cluster.use_gpu else None,
    )
