"""What a node tells of its GPUs."""

from typing import NamedTuple


class Card(NamedTuple):
    """A GPU of a node as a worker there sees it, and what it lacks."""

    node: str
    names: tuple[str, ...]
    """Of all cards of the node."""
    memory_gb: float
    """Of the smallest of them."""
    driver: str
    build: str
    """torch's version, with that of its CUDA."""
    has_nccl: bool
    attention: str
    sae_backend: str
    notes: tuple[str, ...] = ()
    refusal: str = ""
