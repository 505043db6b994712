"""Steps of reward training by other libraries on one GPU, on the pairs and the shapes of `reward_gpu.py`: `reward_peers.py trl`.

Each does its own way what it does by default for this: bfloat16, recomputed blocks, flash attention where flash-attn is installed.
Prints one JSON line: pairs a second.
"""

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402
from gpu_shapes import StepClock, drawn_pairs, llama_config, shapes_of  # noqa: E402

# Pairs of a pass, several of which make a step.
PASS_PAIRS = 8
LR = 1e-6


def attention() -> str:
    """The fastest that this environment has."""
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


def trl(is_small: bool) -> dict[str, Any]:
    """trl's `RewardTrainer`; answers are padded to the longest of a pass."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForSequenceClassification, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    from sarm.data.sources.tiny import tiny_model

    device, of = shapes_of(is_small)
    config = llama_config(of, of.trained_blocks)
    config.num_labels, config._attn_implementation = 1, "sdpa" if is_small else attention()
    with torch.device(device):
        model = LlamaForSequenceClassification(config)
    model.get_input_embeddings().requires_grad_(False)
    pairs, clock = drawn_pairs(of, of.step_pairs * of.steps), StepClock(device)

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    each = min(PASS_PAIRS, of.step_pairs)
    with tempfile.TemporaryDirectory() as folder:
        arguments = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=each,
            gradient_accumulation_steps=of.step_pairs // each,
            num_train_epochs=1,
            learning_rate=LR,
            max_length=None,
            bf16=not is_small,
            gradient_checkpointing=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            use_cpu=is_small,
            seed=0,
        )
        trainer = RewardTrainer(
            model=model,
            args=arguments,
            # Only its padding token is used: ids are made up.
            processing_class=AutoTokenizer.from_pretrained(tiny_model()),
            train_dataset=Dataset.from_dict({"chosen_ids": [c for c, _ in pairs], "rejected_ids": [r for _, r in pairs]}),
            callbacks=[Watch()],
        )  # fmt: skip
        trainer.train()
    return {"pairs_s": of.step_pairs / statistics.median(clock.seconds), "attention": config._attn_implementation}


def openrlhf(is_small: bool) -> dict[str, Any]:
    """OpenRLHF's reward model and loss with packed samples, which flash attention keeps apart, under DeepSpeed in bfloat16 as its strategy sets it."""
    import deepspeed
    from openrlhf.models import PairWiseLoss
    from openrlhf.models.model import _get_reward_model
    from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

    device, of = shapes_of(is_small)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    config = llama_config(of, of.trained_blocks)
    config.normalize_reward, config._attn_implementation = False, attention()
    with torch.device(device):
        model = _get_reward_model(LlamaPreTrainedModel, LlamaModel, "score", packing_samples=True)(config).bfloat16()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_input_embeddings().requires_grad_(False)
    each = min(PASS_PAIRS, of.step_pairs)
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        settings = {
            "train_micro_batch_size_per_gpu": each,
            "gradient_accumulation_steps": of.step_pairs // each,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True, "fused": True}},
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
        loss, pairs, clock = PairWiseLoss(), drawn_pairs(of, of.step_pairs * of.steps), StepClock(device)
        for first in range(0, len(pairs), each):
            chosen, rejected = zip(*pairs[first : first + each], strict=True)
            answers = [*chosen, *rejected]
            width = max(map(len, answers))
            ids = torch.tensor([[0] * (width - len(a)) + a for a in answers], device=device)
            values = engine(ids, attention_mask=(ids != 0).long())
            engine.backward(loss(values[:each], values[each:], None))
            engine.step()
            if (first // each + 1) % (of.step_pairs // each) == 0:
                clock.step()
        torch.distributed.destroy_process_group()
    return {"pairs_s": of.step_pairs / statistics.median(clock.seconds), "attention": config._attn_implementation}


PEERS: dict[str, Callable[[bool], dict[str, Any]]] = {f.__name__: f for f in (trl, openrlhf)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps(PEERS[arguments.name](arguments.small)))


if __name__ == "__main__":
    main()
