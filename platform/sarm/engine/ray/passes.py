"""Passes over Parquet files: blocks of rows through a pool of actors that hold a model, each into a part file of its own.

Ray Data streams block numbers, not rows: an actor reads its block and writes its part, so that no row crosses the object store, memory
does not grow with the corpus, and what is done is what has a part file. A pass that is started again does the blocks that have none.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from sarm.data.store.blocks import Block
from sarm.data.store.parts import remove_temporaries
from sarm.engine.failures import causes_of, is_full_disk, mistake_in
from sarm.engine.passes import Counts, Pass, checked, missing_blocks
from sarm.engine.ray.block_actor import BEGUN, BlockActor
from sarm.engine.ray.cluster import room_for
from sarm.engine.ray.pass_progress import PassProgress
from sarm.engine.ray.room import Cluster
from sarm.engine.ray.watching import Limits, Watched, watched
from sarm.engine.terminal import say
from sarm.settings.checks import NO_PROGRESS_SECONDS, NO_START_SECONDS
from sarm.settings.run import RunSettings


def run_over(
    work: Pass,
    run: RunSettings,
    cluster: Cluster,
    log: Callable[[Mapping[str, float], int], None] | None = None,
    stall_seconds: float = NO_PROGRESS_SECONDS,
    start_seconds: float = NO_START_SECONDS,
) -> Counts:
    """Do the blocks that are not done yet through the run's actors; returns the counts of each target's folder.

    Blocks that failed with an actor, a node or the pass itself are done again, as long as any of them gets done. Raises UserError if the
    actors do not fit the cluster or no row comes out, StalledError if nothing happens for `stall_seconds`, or for `start_seconds` before the first
    block; AuditError if rows are missing or there twice.
    """
    folders = [output.folder for output in work.outputs.values()]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    cluster = room_for(cluster, run, run.num_actors)
    num_actors = cluster.workers(run, run.num_actors)
    threads = cluster.cpus_each(run, num_actors)
    missing = missing_blocks(work)
    if len(missing) < len(work.blocks):
        say(f"{work.name}: {len(work.blocks) - len(missing):,} of {len(work.blocks):,} blocks are done already")
    num_rows = sum(block.num_rows for block in missing)
    actors = min(num_actors, len(missing))
    progress = PassProgress(work.name, num_rows, log, num_actors=actors, threads=threads, use_gpu=cluster.use_gpu)
    seen = Watched(
        name=work.name,
        blocks=work.blocks,
        signs=folders[0] / BEGUN,
        num_actors=num_actors,
        threads=threads,
        use_gpu=cluster.use_gpu,
    )
    while missing:
        try:
            data = _results(work, missing, threads=threads, num_actors=num_actors, use_gpu=cluster.use_gpu)
            for done in watched(data.iter_rows, seen, Limits(stall_seconds, start_seconds)):
                progress.add(done)
        except RayError as error:
            # A block is done when its part is there, whatever became of the message that said so.
            before, missing = len(missing), missing_blocks(work)
            cause = _cause_of(error)
            if len(missing) == before or is_full_disk(cause):
                raise cause from error
            say(f"{work.name}: {_first_line(error)}; going on with {len(missing):,} blocks")
        else:
            missing = missing_blocks(work)
    progress.end()
    for folder in folders:
        remove_temporaries(folder)
        shutil.rmtree(folder / BEGUN, ignore_errors=True)
    return {target: checked(work, output) | progress.figures() for target, output in work.outputs.items()}


def _results(work: Pass, missing: Sequence[Block], *, threads: int, num_actors: int, use_gpu: bool) -> ray.data.Dataset:
    _set_context()
    numbers = ray.data.from_arrow([pa.table({"number": [block.number]}) for block in missing])
    return numbers.map_batches(
        BlockActor,
        fn_constructor_kwargs={
            "blocks": {block.number: block for block in missing},
            "columns": work.columns,
            "keep": work.keep,
            "outputs": work.outputs,
            "actor": work.actor,
            "arguments": work.arguments,
            "threads": threads,
        },
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=min(num_actors, len(missing)),
            max_concurrent_calls_per_actor=calls_at_once(use_gpu),
            max_tasks_in_flight_per_actor=calls_at_once(use_gpu),
            enable_true_multi_threading=True,
        ),
        num_cpus=threads,
        num_gpus=1 if use_gpu else None,
    )


def calls_at_once(use_gpu: bool) -> int:
    """Blocks that an actor holds: one in the forward pass, the others being read, tokenised or written.

    A GPU is done with a small model's block sooner than one core can prepare the next; cores share their time between both.
    """
    return 4 if use_gpu else 2


def _set_context() -> None:
    context = DataContext.get_current()
    context.execution_options.preserve_order = False
    # The driver's watch sees journals too, which Ray does not: a block may take longer than the limit.
    context.execution_no_progress_timeout_s = -1
    # An actor that dies while it loads is started again instead of ending the pass.
    context.max_consecutive_actor_init_deaths = 3
    # Ray's wrapper keeps the text of what it wraps and loses what that was.
    context.raise_original_map_exception = True
    # The driver prints progress with tokens and time left; Ray's lines count blocks.
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that they are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def _cause_of(error: BaseException) -> BaseException:
    """What the user can mend beneath Ray's wrappers, a mistake or a full disk, if there is something, else the error as it is."""
    if (mistake := mistake_in(error)) is not None:
        return mistake
    for cause in causes_of(error):
        # Ray's own class for it is one too, and its text is a whole traceback.
        if is_full_disk(cause) and not isinstance(cause, RayError):
            return cause
    return error


def _first_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), type(error).__name__)
