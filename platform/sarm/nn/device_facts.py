"""What decides how fast a device is: its name and memory, torch's build, the attention kernels and the SAE's backend that it gets."""

import os
import shutil
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .backends import TorchBackend, backend_for


class DeviceFacts(NamedTuple):
    """One device as this process sees it; memory in GB (1e9 bytes), 0 where it is the machine's own."""

    name: str
    memory_gb: float
    attention: str
    sae_backend: str
    notes: tuple[str, ...] = ()
    """What makes it slower than it could be, a line each."""
    refusal: str = ""
    """Why nothing can run on it; '' if something can."""


def device_facts(device: torch.device) -> DeviceFacts:
    """Look at a device of this process."""
    if device.type != "cuda":
        return DeviceFacts("CPU", 0.0, "SDPA", _backend_name(TorchBackend()))
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    memory_gb = properties.total_memory / 1e9
    if reason := why_no_kernels(properties.name, capability, torch.cuda.get_arch_list()):
        return DeviceFacts(properties.name, memory_gb, "none", "none", refusal=reason)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        backend = backend_for(device)
    notes = tuple(" ".join(str(one.message).split()) for one in said)
    if not compiler():
        notes += ("no C compiler: Triton cannot launch a kernel. Install gcc and libc6-dev.",)
    return DeviceFacts(properties.name, memory_gb, attention_kernels(capability), _backend_name(backend), notes)


def attention_kernels(capability: tuple[int, int]) -> str:
    """Which kernels scaled dot product attention has on a card of this compute capability, in 16 bits."""
    return "SDPA with flash" if capability >= (8, 0) else "SDPA without flash"


def why_no_kernels(name: str, capability: tuple[int, int], built_for: Sequence[str]) -> str:
    """Why a torch that is built for these architectures (`sm_80`, `compute_90`) has no kernels for a card; '' if it has.

    Machine code runs on cards of the same major version and a minor one that is no smaller; `compute_` is compiled for newer cards too.
    """
    own = capability[0] * 10 + capability[1]
    for entry in built_for:
        kind, _, digits = entry.partition("_")
        number = int("".join(filter(str.isdigit, digits)) or 0)
        is_same_major = number // 10 == capability[0]
        if number <= own and (is_same_major or kind == "compute"):
            return ""
    return f"torch {torch.__version__} has no kernels for {name} (sm_{own}); it is built for {', '.join(built_for) or 'none'}. Install a torch that is, or pass --use-gpu no."


def compiler() -> str:
    """The C compiler that Triton takes: that of CC, else gcc or clang; '' if there is none."""
    named = os.environ.get("CC", "")
    return next((found for name in (named, "gcc", "clang") if name and (found := shutil.which(name))), "")


def _backend_name(backend: object) -> str:
    return "PyTorch's kernels" if isinstance(backend, TorchBackend) else "Triton's kernels"
