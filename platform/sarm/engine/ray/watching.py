"""Watches a pass from the driver: what its actors say of blocks, and signs of life where they say nothing.

Until the first block is begun, nodes boot, environments are unpacked and models are loaded, which may take many minutes. So standing still is
measured from the first block; before it, a much longer limit holds, and every sign of a start begins it anew.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from sarm.data.store.blocks import Block
from sarm.engine.ray.loading import LOADING
from sarm.settings.checks import StalledError

_POLL_SECONDS = 5.0


class Limits(NamedTuple):
    """Seconds without a sign of life after which a pass ends."""

    stall: float
    """From the first block on, and where the cluster has no room for the actors."""
    start: float
    """Until the first block is begun."""


class Watched(NamedTuple):
    """A pass as its watch sees it."""

    name: str
    blocks: Sequence[Block]
    signs: Path
    """Folder of the journals of blocks that were begun, and of the signs of actors that load."""
    num_actors: int
    threads: int
    """Cores of each actor."""
    use_gpu: bool


def watched(results: Callable[[], Iterable[dict[str, Any]]], work: Watched, limits: Limits) -> Iterator[dict[str, Any]]:
    """What the actors say of each block that they have done. Raises StalledError if there is no sign of life for too long."""
    said: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def listen() -> None:
        try:
            for row in results():
                said.put(row)
            said.put(None)
        except BaseException as error:
            said.put(error)

    threading.Thread(target=listen, daemon=True).start()
    signs, last, has_begun = _signs(work.signs), time.monotonic(), False
    # Of blocks that an earlier run left.
    old = _journals(signs)
    while True:
        try:
            found = said.get(timeout=min(_POLL_SECONDS, limits.stall / 4))
        except queue.Empty:
            now = _signs(work.signs)
            has_begun = has_begun or _journals(now) != old
            if now != signs:
                signs, last = now, time.monotonic()
                continue
            seconds = limits.stall if has_begun or _places(work) < work.num_actors else limits.start
            if time.monotonic() - last > seconds:
                raise StalledError(_reason(work, seconds, _journals(now))) from None
            continue
        last, has_begun = time.monotonic(), True
        if found is None:
            return
        if isinstance(found, BaseException):
            raise found
        yield found


def _signs(folder: Path) -> dict[str, str]:
    """Everything that changes while the pass gets anywhere: journals, signs of loading, nodes that join."""
    found = {"": str(sum(node["Alive"] for node in ray.nodes()))}
    for path in folder.glob("*.json"):
        try:
            found[path.stem] = path.read_text()
        except FileNotFoundError:
            continue  # its block has just been done
    return found


def _journals(signs: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in signs.items() if name and not name.startswith(LOADING)}


def _places(work: Watched) -> int:
    """How many of the actors the nodes that are alive could hold."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(int(node.get("CPU", 0)) // work.threads, int(node.get("GPU", 0)) if work.use_gpu else work.num_actors)
        for node in nodes
    )


def _reason(work: Watched, seconds: float, journals: Mapping[str, str]) -> str:
    """Why nothing happens, as far as the cluster and the journals show it."""
    places = _places(work)
    head = f"{work.name}: nothing has happened for {seconds:.0f} s"
    if places < work.num_actors:
        each = f"{work.threads} CPUs{' and a GPU' if work.use_gpu else ''}"
        nodes = sum(node["Alive"] for node in ray.nodes())
        return (
            f"{head}: {work.num_actors} actors of {each} were asked for and the {nodes} nodes that are left have room for {places}. "
            f"Add nodes, or pass --num-actors {max(1, places)}"
        )
    if journals:
        number, state = sorted(journals.items())[0]
        where = json.loads(state)
        block = next((b for b in work.blocks if b.number == int(number)), number)
        return f"{head}: {block} was begun by process {where['pid']} on {where['host']}, which says nothing any more. Look at that process"
    return f"{head}: {work.num_actors} actors were asked for and none has begun a block: they are still starting or loading the model, and neither compute nor read"
