"""What two cards do together: reward training that is sharded over them, and activations that both extract, beside one card."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.gpu.cards import ON_CORES
from tests.gpu.test_chain import command, environment
from tests.gpu.test_reward import REWARD, fresh, losses_of

from sarm.data.sources.prepare import prepare_pairs
from sarm.data.store.activations import ActivationStore
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.engine.deepspeed.zero import ZeroEngine
from sarm.settings.data import DataSettings
from sarm.settings.model import ModelSettings
from sarm.training.reward import parameter_groups
from sarm.training.reward_engine import LocalEngine

pytestmark = pytest.mark.gpu2
ROOT = Path(__file__).parents[2]
STAGES = (1, 2, 3)


def groups_of(pairs: Path, chat: ChatTokenizer) -> list[PromptGroup]:
    return list(prompt_groups(load_pairs(pairs, "train"), chat))


def _rank(rank: int, pairs: str, model: str, folder: str) -> None:
    """Every stage, one after the other: losses of the first rank, and the whole weights that it ends with."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    device = torch.device("cpu") if ON_CORES else torch.device("cuda", rank)
    if not ON_CORES:
        torch.cuda.set_device(device)
    backend = "gloo" if ON_CORES else "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    chat = load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=128), model)
    groups = groups_of(Path(pairs), chat)
    for stage in STAGES:
        reward, trained = replace(REWARD, zero_stage=stage), fresh(Path(model), chat)
        engine = ZeroEngine(trained, parameter_groups(trained, reward), reward, device)
        losses, whole = losses_of(engine, groups, reward, chat.pad_id), engine.whole_state()
        if rank == 0:
            torch.save((losses, whole), f"{folder}/{stage}.pt")
        engine.free_()
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Path]:
    """The pairs, and a folder with what each stage came to."""
    pairs, folder = tmp_path_factory.mktemp("pairs"), tmp_path_factory.mktemp("sharded")
    prepare_pairs(DataSettings(pairs=("tiny:pairs",)), pairs)
    # Spawned processes import this file by its name from the repository's root.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), before)))
    try:
        mp.spawn(_rank, (str(pairs), str(tiny_folder), str(folder)), nprocs=2)
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return pairs, folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_that_is_sharded_over_two_cards_is_that_of_one(
    stage: int, sharded: tuple[Path, Path], tiny_folder: Path, tiny_chat: ChatTokenizer, card: torch.device
) -> None:
    pairs, folder = sharded
    losses, whole = torch.load(folder / f"{stage}.pt")
    model = fresh(tiny_folder, tiny_chat).to(card)  # type: ignore[arg-type]
    before = model.score.weight.detach().clone()
    engine = LocalEngine(model, parameter_groups(model, REWARD), REWARD.max_grad_norm)
    plain = losses_of(engine, groups_of(pairs, tiny_chat), REWARD, tiny_chat.pad_id)
    assert len(losses) >= 10
    torch.testing.assert_close(losses, plain, rtol=0, atol=1e-4)
    moved = (model.score.weight - before).norm()
    assert moved > 0
    assert (whole["score.weight"].to(card) - model.score.weight).norm() < 0.05 * moved


def test_two_cards_extract_the_rows_of_one(tmp_path: Path) -> None:
    found = []
    for actors in ("1", "2"):
        out = tmp_path / actors
        flags = ["--num-actors", actors, "--cpus-per-worker", "1"]
        done = subprocess.run(command("extract_activations", "tiny", out, *flags), capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=600, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        table, rows = ActivationStore(out / "activations" / "text").read()
        found.append((table, rows))
    (table, rows), (other, others) = found
    assert table.equals(other)
    # Blocks come to other batches, and products round by their shapes.
    torch.testing.assert_close(rows, others, rtol=2e-3, atol=1e-3)
    assert len(rows) > 100
