"""The GPU that Ray gave this process, and whether torch can use it."""

import shutil
import subprocess
import sys

import torch

from sarm.engine.ray.card import Card
from sarm.nn.device_facts import device_facts
from sarm.settings.checks import UserError


def check_gpu() -> None:
    """Raise UserError if Ray gave this process a GPU and torch sees none."""
    if reason := gpu_refusal():
        raise UserError(reason)


def gpu_refusal() -> str:
    """Why the GPU that Ray gave this process cannot be used: it would work on the CPU, and hold the GPU. '' if nothing is wrong."""
    # Where Ray is not loaded, it has started nothing and given nothing.
    ray = sys.modules.get("ray")
    given = ray.get_gpu_ids() if ray is not None else []
    if not given or torch.cuda.is_available():
        return ""
    return why_unusable(torch.__version__, torch.version.cuda, _driver(), str(given[0]))


def why_unusable(build: str, cuda: str | None, driver: str, gpu: str) -> str:
    """What is missing, of torch's build, the CUDA version that it was built with (None: without), and the driver ('': none found)."""
    found = f"Ray gave this worker GPU {gpu}, and torch {build} sees none"
    if cuda is None:
        return (
            f"{found}: it is built without CUDA. Install torch's CUDA build of the same version, or pass --use-gpu no."
        )
    if not driver:
        return f"{found}: no NVIDIA driver answers here (nvidia-smi). Install one for CUDA {cuda}, give the container its GPUs, or pass --use-gpu no."
    return f"{found}: it is built for CUDA {cuda}, and the driver is {driver}. Install a newer driver, or pass --use-gpu no."


def card_here(node: str) -> Card:
    """What this worker, which has a GPU or a share of one, sees of its node's cards."""
    driver, names = _driver(), _asked("name")
    cuda = f" (CUDA {torch.version.cuda})" if torch.version.cuda and "+cu" not in torch.__version__ else ""
    build, has_nccl = f"{torch.__version__}{cuda}", torch.distributed.is_nccl_available()
    if refusal := gpu_refusal():
        return Card(node, tuple(names), 0.0, driver, build, has_nccl, "none", "none", refusal=refusal)
    facts = device_facts(torch.device("cuda"))
    sizes = [float(size) * 2**20 / 1e9 for size in _asked("memory.total") if size.replace(".", "").isdigit()]
    return Card(
        node=node,
        names=tuple(names) or (facts.name,),
        memory_gb=min([facts.memory_gb, *sizes]),
        driver=driver,
        build=build,
        has_nccl=has_nccl,
        attention=facts.attention,
        sae_backend=facts.sae_backend,
        notes=facts.notes,
        refusal=facts.refusal,
    )


def _driver() -> str:
    return next(iter(_asked("driver_version")), "")


def _asked(what: str) -> list[str]:
    """What the driver says of each card of this machine, in megabytes where it is memory; nothing where none answers."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in said.splitlines() if line.strip()]
