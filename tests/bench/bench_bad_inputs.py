"""How long a user waits for the line that refuses a bad input: every row of the table, each job a process of its own.

make bench BENCH=bad_inputs            ROWS=1,12,40 for some of them
"""

# ruff: noqa: E402
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.untrusted.small_run import write_run
from tests.untrusted.test_bad_inputs import ROWS
from tests.untrusted.world import Ended, World

from sarm.data.sources.tiny import tiny_model
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.engine.mlflow.tracker import Tracker
from sarm.settings.model import ModelSettings
from sarm.settings.run import RunSettings

OUT = Path("outputs/bench/bad_inputs.json")


@dataclass
class Processes(World):
    """Jobs as a user runs them; `seconds` of each."""

    seconds: list[float] = field(default_factory=list)

    def job(self, name: str, *arguments: object) -> Ended:
        started = time.monotonic()
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.seconds.append(round(time.monotonic() - started, 2))
        return Ended(done.returncode, done.stdout, done.stderr)


def main() -> None:
    wanted = {int(number) for number in os.environ["ROWS"].split(",")} if os.environ.get("ROWS") else None
    model = tiny_model()
    chat = load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=128), model)
    found, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        small = write_run(Path(folder) / "small", model, chat)
        uri = Tracker(RunSettings(out=Path(folder) / "none"), "first").uri
        for row in ROWS:
            if isinstance(row.check, str) or (wanted and row.number not in wanted):
                continue
            (tmp := Path(folder) / f"row{row.number}").mkdir()
            world = Processes(tmp, small, model, uri)
            try:
                row.check(world)
                outcome = "ok"
            except AssertionError as error:
                outcome, wrong = f"WRONG {error}"[:200], wrong + 1
            longest = max(world.seconds, default=0.0)
            print(f"{row.number:>3}  {longest:5.1f} s  {len(world.seconds):>2} jobs  {outcome}  {row.name}", flush=True)
            found.append({"row": row.number, "name": row.name, "seconds": world.seconds, "outcome": outcome})
    times = sorted(second for one in found for second in one["seconds"])
    print(f"{len(times)} jobs, median {times[len(times) // 2]:.1f} s, longest {times[-1]:.1f} s; {wrong} rows wrong")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=2))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
