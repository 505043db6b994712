"""How prompts become steps, and a step the micro-batches of every rank."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sarm.data.tokens.groups import PromptGroup, split_group
from sarm.data.tokens.packing import Row, padded_tokens


class MicroBatch(NamedTuple):
    """Whole groups whose rows fit one forward and backward pass."""

    groups: list[PromptGroup]
    rows: list[Row]


def cut_into_steps(groups: Sequence[PromptGroup], batch_pairs: int, seed: int, epoch: int) -> list[list[PromptGroup]]:
    """Groups in random order, cut so that a step holds at most `batch_pairs` pairs (more only if one prompt has more)."""
    steps: list[list[PromptGroup]] = []
    room = 0
    for index in np.random.default_rng([seed, epoch]).permutation(len(groups)):
        group = groups[index]
        if not steps or len(group.pairs) > room:
            steps.append([])
            room = batch_pairs
        steps[-1].append(group)
        room -= len(group.pairs)
    return steps


def deal(step: Sequence[PromptGroup], world: int, row_tokens: int, batch_tokens: int) -> list[list[MicroBatch]]:
    """The step as micro-batches of at most `batch_tokens` tokens for each rank, as many on every rank: collectives must meet.

    Ranks that run out of work repeat a micro-batch with its pairs left out, which adds nothing to the gradient.
    """
    parts = [part for group in step for part in split_group(group, row_tokens, batch_tokens)]
    packed = [MicroBatch([part], part.rows(row_tokens)) for part in parts]
    micros: list[MicroBatch] = []
    for item in sorted(packed, key=lambda m: sum(len(row.ids) for row in m.rows), reverse=True):
        for i, micro in enumerate(micros):
            if padded_tokens(micro.rows + item.rows) <= batch_tokens:
                micros[i] = MicroBatch(micro.groups + item.groups, micro.rows + item.rows)
                break
        else:
            micros.append(item)
    idle = MicroBatch([g._replace(pairs=[]) for g in micros[-1].groups], micros[-1].rows)
    micros += [idle] * (-len(micros) % world)
    return [micros[rank::world] for rank in range(world)]
