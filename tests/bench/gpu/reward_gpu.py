"""Reward training as this project does it, on some of the machine's GPUs: `reward_gpu.py --cards 2`. Prints one JSON line.

Its loop, its packing of pairs, DeepSpeed by the stage and with the recomputing that its budget chooses, an 8B-shaped model of half its
blocks with random weights. A process a card; on cores (`--small`) gloo stands in for NCCL.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpu_shapes import StepClock, drawn_pairs, llama_config, shapes_of

# Each pair is trained on once, and no step is taken by a rate that means anything.
LR = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cards", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(trained, (arguments.cards, arguments.small, folder), nprocs=arguments.cards)
        print((Path(folder) / "found.json").read_text())


def trained(rank: int, cards: int, is_small: bool, folder: str) -> None:
    """One rank: some steps of training, of which the first writes what it timed."""
    from transformers import LlamaModel

    from sarm.engine.deepspeed.zero import ZeroEngine
    from sarm.nn.backbone import without_final_norm
    from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
    from sarm.nn.precision import allow_tf32_
    from sarm.settings.budget import Device, Size, training_budget
    from sarm.settings.reward import RewardSettings
    from sarm.training.reward import parameter_groups, train_reward

    device, of = shapes_of(is_small)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(cards)}
    memory = 0.0
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        allow_tf32_()
    else:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=cards)
    torch.manual_seed(0)
    config = llama_config(of, of.trained_blocks)
    with torch.device(device):
        backbone = without_final_norm(LlamaModel(config))
    about = SarmConfig(backbone=config.to_dict(), layer=of.trained_blocks, head="scalar", end_of_turn_id=2)
    model = SarmForSequenceClassification(about, backbone, None).train()
    size = Size(sum(p.numel() for p in model.parameters()), of.d_in, of.d_ff, of.trained_blocks)
    budget = training_budget(Device(memory), size, cards, of.rows, precision="bfloat16", least_stage=min(2, cards - 1))
    if budget.gradient_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    reward = RewardSettings(lr=LR, head_lr=LR, epochs=1, batch_pairs=of.step_pairs, batch_tokens=budget.batch_tokens, zero_stage=budget.zero_stage, precision="bfloat16")  # fmt: skip
    engine = ZeroEngine(model, parameter_groups(model, reward), reward, device)
    groups = groups_of(drawn_pairs(of, of.step_pairs * of.steps))
    tokens = sum(len(row.ids) for group in groups for row in group.rows(of.rows))
    clock = StepClock(device)
    train_reward(engine, groups, reward, 0, of.rows, 0, lambda _step, _metrics: clock.step())
    if rank == 0:
        seconds = statistics.median(clock.seconds)
        found = {
            "pairs_s": of.step_pairs / seconds,
            "tokens_s": tokens / of.steps / seconds,
            "zero_stage": budget.zero_stage,
            "recomputes": budget.gradient_checkpointing,
            "batch_tokens": budget.batch_tokens,
        }
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def groups_of(pairs: list[tuple[list[int], list[int]]]) -> list:  # type: ignore[type-arg]
    """A prompt's group for each pair, as tokenising makes them."""
    from sarm.data.tokens.chat import Tokens
    from sarm.data.tokens.groups import PairOfGroup, PromptGroup

    return [
        PromptGroup(str(n), ["", ""], [Tokens(c, 0), Tokens(r, 0)], [PairOfGroup(str(n), 0, 1, None, None)])
        for n, (c, r) in enumerate(pairs)
    ]


if __name__ == "__main__":
    main()
