"""The GPU that Ray gave this process, and whether torch can use it."""

import shutil
import subprocess

import ray
import torch

from sarm.settings.checks import UserError


def check_gpu() -> None:
    """Raise UserError if Ray gave this process a GPU and torch sees none."""
    if reason := gpu_refusal():
        raise UserError(reason)


def gpu_refusal() -> str:
    """Why the GPU that Ray gave this process cannot be used: it would work on the CPU, and hold the GPU. '' if nothing is wrong."""
    given = ray.get_gpu_ids()
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


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.splitlines()[0].strip() if said.strip() else ""
