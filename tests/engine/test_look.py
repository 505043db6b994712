"""What a run says of its devices, and which of them it refuses, each in one line; the cards here are made up."""

from importlib.metadata import version

import pytest
import torch

from sarm.engine.ray import device
from sarm.engine.ray.card import Card
from sarm.engine.ray.device import card_here
from sarm.engine.ray.look import look_at_devices, on_cards, on_cpu, why_refused
from sarm.engine.ray.room import Cluster, Node
from sarm.nn import device_facts as facts_module
from sarm.nn.device_facts import compiler, device_facts, why_no_kernels
from sarm.settings.run import RunSettings

H100 = "NVIDIA H100 80GB HBM3"


def card(node: str = "10.0.0.1", names: tuple[str, ...] = (H100,) * 8, **changed: object) -> Card:
    usual = {
        "memory_gb": 85.0, "driver": "580.65.06", "build": "2.13.0+cu130", "has_nccl": True, "attention": "SDPA with flash",
        "sae_backend": "Triton's kernels",
    }  # fmt: skip
    return Card(node, names, **(usual | changed))  # type: ignore[arg-type]


def test_a_run_on_gpus_says_card_driver_build_attention_and_backend() -> None:
    look = on_cards([card()], Cluster(nodes=(Node(64, 8),), is_local=True))
    assert look.line == (
        "runs on 8 x NVIDIA H100 80GB HBM3 of 85 GB, driver 580.65.06, torch 2.13.0+cu130; "
        "attention by SDPA with flash, the SAE by Triton's kernels"
    )
    assert look.notes == ()
    assert look.tags == {
        "device": f"8 x {H100}", "driver": "580.65.06", "torch": "2.13.0+cu130", "attention": "SDPA with flash",
        "sae_backend": "Triton's kernels",
    }  # fmt: skip


def test_a_run_without_gpus_says_so_too() -> None:
    look = on_cpu(Cluster(nodes=(Node(2),), is_local=True))
    assert look.line == f"runs on 2 CPU cores, torch {version('torch')}"
    assert set(look.tags) == {"device", "torch", "attention", "sae_backend"}
    assert "4 CPU cores on 2 nodes" in on_cpu(Cluster(nodes=(Node(2), Node(2)), is_local=False)).line


def test_gpus_that_are_yet_to_come_are_not_called_cores() -> None:
    run, nodes = RunSettings(use_gpu="yes", wait_for_nodes=60), (Node(4),)
    look = look_at_devices(Cluster(nodes=nodes, is_local=False, gpus_wanted="yes"), run)
    assert "GPUs that the cluster has yet to bring" in look.line
    assert look.tags == {"device": "GPU"}
    assert "4 CPU cores" in look_at_devices(Cluster(nodes=nodes, is_local=False, gpus_wanted="auto"), run).line


@pytest.mark.parametrize(
    ("cards", "words"),
    [
        ([card(names=("NVIDIA A100",) * 4), card("10.0.0.2", (H100,) * 4)], ["mixed cards (4 x NVIDIA A100, 4 x NVIDIA H100", "one kind of card"]),
        ([card(names=("NVIDIA A100",) * 4 + (H100,) * 4)], ["mixed cards"]),
        ([card(names=(H100,) * 4), card("10.0.0.2", (H100,) * 4, driver="535.1")], ["differ in driver (535.1, 580.65.06)", "one image"]),
        ([card(names=(H100,) * 4), card("10.0.0.2", (H100,) * 4, build="2.12.0+cu128")], ["differ in torch"]),
        ([card(names=(H100,) * 4)], ["Ray counts 8 GPUs and the drivers show 4"]),
        ([card(notes=("no C compiler: install gcc.",))], ["no C compiler: install gcc."]),
    ],
    ids=["mixed-nodes", "mixed-node", "drivers", "builds", "fewer", "compiler"],
)  # fmt: skip
def test_what_slows_a_run_is_said_in_one_line(cards: list[Card], words: list[str]) -> None:
    (note,) = on_cards(cards, Cluster(nodes=(Node(64, 8),), is_local=True)).notes
    assert all(word in note for word in words), note
    assert "\n" not in note


@pytest.mark.parametrize(
    ("cards", "num_workers", "words"),
    [
        ([card()], 8, []),
        ([card(has_nccl=False)], 1, []),
        ([card(), card("10.0.0.2", has_nccl=False)], 16, ["10.0.0.2", "without NCCL", "16 workers", "Install torch's CUDA build"]),
        ([card(refusal="Ray gave this worker GPU 0, and torch sees none")], 8, ["10.0.0.1: Ray gave this worker GPU 0"]),
    ],
    ids=["good", "one-needs-none", "no-nccl", "no-cuda"],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(cards: list[Card], num_workers: int, words: list[str]) -> None:
    reason = why_refused(cards, num_workers)
    assert bool(reason) == bool(words)
    assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((10, 0), ["sm_80", "sm_90"], False),
        ((10, 0), ["sm_80", "compute_90"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((9, 0), [], False),
    ],
)
def test_a_card_that_torch_has_no_kernels_for_is_told_from_one_that_it_has(
    capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    reason = why_no_kernels("NVIDIA X", capability, built_for)
    assert (reason == "") == runs
    if not runs:
        assert f"has no kernels for NVIDIA X (sm_{capability[0]}{capability[1]})" in reason
        assert "--use-gpu no" in reason


def test_a_missing_compiler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"gcc": "/usr/bin/gcc", "my-cc": "/opt/my-cc"}
    monkeypatch.setattr(facts_module.shutil, "which", there.get)
    monkeypatch.delenv("CC", raising=False)
    assert compiler() == "/usr/bin/gcc"
    monkeypatch.setenv("CC", "my-cc")
    assert compiler() == "/opt/my-cc"
    there.clear()
    assert compiler() == ""


def test_a_worker_tells_of_the_cards_that_its_driver_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"name": [H100, "NVIDIA A100"], "memory.total": ["81559", "40960"], "driver_version": ["580.1", "580.1"]}
    monkeypatch.setattr(device, "_asked", told.__getitem__)
    monkeypatch.setattr(device, "gpu_refusal", lambda: "")
    monkeypatch.setattr(
        device, "device_facts", lambda _: device_facts(torch.device("cpu"))._replace(name=H100, memory_gb=85.5)
    )
    found = card_here("here")
    assert (found.names, found.driver, found.node) == ((H100, "NVIDIA A100"), "580.1", "here")
    assert found.memory_gb == pytest.approx(40960 * 2**20 / 1e9), "the smallest"
    told["memory.total"] = ["[N/A]", "[N/A]"]
    assert card_here("here").memory_gb == 85.5
