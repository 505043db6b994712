"""How much random damage to artifacts is noticed before they are used: bit flips, truncations, zeroed blocks, lost, swapped and strange files.

make bench BENCH=corruption            SEED=2 for other damage
"""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.untrusted.corruption import ARTIFACTS, KINDS, damage
from tests.untrusted.small_run import write_run

from sarm.data.sources.tiny import tiny_model
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.settings.model import ModelSettings

OUT = Path("outputs/bench/corruption.json")
ROUNDS = 14


def main() -> None:
    seed, model = int(os.environ.get("SEED") or 1), tiny_model()
    chat = load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=128), model)
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", model, chat)
        started = time.monotonic()
        tried, missed = damage(run, ROUNDS * len(ARTIFACTS) * len(KINDS), seed)
        seconds = time.monotonic() - started
    unnoticed = Counter(missed)
    print(f"{'':<32}" + "".join(f"{kind:>21}" for kind in KINDS))
    for artifact in ARTIFACTS:
        print(f"{artifact.name:<32}" + "".join(f"{tried[artifact.name, kind]:>21}" for kind in KINDS))
    total = sum(tried.values())
    print(f"{total} damages, seed {seed}: {total - len(missed)} noticed, {len(missed)} not; {seconds:.0f} s")
    for what, times in unnoticed.most_common():
        print(f"NOT NOTICED {times} times: {what}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(
        json.dumps({"seed": seed, "damages": total, "missed": missed, "seconds": round(seconds, 1)}, indent=2)
    )
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
