"""A pass in this process, without a cluster."""

import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from sarm.data.store.parts import has_part
from sarm.engine.passes import Counts, Pass, checked
from sarm.engine.ray.block_actor import BlockActor


def run_alone(work: Pass, *, shuffled: bool = True, before_block: Callable[[Any], None] = lambda _: None) -> Counts:
    """As `run_over` with one actor, which gets the blocks that are not done in another order; `before_block` hears of each."""
    folders = [output.folder for output in work.outputs.values()]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    missing = [b for b in work.blocks if not all(has_part(folder, b.number) for folder in folders)]
    if missing:
        blocks = {block.number: block for block in missing}
        actor = BlockActor(blocks, work.columns, work.keep, work.outputs, work.actor, work.arguments, 1)
        for block in random.Random(0).sample(missing, len(missing)) if shuffled else missing:
            before_block(block)
            actor(pa.table({"number": [block.number]}))
    for folder in folders:
        if (folder / "begun").exists():
            (folder / "begun").rmdir()
    return {target: checked(work, output) for target, output in work.outputs.items()}
