"""The network interface that workers on several hosts talk over.

gloo takes the one that the host's name resolves to, which is loopback on many machines (Debian writes 127.0.1.1 into /etc/hosts): workers
of several hosts would then wait for each other at 127.0.0.1. Ray knows each node by the address that the others reach it at.
"""

import os
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.util import get_node_ip_address

from sarm.engine.ray.device import check_gpu

_VARIABLE = "GLOO_SOCKET_IFNAME"


class TorchOverNodeAddresses(TorchConfig):
    """Ray Train's process group; between hosts, over the interfaces that have the nodes' addresses, unless GLOO_SOCKET_IFNAME says which."""

    @property
    def backend_cls(self) -> type["_Backend"]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        # Before a process group is made, whose own error names neither torch nor the driver.
        worker_group.execute(check_gpu)
        if len(set(worker_group.execute(get_node_ip_address))) > 1:
            worker_group.execute(take_interface_of_node)
        super().on_start(worker_group, backend_config)


def take_interface_of_node() -> None:
    """Tell gloo, in this process, which interface has this node's address; nothing where none has, or the user told it."""
    own = get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            os.environ.setdefault(_VARIABLE, name)
            return
