"""How long stages take on several GPUs: what waits for the longest answer of a step, and what goes over the network.

B rows of a step, D d_in, S d_sae, K active latents, n GPUs, m nodes of 8. Arithmetic alone; every constant has its source beside it.
"""

import functools
import heapq
import random

from sarm.settings.sae import SaeSettings

GPUS_A_NODE = 8
# Bytes a second of one GPU in an all-reduce within a node, and of a node to the others. H100 SXM: 900 GB/s of NVLink in both directions,
# of which NCCL's all-reduce reaches about two thirds in one; 400 Gbit/s a node, the least that clouds put beside eight H100.
NVLINK, NETWORK = 300e9, 50e9
# Of the memory's bandwidth, what gathers of rows of 16 KB reach.
BANDWIDTH_SHARE = 0.8
# Standard deviation of the logarithm of a pair's tokens. An assumption, fitted to no data set: eight pairs on eight GPUs then keep 59 % of them
# busy, as in a finer simulation of steps whose lengths were drawn too.
SPREAD_OF_LENGTHS = 0.42
_STEPS_SIMULATED = 400


@functools.cache
def busy_share(batch_pairs: int, workers: int) -> float:
    """The share of the workers that is at work in a step of reward training, whose pairs are dealt out by tokens, the longest first.

    All wait for the worker with the most tokens. A pair is not divided, so more workers than pairs have nothing to do. Padding is not counted.
    """
    if workers == 1:
        return 1.0
    draw = random.Random(0)
    done = waited = 0.0
    for _ in range(_STEPS_SIMULATED):
        lengths = sorted((draw.lognormvariate(0.0, SPREAD_OF_LENGTHS) for _ in range(batch_pairs)), reverse=True)
        loads = [0.0] * workers
        for length in lengths:
            heapq.heapreplace(loads, loads[0] + length)
        done, waited = done + sum(lengths), waited + workers * max(loads)
    return done / waited


def all_reduce_seconds(num_bytes: float, gpus: int, network: float = NETWORK) -> float:
    """Of one all-reduce of so many bytes: a ring within each node, and one between nodes.

    A ring of n sends every byte 2 (n - 1) / n times over each link.
    """
    within, nodes = min(gpus, GPUS_A_NODE), -(-gpus // GPUS_A_NODE)
    inside = 2 * (within - 1) / within * num_bytes / NVLINK
    between = 2 * (nodes - 1) / nodes * num_bytes / network
    return inside + between


def network_bytes(num_bytes: float, gpus: int) -> float:
    """What each node sends to others in one all-reduce."""
    nodes = -(-gpus // GPUS_A_NODE)
    return 2 * (nodes - 1) / nodes * num_bytes


def sae_gradient_bytes(d_in: int, d_sae: int) -> float:
    """Both weight gradients of an SAE in float32: 2.15 GB at 4,096 x 65,536."""
    return 2.0 * 4 * d_in * d_sae


def reward_gradient_bytes(weights: int, precision: str) -> float:
    """The gradients of the blocks, reduced once a step, in the dtype of their products."""
    return weights * (2.0 if precision == "bfloat16" else 4.0)


def sae_step_seconds(
    d_in: int, sae: SaeSettings, rows: float, peak: float, peak_share: float, bandwidth: float
) -> float:
    """Of one SAE's step on one GPU that has `rows` of the batch.

    The encoder is one product of all rows with all latents (2 B D S FLOPs, K times for matching pursuit) at the 16-bit peak. Its codes are sparse: each of four products
    gathers B K rows of D float32. Adam goes over both matrices: weights, two moments and gradients, each read, and all but the gradients
    written. AuxK adds 6 B D A FLOPs for A latents.
    """
    flops = 2.0 * rows * d_in * sae.d_sae * sae.encoder_passes + 6.0 * rows * d_in * sae.aux_k
    gathered = 4 * rows * sae.k * d_in * 4.0
    adam = 2.0 * d_in * sae.d_sae * 4 * (4 + 3)
    return flops / (peak * peak_share) + (gathered + adam) / (bandwidth * BANDWIDTH_SHARE)
