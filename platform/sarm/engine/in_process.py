"""A pass in this process, without a cluster: where Ray is not installed, or is not worth starting."""

import shutil

import pyarrow as pa

from sarm.data.store.parts import remove_temporaries
from sarm.engine.passes import Counts, Pass, checked, missing_blocks
from sarm.engine.ray.block_actor import BEGUN, BlockActor
from sarm.engine.ray.machine import this_machine
from sarm.engine.ray.pass_progress import PassProgress
from sarm.engine.stopping import leave_if_asked
from sarm.engine.terminal import say


def run_here(work: Pass, threads: int = 0) -> Counts:
    """As `engine.ray.passes.run_over` with one actor, which is this process: the same blocks, parts and checks; returns the counts of each folder.

    `threads` are torch's; 0: one for each core that this process may use. Raises UserError if no row comes out, AuditError if rows are
    missing or there twice, StoppedError if the job was asked to stop. What is done is kept.
    """
    folders = [output.folder for output in work.outputs.values()]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    threads = threads or this_machine().cores
    missing = missing_blocks(work)
    if len(missing) < len(work.blocks):
        say(f"{work.name}: {len(work.blocks) - len(missing):,} of {len(work.blocks):,} blocks are done already")
    rows = sum(block.num_rows for block in missing)
    progress = PassProgress(work.name, rows, None, num_actors=1, threads=threads, use_gpu=False)
    if missing:
        actor = BlockActor(
            blocks={block.number: block for block in missing},
            columns=work.columns,
            keep=work.keep,
            outputs=work.outputs,
            actor=work.actor,
            arguments=work.arguments,
            threads=threads,
        )
        for block in missing:
            leave_if_asked()
            (done,) = actor(pa.table({"number": [block.number]})).to_pylist()
            progress.add(done)
    progress.end()
    for folder in folders:
        remove_temporaries(folder)
        shutil.rmtree(folder / BEGUN, ignore_errors=True)
    return {target: checked(work, output) | progress.figures() for target, output in work.outputs.items()}
