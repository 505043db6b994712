"""gloo is told the interface that has the node's address; `tests/hosts` shows what it is for."""

import socket

import psutil
import pytest

from sarm.engine.ray import interfaces

ADDRESSES = [
    (name, one.address)
    for name, addresses in psutil.net_if_addrs().items()
    for one in addresses
    if one.family == socket.AF_INET
]


@pytest.mark.parametrize(("name", "address"), ADDRESSES)
def test_the_interface_is_the_one_with_the_nodes_address(
    name: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(interfaces, "get_node_ip_address", lambda: address)
    interfaces.take_interface_of_node()
    assert interfaces.os.environ["GLOO_SOCKET_IFNAME"] == name
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_what_the_user_said_stays_and_an_address_of_nobody_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "get_node_ip_address", lambda: "203.0.113.9")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    interfaces.take_interface_of_node()
    assert "GLOO_SOCKET_IFNAME" not in interfaces.os.environ
    monkeypatch.setattr(interfaces, "get_node_ip_address", lambda: ADDRESSES[0][1])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    interfaces.take_interface_of_node()
    assert interfaces.os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
