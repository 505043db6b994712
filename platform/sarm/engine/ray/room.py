"""What fits on the nodes of a cluster, and waiting for nodes that an autoscaler brings."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sarm.engine.stopping import leave_if_asked
from sarm.engine.terminal import say
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings

_LOOK_SECONDS, _SAY_SECONDS = 2.0, 30.0


class Node(NamedTuple):
    """What one machine gives to workers."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Cluster:
    """What the workers of a run may use."""

    nodes: tuple[Node, ...]
    is_local: bool
    gpus_wanted: Literal["auto", "yes", "no"] = "auto"
    """`--use-gpu`."""

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @property
    def num_cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def num_gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    @property
    def use_gpu(self) -> bool:
        """Whether workers and actors take a GPU each."""
        return self.gpus_wanted == "yes" or (self.gpus_wanted == "auto" and self.num_gpus > 0)

    def workers(self, run: RunSettings, asked: int) -> int:
        """How many workers or actors a run has: those asked for, else (0) one for each GPU that has cores beside it, or for each node without GPUs.

        A node of under half the cores of the largest has none: it would slow the others down.
        """
        if asked:
            return asked
        if self.use_gpu:
            return max(1, self.places(run.cpus_per_worker or 1))
        most = max((node.cpus for node in self.nodes), default=0)
        return max(1, sum(node.cpus > 0 and 2 * node.cpus >= most for node in self.nodes))

    def cpus_each(self, run: RunSettings, count: int) -> int:
        """Cores of each of `count` workers or actors, each of which is on one node: the most that all of them can have.

        Raises UserError if they do not fit the cluster, with what would.
        """
        if reason := self.why_no_room(run, count):
            raise UserError(reason)
        if run.cpus_per_worker:
            return run.cpus_per_worker
        most = max(node.cpus for node in self.nodes)
        return next((each for each in range(most, 1, -1) if self.places(each) >= count), 1)

    def places(self, each: int) -> int:
        """How many workers of so many cores, and a GPU where GPUs are used, fit the nodes; on a joined cluster beside one core for light tasks."""
        fits = [self._fits(node, each) for node in self.nodes]
        if self.is_local or self.num_cpus <= 1:
            return sum(fits)
        # That core is taken where it costs least.
        return sum(fits) - min(
            fit - self._fits(node._replace(cpus=node.cpus - 1), each)
            for node, fit in zip(self.nodes, fits, strict=True)
            if node.cpus > 0
        )

    def check_room(self, run: RunSettings, asked: Iterable[int]) -> None:
        """Raise UserError if any of these numbers of workers does not fit, unless the run waits for nodes that are yet to come."""
        reasons = (self.why_no_room(run, self.workers(run, count)) for count in asked)
        if not run.wait_for_nodes and (reason := next(filter(None, reasons), "")):
            raise UserError(reason)

    def why_no_room(self, run: RunSettings, count: int) -> str:
        """Why `count` workers do not fit, with what would; '' if they do."""
        each = run.cpus_per_worker or 1
        # The only core of a cluster does both.
        if self.places(each) >= count:
            return ""
        grows = (
            ""
            if self.is_local or run.wait_for_nodes
            else " If its autoscaler brings nodes, pass --wait-for-nodes SECONDS"
        )
        if self.use_gpu and self.num_gpus < count:
            grows = grows and f"{grows} and --use-gpu yes."
            return f"{count} workers need a GPU each, the cluster has {self.num_gpus}. Pass --num-workers and --num-actors, or --use-gpu no.{grows}"
        grows = grows and f"{grows}."
        if count * each < max(1, self.num_cpus):
            shapes = ", ".join(f"{node.cpus} CPUs" + (f" and {node.gpus} GPUs" if self.use_gpu else "") for node in self.nodes)  # fmt: skip
            return f"{count} workers of {each} cores{' and a GPU' if self.use_gpu else ''} do not fit the cluster's nodes, each on one: {shapes}. Pass a smaller --cpus-per-worker, fewer workers, or larger nodes.{grows}"
        return f"{count} workers of {each} cores and one spare core need {count * each + 1} CPUs, the cluster has {self.num_cpus}. Pass a smaller --cpus-per-worker, or a larger cluster.{grows}"

    def _fits(self, node: Node, each: int) -> int:
        fit = max(0, node.cpus) // each
        return min(fit, node.gpus) if self.use_gpu else fit


def with_room(
    cluster: Cluster,
    run: RunSettings,
    asked: int,
    look: Callable[[], Cluster],
    ask: Callable[[list[dict[str, float]]], None],
) -> Cluster:
    """The cluster once the workers `asked` for fit it (0: as many as it has room for, and one at least).

    Its autoscaler is asked for what they need, and waited for, `run.wait_for_nodes` at most. A cluster that is the job's own, or that is not waited for, is returned as it is. `look` and `ask` see the cluster and talk to its
    autoscaler. Raises UserError if the time is over.
    """
    count = max(1, asked)
    if cluster.is_local or not run.wait_for_nodes or not cluster.why_no_room(run, count):
        return cluster
    one = {"CPU": float(run.cpus_per_worker or 1), **({"GPU": 1.0} if cluster.use_gpu else {})}
    # One core more, for light tasks.
    ask([one] * count + [{"CPU": 1.0}])
    kind = f"{one['CPU']:.0f} CPUs{' and a GPU' if cluster.use_gpu else ''}"
    started, said = time.monotonic(), float("-inf")
    try:
        while (now := look()).why_no_room(run, count):
            leave_if_asked()
            waited = time.monotonic() - started
            if waited >= run.wait_for_nodes:
                raise UserError(
                    f"after {waited:.0f} s the cluster still has no room: {now.why_no_room(run, count)} Look at `ray status`, or pass a longer --wait-for-nodes."
                )
            if waited - said >= _SAY_SECONDS:
                said = waited
                say(
                    f"waiting for nodes: {count} workers of {kind} each; there are {now.num_nodes} nodes with {now.num_cpus} CPUs and {now.num_gpus} GPUs"
                    f" ({run.wait_for_nodes - waited:.0f} s left)"
                )
            time.sleep(min(_LOOK_SECONDS, run.wait_for_nodes / 10))
    finally:
        # The workers themselves hold their nodes; what was asked for here would hold them after the job.
        ask([])
    return now
