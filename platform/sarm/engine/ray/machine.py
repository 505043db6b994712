"""What a run would run on, this machine or the cluster that it names, and the speed that its plan assumes."""

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from sarm.settings.budget import Device
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings

# The share of a GPU's dense peak that matrix products of this kind are assumed to reach.
PEAK_SHARE = 0.4
# bfloat16 on tensor cores, and float32, in FLOP/s; the makers' figures without sparsity.
PEAKS = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10G": (70e12, 31e12),
    "L4": (121e12, 30e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}
# Bytes a second of their memory, by the makers too.
BANDWIDTHS = {
    "B200": 8.0e12,
    "H200": 4.8e12,
    "H100": 3.35e12,
    "A100": 2.04e12,
    "L40S": 0.864e12,
    "A10G": 0.6e12,
    "L4": 0.3e12,
    "V100": 0.9e12,
    "T4": 0.32e12,
}
# Of their smallest variant, in GB of 1e9 bytes, as the driver counts them.
MEMORIES = {
    "B200": 191.0,
    "H200": 150.0,
    "H100": 85.0,
    "A100": 42.0,
    "L40S": 48.0,
    "A10G": 24.0,
    "L4": 24.0,
    "V100": 17.0,
    "T4": 16.0,
}
_WITHOUT_BFLOAT16 = ("V100", "T4")
REFERENCE_GPU = "H100"
# Measured with SmolLM2 at 15 blocks on an AMD EPYC: what a core reaches in forward passes, and in training.
CORE_FORWARD, CORE_TRAINING = 60e9, 45e9
_PROBE_SECONDS = 3.0


class Machine(NamedTuple):
    """Cores and GPUs of a machine or cluster."""

    cores: int
    num_gpus: int = 0
    gpu: str = ""
    """Model of the GPUs, a key of `PEAKS`; empty if it is not known."""
    where: str = "this machine"
    is_joined: bool = False
    """Whether it is a running cluster, of which one core is left to its controllers."""
    measured_forward: float | None = None
    """FLOP/s of one actor in forward passes, if that was measured."""
    note: str = ""
    num_nodes: int = 1
    gpu_memory_gb: float = 0.0
    """Of the smallest GPU, if it is known."""

    @property
    def planned_gpu(self) -> str:
        """The GPU that GPU-hours are of."""
        return self.gpu or REFERENCE_GPU

    def device(self, gpus_wanted: str) -> Device:
        """What budgets are worked out for: one GPU, or cores. `gpus_wanted` is `--use-gpu`; a GPU that has yet to come is taken for a small one."""
        if gpus_wanted == "no" or not (self.num_gpus or gpus_wanted == "yes"):
            return Device()
        known = self.gpu_memory_gb or MEMORIES.get(self.gpu, MEMORIES["L4"])
        return Device(known, has_bfloat16=self.gpu not in _WITHOUT_BFLOAT16)

    def gpu_rate(self, dtype: str) -> float:
        """FLOP/s that one GPU is assumed to reach in `bfloat16` or `float32`."""
        return PEAKS[self.planned_gpu][dtype != "bfloat16"] * PEAK_SHARE

    def core_rate(self, *, training: bool) -> float:
        """FLOP/s that one core is assumed to reach."""
        return CORE_TRAINING if training else CORE_FORWARD

    def workers(self, asked: int) -> int:
        """How many workers or actors a run has that asks for so many; 0: one for each GPU, or for each node without GPUs (`Cluster.workers`)."""
        return asked or self.num_gpus or self.num_nodes

    def rate(self, run: RunSettings, count: int, dtype: str, *, training: bool) -> float:
        """FLOP/s of `count` workers or actors of a run together, as many as there is room for."""
        count = self.workers(count)
        if self.num_gpus:
            count = min(count, self.num_gpus)
            one = self.gpu_rate(dtype)
        else:
            cores = max(1, self.cores - self.is_joined)
            each = min(run.cpus_per_worker or max(1, cores // count), cores)
            count = min(count, max(1, cores // each))
            one = each * self.core_rate(training=training)
        if self.measured_forward is not None:
            one = self.measured_forward * (CORE_TRAINING / CORE_FORWARD if training and not self.num_gpus else 1.0)
        return one * count

    def describe(self) -> str:
        """Where, with how many cores or GPUs, and at what rate; one line."""
        if self.num_gpus:
            named = self.gpu or f"GPUs of a kind that is not known here, planned as {REFERENCE_GPU}"
            rate = f"{self.num_gpus} {named}, {PEAK_SHARE:.0%} of the peak"
        else:
            rate = f"{self.cores} cores without a GPU, {CORE_FORWARD / 1e9:.0f} GFLOP/s a core forward, {CORE_TRAINING / 1e9:.0f} in training"
        basis = "measured here" if self.measured_forward is not None else "assumed"
        if self.measured_forward is not None:
            rate = f"{rate.split(',')[0]}, {self.measured_forward / 1e9:,.0f} GFLOP/s an actor forward"
        return f"{self.where}: {rate} ({basis})"


def machine_of(run: RunSettings) -> Machine:
    """The cluster at the run's address if it answers, else this machine; with a note where a cluster does not answer."""
    here = this_machine()
    address = run.submit or run.ray_address or os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return here
    if "://" in address and not address.startswith("ray://"):
        return here._replace(note=f"The cluster behind the dashboard {address} is not asked for its size.")
    if not _answers(address):
        return here._replace(note=f"No cluster answers at {address}: times are for this machine.")
    import ray

    from sarm.engine.ray.cluster import connect

    try:
        with connect(run):
            return cluster_machine(ray.cluster_resources(), f"the cluster at {address}")
    except (UserError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        return here._replace(note=f"The cluster at {address} cannot be asked ({reason}): times are for this machine.")


def cluster_machine(resources: Mapping[str, float], where: str) -> Machine:
    """A machine of Ray's resources, whose `accelerator_type:NAME` says which GPUs there are."""
    # Ray tells some by their memory too: `A100-80G`.
    kinds = [
        name.removeprefix("accelerator_type:").split("-")[0]
        for name in resources
        if name.startswith("accelerator_type:")
    ]
    known = [kind for kind in kinds if kind in PEAKS]
    # Of several kinds of GPUs the slowest counts, because the others would wait for it.
    gpu = min(known, key=lambda kind: PEAKS[kind][0], default="")
    is_large = any(name.startswith("accelerator_type:A100-80G") for name in resources)
    nodes = sum(name.startswith("node:") and name != "node:__internal_head__" for name in resources)
    return Machine(
        int(resources.get("CPU", 1)),
        int(resources.get("GPU", 0)),
        gpu,
        where,
        is_joined=True,
        num_nodes=max(1, nodes),
        gpu_memory_gb=85.0 if gpu == "A100" and is_large else MEMORIES.get(gpu, 0.0),
    )


def this_machine() -> Machine:
    """Cores that this process may use, and the GPUs that the driver shows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cards = _gpus()
    kinds = [kind for kind in PEAKS if any(kind in name for name, _ in cards)]
    memory_gb = min((memory_gb for _, memory_gb in cards), default=0.0)
    # The longest name that fits is taken, since `L4` is also in `L40S`.
    return Machine(cores, len(cards), max(kinds, key=len, default=""), gpu_memory_gb=memory_gb)


def _gpus() -> list[tuple[str, float]]:
    """Name and memory (GB) of each GPU that the driver shows; 0 where it does not say."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in told.stdout.splitlines() if line.strip()]
    return [(name.strip(), float(size) * 2**20 / 1e9 if size.strip().isdigit() else 0.0) for name, _, size in rows]


def _answers(address: str) -> bool:
    """Whether something listens there; Ray itself would try for much longer. `auto` is for Ray to find."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS):
            return True
    except (OSError, OverflowError):
        return False
