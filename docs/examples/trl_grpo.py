"""GRPO with TRL against a SARM's rewards, on the cores of this machine: `pip install trl==1.16.0` beside the locked packages.

python docs/examples/trl_grpo.py --reward outputs/demo/sarm --steps 40
python docs/examples/trl_grpo.py --reward http://127.0.0.1:8000 --policy tiny --steps 40

`--reward` is the address of a server (`jobs/serve.py`), or a SARM's folder, which is then loaded here. `--policy tiny` is a model of the
project's own that nobody trained, for a look at the mechanics: its rewards rise by chance at most.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from sarm.data.sources.tiny import tiny_model
from sarm.integrations.trl import reward

PROMPTS = ("How do I bake bread?", "Tell me how a garden grows.", "What makes a good friend?", "How do I say no?")


class Shown(TrainerCallback):
    """One line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        found = {name: value for name, value in (logs or {}).items() if name == "reward" or name.startswith("sarm/")}
        if found:
            print(f"step {state.global_step}  " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO with TRL against a SARM's rewards")
    parser.add_argument("--reward", required=True, help="address of a server, or folder of a SARM")
    parser.add_argument("--policy", default="tiny", help="folder of a chat model, or tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--run", default="trl-grpo", help="name under which the server watches this run")
    parser.add_argument("--features", type=int, nargs="*", default=[], help="latents whose contributions are logged")
    parser.add_argument("--out", type=Path, default=Path("outputs/grpo"))
    settings = parser.parse_args()
    place = str(tiny_model()) if settings.policy == "tiny" else settings.policy
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = GRPOConfig(
        output_dir=str(settings.out),
        max_steps=settings.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=24,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=0,
    )
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    own = reward(settings.reward, features=settings.features, end_ids=[tokenizer.eos_token_id], run=settings.run)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(place),
        reward_funcs=own,
        args=config,
        train_dataset=Dataset.from_list(rows * 8),
        processing_class=tokenizer,
        callbacks=[Shown()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    main()
