"""A look at the devices of a run before it works on them: what they are, for the terminal and MLflow, and whether they can be used at all."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

from sarm.engine.ray.card import Card
from sarm.engine.ray.room import Cluster
from sarm.engine.terminal import say
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings

# A GPU that another job holds is not waited for.
_SECONDS_OF_A_LOOK = 120.0


class Look(NamedTuple):
    """What a run's devices are: a line for the terminal, further lines on what slows them, tags for MLflow."""

    line: str
    notes: tuple[str, ...]
    tags: dict[str, str]


def look_at_devices(cluster: Cluster, run: RunSettings) -> Look:
    """What the run will work on.

    Raises UserError for GPUs that cannot be used: torch without CUDA or without kernels for the card, a driver too old, no NCCL for several workers.
    """
    if not cluster.use_gpu:
        return on_cpu(cluster)
    if not cluster.num_gpus:
        return Look("runs on GPUs that the cluster has yet to bring: not looked at", (), {"device": "GPU"})
    cards = _cards()
    if not cards:
        return Look(f"runs on {cluster.num_gpus} GPUs, which other work holds: not looked at", (), {"device": "GPU"})
    if reason := why_refused(cards, cluster.workers(run, run.num_workers)):
        raise UserError(reason)
    return on_cards(cards, cluster)


def tell(look: Look) -> None:
    """Print what the run works on."""
    say(look.line)
    for note in look.notes:
        say(f"note: {note}")


def on_cpu(cluster: Cluster) -> Look:
    """What is said of a run without GPUs; loads nothing."""
    build = version("torch")
    nodes = f" on {cluster.num_nodes} nodes" if cluster.num_nodes > 1 else ""
    tags = {"device": "CPU", "torch": build, "attention": "SDPA", "sae_backend": "PyTorch's kernels"}
    return Look(f"runs on {cluster.num_cpus} CPU cores{nodes}, torch {build}", (), tags)


def on_cards(cards: Sequence[Card], cluster: Cluster) -> Look:
    """What is said of a run on GPUs."""
    kinds = Counter(name for card in cards for name in card.names)
    names = ", ".join(f"{number} x {name}" for name, number in sorted(kinds.items()))
    first = cards[0]
    memory = min(card.memory_gb for card in cards)
    several = {
        "driver": sorted({card.driver for card in cards}),
        "torch": sorted({card.build for card in cards}),
        "attention": sorted({card.attention for card in cards}),
        "sae_backend": sorted({card.sae_backend for card in cards}),
    }
    tags = {"device": names, **{name: ", ".join(values) for name, values in several.items()}}
    nodes = f" on {len(cards)} nodes" if len(cards) > 1 else ""
    line = (
        f"runs on {names} of {memory:.0f} GB{nodes}, driver {tags['driver'] or 'not known'}, torch {tags['torch']}; "
        f"attention by {tags['attention']}, the SAE by {tags['sae_backend']}"
    )
    notes = list(dict.fromkeys(note for card in cards for note in card.notes))
    if len(kinds) > 1:
        notes.append(
            f"mixed cards ({names}): the slowest sets the pace of trainings, and the smallest the budgets. Give a run one kind of card."
        )
    for name in ("driver", "torch"):
        if len(several[name]) > 1:
            notes.append(f"the nodes differ in {name} ({tags[name]}). Give all nodes one image.")
    if cluster.num_gpus != (seen := sum(kinds.values())) and first.driver:
        notes.append(f"Ray counts {cluster.num_gpus} GPUs and the drivers show {seen}: the others are not used.")
    return Look(line, tuple(notes), tags)


def why_refused(cards: Sequence[Card], num_workers: int) -> str:
    """What no work can start with, and what to install; '' if nothing."""
    for card in cards:
        if card.refusal:
            return f"{card.node}: {card.refusal}"
    without = sorted(card.node for card in cards if not card.has_nccl)
    if without and num_workers > 1:
        return f"torch {cards[0].build} on {', '.join(without)} is built without NCCL, over which {num_workers} workers talk. Install torch's CUDA build for Linux, or pass --num-workers 1."
    return ""


def _cards() -> list[Card]:
    """A look at one GPU of each node that has any; nodes whose GPUs are all held are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from sarm.engine.ray.device import card_here

    # A share of a GPU is enough to see it.
    looks = ray.remote(num_cpus=0, num_gpus=0.01, max_retries=0)(card_here)
    asked = [
        looks.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            node["NodeManagerAddress"]
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) > 0
    ]
    done, held = ray.wait(asked, num_returns=len(asked), timeout=_SECONDS_OF_A_LOOK)
    for one in held:
        with contextlib.suppress(ValueError):
            ray.cancel(one)
    return sorted(ray.get(done))
