"""How this process was started: by a job's script (`python jobs/train_sarm.py ...`) or by the command (`sarm train-sarm ...`).

Messages that repeat the command line or name another command, supervisors that start it again, submissions and MLflow's tags ask here.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

PROGRAM, MODULE = "sarm", "sarm.commands"
# Where a checkout has its scripts.
_FOLDERS = ("jobs", "tune")
# Commands that are not called as their scripts.
_CALLED = {"reward_card": "card"}


class Started(NamedTuple):
    """A start. What follows of the command line are the job's own arguments."""

    typed: tuple[str, ...]
    """What a user types before the arguments."""
    again: tuple[str, ...]
    """What Python is given to start the same once more."""
    script: str
    """The job's script; that of the command is where a checkout has it."""
    source: str
    """What stands for the program where one word has to do."""

    @property
    def is_program(self) -> bool:
        """Whether it was the command, which people have who have no checkout."""
        return self.typed[0] == PROGRAM

    @property
    def name(self) -> str:
        """The job's name, as its script has it."""
        return Path(self.script).stem or "job"


_command: tuple[str, str] | None = None


def note_command(name: str, script: str) -> None:
    """Say that this process is `sarm NAME`, whose job's script is `script` under the folder of a checkout."""
    global _command
    _command = name, script


def started() -> Started:
    """How this process was started."""
    if _command is not None:
        name, script = _command
        # -P: what lies in the current folder is not imported, as it is not by the program.
        return Started((PROGRAM, name), ("-P", "-m", MODULE, name), script, f"{PROGRAM} {name}")
    script = sys.argv[0] if sys.argv else ""
    return Started(("python", os.path.relpath(script) if script else ""), (script,), script, script)


def command_name(script: str) -> str:
    """What the program calls the job of a script, given without its folder and ending: `train-sarm` for `train_sarm`."""
    return _CALLED.get(script, script.replace("_", "-"))


def called(script: str) -> str:
    """How a job is called by whoever reads a message: `python jobs/evaluate.py` where a script of a checkout runs, else `sarm evaluate`."""
    own = Path(sys.argv[0] if sys.argv else "")
    if _command is None and own.suffix == ".py" and own.absolute().parent.name in _FOLDERS:
        return f"python {_FOLDERS[script == 'ablation']}/{script}.py"
    return f"{PROGRAM} {command_name(script)}"
