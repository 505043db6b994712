"""Steps of reward training by this project and by trl, timed in this process: `python reward_steps.py NAME FOLDER`.

FOLDER is what `bench_sarm.py` prepared: a truncated classifier with its weights, an SAE, and tokenised pairs. All train the blocks and
a head in float32 with AdamW, without gradient checkpointing, on batches of as many pairs. Prints one JSON line.
"""

import argparse
import gc
import json
import os
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402

LR, HEAD_LR = 5e-6, 1e-4


def sarm(folder: Path, batch: int, shared: bool) -> dict[str, Any]:
    """This project's loop in one process: a whole batch a pass, answers behind their prompt, or each a sequence of its own."""
    from sarm.data.formats.sae_folder import load_sae
    from sarm.data.tokens.chat import Tokens
    from sarm.data.tokens.groups import PairOfGroup, PromptGroup
    from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
    from sarm.nn.pretrained import load_backbone
    from sarm.settings.reward import RewardSettings
    from sarm.training.reward import parameter_groups, train_reward
    from sarm.training.reward_engine import LocalEngine

    pairs = json.loads((folder / "pairs.json").read_text())
    groups = [
        PromptGroup(str(n), ["", ""], [Tokens(c, 0), Tokens(r, 0)], [PairOfGroup(str(n), 0, 1, None, None)])
        for n, (c, r) in enumerate(pairs)
    ]
    layer = json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"]
    backbone, (sae, _) = load_backbone(str(folder / "model"), layer), load_sae(folder / "sae")
    config = SarmConfig(
        backbone=backbone.config.to_dict(),
        layer=layer,
        d_sae=sae.d_sae,
        k=sae.k,
        sae=sae.describe(),
    )
    model = SarmForSequenceClassification(config, backbone, sae).train()
    longest = max(len(ids) for pair in pairs for ids in pair)
    reward = RewardSettings(lr=LR, head_lr=HEAD_LR, batch_pairs=batch, batch_tokens=64 * longest)
    engine = LocalEngine(model, parameter_groups(model, reward), reward.max_grad_norm)
    meter = Meter()
    # Rows hold both answers of the longest pair; or one answer each.
    row_tokens = 2 * longest if shared else 1
    tokens = sum(len(row.ids) for group in groups for row in group.rows(row_tokens))
    train_reward(engine, groups, reward, 0, row_tokens, 0, lambda step, metrics: meter.step())
    return meter.report(tokens)


def shared(folder: Path, batch: int) -> dict[str, Any]:
    """Padding-free, a pair's prompt once."""
    return sarm(folder, batch, True)


def unshared(folder: Path, batch: int) -> dict[str, Any]:
    """Padding-free, every answer with a prompt of its own."""
    return sarm(folder, batch, False)


def trl(folder: Path, batch: int) -> dict[str, Any]:
    """trl's `RewardTrainer` on the same tokens, its embeddings frozen as ours are."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    pairs = json.loads((folder / "pairs.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    meter = Meter()

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step()

    with_padding: list[int] = []
    arguments = RewardConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=LR,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        train_dataset=Dataset.from_dict({"chosen_ids": [c for c, _ in pairs], "rejected_ids": [r for _, r in pairs]}),
        callbacks=[Watch()],
    )
    collate = trainer.data_collator

    def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
        found = collate(examples)
        with_padding.append(found["input_ids"].numel())
        return found

    trainer.data_collator = counted
    meter.start()
    trainer.train()
    return meter.report(sum(with_padding))


class Meter:
    """Seconds of each step after the first, by the clock and of all threads' work, and megabytes."""

    def __init__(self) -> None:
        gc.collect()
        self.before_mb = _resident_mb()
        self.start()

    def start(self) -> None:
        self._times, self._busy = [time.perf_counter()], [time.process_time()]

    def step(self) -> None:
        self._times.append(time.perf_counter())
        self._busy.append(time.process_time())

    def report(self, tokens: int) -> dict[str, Any]:
        return {
            "seconds": [b - a for a, b in pairwise(self._times)][1:],
            "cpu_seconds": [b - a for a, b in pairwise(self._busy)][1:],
            "tokens": tokens,
            "mb_before": self.before_mb,
            "mb_peak": _peak_mb(),
        }


def _resident_mb() -> float:
    return _status("VmRSS")


def _peak_mb() -> float:
    return _status("VmHWM")


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


ARMS = {f.__name__: f for f in (trl, unshared, shared)}


def main() -> None:
    """Run one of `ARMS`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=ARMS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    print(json.dumps({"name": a.name, **ARMS[a.name](a.folder, a.batch)}))


if __name__ == "__main__":
    main()
