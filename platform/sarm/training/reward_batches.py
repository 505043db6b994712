"""How prompts become steps, and a step the micro-batches of every rank.

Ranks meet after every micro-batch (ZeRO 2 and 3 exchange gradients or weights in it), so a step takes as long as the largest micro-batch
of each round. Rounds are as few as the budget allows, and tokens are spread evenly over the micro-batches of all rounds.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sarm.data.tokens.groups import PromptGroup, split_group
from sarm.data.tokens.packing import Row, padded_tokens
from sarm.data.tokens.stored_groups import pair_counts
from sarm.settings.reward import PAIRS_A_WORKER, RewardSettings, too_few_pairs

# Of the emptiest micro-batches, those that a prompt is tried in.
_TRIED = 4
# Steps that are dealt to see how long ranks wait.
_LOOKED_AT = 8


class MicroBatch(NamedTuple):
    """Groups, or parts of them, whose rows fit one forward and backward pass of so many tokens, padding included."""

    groups: list[PromptGroup]
    rows: list[Row]
    tokens: int


def cut_into_steps(groups: Sequence[PromptGroup], batch_pairs: int, seed: int, epoch: int) -> list[list[PromptGroup]]:
    """The groups of each step, as `step_places` cuts them."""
    places = step_places([len(group.pairs) for group in groups], batch_pairs, seed, epoch)
    return [[groups[place] for place in step] for step in places]


def step_places(num_pairs: Sequence[int], batch_pairs: int, seed: int, epoch: int) -> list[list[int]]:
    """The groups of each step by their places; `num_pairs` are theirs.

    They come in random order, cut so that a step holds at most `batch_pairs` pairs (more only if one prompt has more).
    """
    steps: list[list[int]] = []
    room = 0
    for place in np.random.default_rng([seed, epoch]).permutation(len(num_pairs)).tolist():
        if not steps or num_pairs[place] > room:
            steps.append([])
            room = batch_pairs
        steps[-1].append(place)
        room -= num_pairs[place]
    return steps


def deal(step: Sequence[PromptGroup], world: int, row_tokens: int, batch_tokens: int) -> list[list[MicroBatch]]:
    """The step as micro-batches of at most `batch_tokens` tokens for each rank, as many on every rank: collectives must meet.

    A prompt with more tokens than a rank's share is cut further where that makes the step shorter, though its parts repeat the prompt.
    Ranks without work in the last round run the step's shortest row with no pairs, which adds nothing to the gradient.
    """
    rounds = _rounds(_parts(step, row_tokens, batch_tokens), world, batch_tokens)
    share = math.ceil(sum(micro.tokens for each in rounds for micro in each) / (len(rounds) * world))
    if world > 1 and rounds[0][0].tokens > share:
        finer = _rounds(_parts(step, row_tokens, min(share, batch_tokens)), world, batch_tokens)
        rounds = min(rounds, finer, key=lambda found: sum(each[0].tokens for each in found))
    shortest = min((row for each in rounds for micro in each for row in micro.rows), key=lambda row: len(row.ids))
    idle = MicroBatch([], [shortest], len(shortest.ids))
    whole = [each + [idle] * (world - len(each)) for each in rounds]
    # Every other round the other way round: where ranks meet after the last round alone, their sums are as even.
    return [[each[rank if turn % 2 == 0 else -1 - rank] for turn, each in enumerate(whole)] for rank in range(world)]


def busy_share(dealt: Sequence[Sequence[MicroBatch]]) -> float:
    """Tokens of a dealt step over what its ranks could have run meanwhile, padding included in both: 1 if nobody waits."""
    longest = sum(max(micro.tokens for micro in each) for each in zip(*dealt, strict=True))
    return sum(micro.tokens for share in dealt for micro in share if micro.groups) / float(len(dealt) * longest)


def who_waits(groups: Sequence[PromptGroup], config: RewardSettings, seed: int, world: int, row_tokens: int) -> str:
    """What to say before the first step where a step has too few pairs for its ranks; '' where it has enough."""
    if not (begin := too_few_pairs(config.batch_pairs, world)):
        return ""
    steps = step_places(pair_counts(groups), config.batch_pairs, seed, 0)[:_LOOKED_AT]
    shares = [busy_share(deal([groups[i] for i in step], world, row_tokens, config.batch_tokens)) for step in steps]
    return (
        f"{begin}: the first {len(steps)} steps keep them busy for {sum(shares) / len(shares):.0%} of the time, padding counted as work. Pass --num-workers "
        f"{max(1, config.batch_pairs // PAIRS_A_WORKER)}, or a larger --reward.batch-pairs, which trains with fewer steps."
    )


def _parts(step: Sequence[PromptGroup], row_tokens: int, limit: int) -> list[MicroBatch]:
    """The step's groups, largest first; those of more than `limit` tokens cut as far as their pairs allow."""
    parts = [part for group in step for part in split_group(group, row_tokens, limit)]
    packed = [MicroBatch([part], rows, padded_tokens(rows)) for part in parts for rows in (part.rows(row_tokens),)]
    return sorted(packed, key=lambda micro: micro.tokens, reverse=True)


def _rounds(parts: Sequence[MicroBatch], world: int, batch_tokens: int) -> list[list[MicroBatch]]:
    """Micro-batches round by round, `world` in each but the last; those of a round are about as large as each other."""
    fewest = math.ceil(sum(part.tokens for part in parts) / (world * batch_tokens))
    num_rounds = min(fewest, math.ceil(len(parts) / world))
    while (micros := _balanced(parts, num_rounds * world, batch_tokens)) is None:
        num_rounds += 1
    micros.sort(key=lambda micro: micro.tokens, reverse=True)
    return [micros[first : first + world] for first in range(0, len(micros), world)]


def _balanced(parts: Sequence[MicroBatch], num_micros: int, batch_tokens: int) -> list[MicroBatch] | None:
    """The parts, largest first, in so many micro-batches, each in the one of the emptiest where it pads least; None if they do not fit."""
    micros = list(parts[:num_micros])
    for part in parts[num_micros:]:
        best, place = None, -1
        for tried in heapq.nsmallest(_TRIED, range(len(micros)), key=lambda index: micros[index].tokens):
            rows = micros[tried].rows + part.rows
            # Padding only adds to them.
            if best is None or sum(len(row.ids) for row in rows) < best.tokens:
                grown = MicroBatch(micros[tried].groups + part.groups, rows, padded_tokens(rows))
                if best is None or grown.tokens < best.tokens:
                    best, place = grown, tried
        if best is None or best.tokens > batch_tokens:
            return None
        micros[place] = best
    return micros
