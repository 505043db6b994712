"""Writes a tiny SARM that nobody trained, and a benchmark of pairs, for a process that has less installed: `python -m tests.export_sarm FOLDER`."""

import json
import sys
from pathlib import Path

from tests.stages.random_sarm import random_sarm

from sarm.data.sources.tiny import tiny_model
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.settings.model import ModelSettings


def export(folder: Path) -> None:
    """`folder/sarm` and `folder/pairs.jsonl`."""
    base = tiny_model()
    chat = load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=128), base)
    random_sarm(folder / "sarm", base, chat)
    pairs = [{"prompt": f"question {i}", "chosen": f"yes, {i} of them", "rejected": "no"} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


if __name__ == "__main__":
    export(Path(sys.argv[1]))
