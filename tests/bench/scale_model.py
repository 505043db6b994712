"""Simulates the papers' largest run on 1 to 64 GPUs: blocks dealt to actors, synchronous steps, nodes that are lost on the way.

Nothing here runs on a GPU. What an item costs is the arithmetic of the dry runs (`sarm.stages.dry_run`); what is simulated is what arithmetic
alone leaves out: blocks of unlike size, steps that wait for their longest answers, starts, losses and what has to be done again.
"""

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sarm.stages.dry_run.scaling import GPUS_A_NODE, NETWORK, all_reduce_seconds, network_bytes


@dataclass(frozen=True)
class Machines:
    """A cluster of alike nodes and how it fails."""

    gpus: int
    start_seconds: float = 40.0
    """From nothing to the first item: processes, imports, the model's weights."""
    detect_seconds: float = 30.0
    """From the loss of a node until the others know."""
    replace_seconds: float = 240.0
    """Until another node is there in its place."""
    network: float = NETWORK
    """Bytes a second of a node."""

    @property
    def nodes(self) -> int:
        return -(-self.gpus // GPUS_A_NODE)


class Outcome(NamedTuple):
    """What a stage came to."""

    seconds: float
    items_a_second: float
    idle_share: float
    """Of the GPUs' time: waiting for others, for the network, starting, or gone."""
    redone_share: float
    """Of the work that was done: work that was lost and done again."""
    network_gb: float
    """Sent by each node to others."""
    recovery_seconds: float
    """That the losses together took."""


def pass_over_blocks(blocks: Sequence[float], machines: Machines, losses: Sequence[float] = ()) -> Outcome:
    """Extraction: each GPU takes the next block when it is free. At each time of `losses` the node of one more number is lost, the first first.

    `blocks` are the seconds that they take of one GPU. A lost node's blocks in work are done again, by whoever is free; the node comes back.
    """
    return _pass(
        blocks, machines, losses, without=_pass(blocks, machines, (), without=None).seconds if losses else None
    )


def _pass(blocks: Sequence[float], machines: Machines, losses: Sequence[float], without: float | None) -> Outcome:
    waiting = list(reversed(blocks))
    # (when it is free, GPU); each has its block in work and when that began.
    free = [(machines.start_seconds, gpu) for gpu in range(machines.gpus)]
    heapq.heapify(free)
    work: dict[int, tuple[float, float, float]] = {}
    lost, ended, redone = sorted(losses), 0.0, 0.0
    num_lost = 0
    while free:
        now, gpu = heapq.heappop(free)
        if lost and lost[0] <= now:
            at, node = lost.pop(0), num_lost % machines.nodes
            num_lost += 1
            heapq.heappush(free, (now, gpu))
            back = at + machines.detect_seconds + machines.replace_seconds + machines.start_seconds
            for one in range(node * GPUS_A_NODE, min(machines.gpus, (node + 1) * GPUS_A_NODE)):
                if one in work and work[one][1] > at:
                    began, _, seconds = work.pop(one)
                    redone += max(0.0, at - began)
                    waiting.append(seconds)
                free = [entry for entry in free if entry[1] != one] + [(back, one)]
            heapq.heapify(free)
            continue
        work.pop(gpu, None)
        if not waiting:
            continue
        seconds = waiting.pop()
        work[gpu] = (now, now + seconds, seconds)
        ended = max(end for _, end, _ in work.values())
        heapq.heappush(free, (now + seconds, gpu))
    useful = sum(blocks)
    total = ended * machines.gpus
    return Outcome(
        seconds=ended,
        items_a_second=len(blocks) / ended,
        idle_share=1 - (useful + redone) / total,
        redone_share=redone / (useful + redone),
        network_gb=0.0,
        recovery_seconds=0.0 if without is None else ended - without,
    )


class Step(NamedTuple):
    """A synchronous step: seconds of the slowest GPU, of all GPUs together, and bytes that are reduced over all."""

    slowest: float
    work: float
    reduced_bytes: float


def training(
    steps: Sequence[Step], machines: Machines, losses: Sequence[float] = (), checkpoint_seconds: float = 300.0
) -> Outcome:
    """A training: all GPUs wait for the slowest and for the network. A node that is lost ends all workers, which start again from the last state."""
    clock, done, saved, saved_at = machines.start_seconds, 0, 0, machines.start_seconds
    lost, redone, useful, sent, recovery = sorted(losses), 0.0, 0.0, 0.0, 0.0
    began: dict[int, float] = {}
    while done < len(steps):
        step = steps[done]
        took = step.slowest + all_reduce_seconds(step.reduced_bytes, machines.gpus, machines.network)
        if lost and lost[0] < clock + took:
            at = max(lost.pop(0), clock)
            redone += sum(one.work for one in steps[saved:done])
            useful -= sum(one.work for one in steps[saved:done])
            again = at + machines.detect_seconds + machines.replace_seconds + machines.start_seconds
            recovery += again - began.get(saved, machines.start_seconds)
            clock, done, saved_at = again, saved, again
            continue
        began[done] = clock
        clock, done = clock + took, done + 1
        useful, sent = useful + step.work, sent + network_bytes(step.reduced_bytes, machines.gpus)
        if clock - saved_at >= checkpoint_seconds:
            saved, saved_at = done, clock
    return Outcome(
        seconds=clock,
        items_a_second=len(steps) / clock,
        idle_share=1 - (useful + redone) / (clock * machines.gpus),
        redone_share=redone / max(1e-12, useful + redone),
        network_gb=sent / 1e9,
        recovery_seconds=recovery,
    )


def block_seconds(
    tokens: float, block_tokens: float, seconds_a_token: float, spread: float, seed: int = 0
) -> list[float]:
    """Blocks of so many tokens; what one takes varies by `spread` (standard deviation of its logarithm), since texts are of unlike length."""
    draw, count = random.Random(seed), max(1, round(tokens / block_tokens))
    return [block_tokens * seconds_a_token * draw.lognormvariate(-spread * spread / 2, spread) for _ in range(count)]


def reward_steps(
    num_steps: int,
    batch_pairs: int,
    gpus: int,
    seconds_a_pair: float,
    spread: float,
    reduced_bytes: float,
    seed: int = 0,
) -> Iterator[Step]:
    """Steps of reward training: pairs of unlike length, dealt to the GPU with the fewest tokens, the longest first."""
    draw = random.Random(seed)
    for _ in range(num_steps):
        pairs = sorted((seconds_a_pair * draw.lognormvariate(-spread * spread / 2, spread) for _ in range(batch_pairs)), reverse=True)  # fmt: skip
        loads = [0.0] * gpus
        for seconds in pairs:
            heapq.heapreplace(loads, loads[0] + seconds)
        yield Step(max(loads), sum(pairs), reduced_bytes)
