"""A process that stands still ends by itself and says where; who waited for it is not blamed."""

import signal
import subprocess
import sys
from pathlib import Path

from sarm.engine.ray.stall import who_stood_still

STILL = """
import sys, time
from pathlib import Path
from sarm.engine.ray import stall
stall.NO_PROGRESS_SECONDS = 0.5
def _call(folder, rank, waits):
    with stall.StallGuard(folder, rank) as guard:
        for _ in range(3):
            guard.beat()
            time.sleep(0.01)
        (all_reduce if waits else stuck)()
def stuck():
    time.sleep(60)
source = compile("def all_reduce():\\n    import time; time.sleep(60)", "/torch/distributed/distributed_c10d.py", "exec")
exec(source)
_call(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[2] == "0")
"""


def test_all_end_and_the_one_that_waited_is_not_blamed(tmp_path: Path) -> None:
    line = STILL.splitlines().index("    time.sleep(60)") + 1
    script = tmp_path / "still.py"
    script.write_text(STILL)
    both = [subprocess.Popen([sys.executable, script, tmp_path / "stacks", str(rank)]) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in both] == [-signal.SIGALRM] * 2
    assert who_stood_still(tmp_path / "stacks") == f"worker 1 stood still at still.py:{line} in stuck"


def test_where_all_wait_all_are_named(tmp_path: Path) -> None:
    for rank in (0, 1):
        text = 'Timeout!\nThread 1:\n  File "/t/distributed_c10d.py", line 7 in barrier\n  File "/s/trainer.py", line 9 in _call\n'
        (tmp_path / f"stack-{rank}.txt").write_text(text)
    assert who_stood_still(tmp_path) == (
        "worker 0 stood still at distributed_c10d.py:7 in barrier, worker 1 stood still at distributed_c10d.py:7 in barrier"
    )


SLOW = """
import sys, time
from pathlib import Path
from sarm.engine.ray import stall
stall.NO_PROGRESS_SECONDS = 0.4
folder = Path(sys.argv[1])
with stall.StallGuard(folder, 0) as guard:
    # The clock starts with the first beat, and a step of 0.3 s makes one of 1.5 s bearable.
    time.sleep(0.8)
    for _ in range(3):
        guard.beat()
        time.sleep(0.3)
    guard.beat()
    time.sleep(1.5)
time.sleep(0.8)
assert list(folder.iterdir()) == []
assert stall.who_stood_still(folder) == ""
"""


def test_slow_steps_are_no_standstill_and_nothing_is_left(tmp_path: Path) -> None:
    # In processes of their own, since the clock of a test is SIGALRM too.
    subprocess.run([sys.executable, "-c", SLOW, tmp_path], check=True, timeout=300)


RECOVERED = """
import sys, time
from pathlib import Path
from sarm.engine.ray import stall
stall.NO_PROGRESS_SECONDS = 10.0
stall._WRITES_AT = 0.05
folder = Path(sys.argv[1])
def stands():
    while not stall.who_stood_still(folder).startswith("worker 0 stood still at "):
        time.sleep(0.01)
with stall.StallGuard(folder, 0) as guard:
    for _ in range(2):
        guard.beat()
        stands()
        time.sleep(1)
        guard.beat()
        assert stall.who_stood_still(folder) == ""
    stands()
    assert (folder / "stack-0.txt").read_text().startswith("Timeout")
"""


def test_who_stood_long_but_went_on_did_not_stand_still(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", RECOVERED, tmp_path], check=True, timeout=300)
