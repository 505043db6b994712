"""What an outage of MLflow costs a training: its real server is killed for a minute in the middle and started again.

Steps of 250 ms that keep one core busy, as training does, each with 12 metrics; with the server up all the time, and with the outage. Points
are counted in the server's database at the end.

    make bench BENCH=tracking
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path

from mlflow import MlflowClient

from sarm.config import Run
from sarm.runtime.outbox import close_all
from sarm.runtime.tracking import Tracker
from sarm.runtime.training.trainer import Progress

OUT = Path("outputs/bench/tracking.json")
STEPS, STEP_SECONDS, METRICS = 480, 0.25, 12
DOWN_AFTER, DOWN_SECONDS = 20.0, 60.0


class Server:
    """`mlflow server` with sqlite on a port of its own."""

    def __init__(self, folder: Path):
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder
        self.start()

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}",
            "--artifacts-destination", str(self._folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1",
        ]  # fmt: skip
        log = (self._folder / "server.log").open("a")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise RuntimeError((self._folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def train(server: Server, name: str, root: Path, outage: bool) -> dict[str, float]:
    """Seconds of the steps and of what follows them, and the points that the server has."""
    run = Tracker(Run(out=root / name, mlflow_uri=server.uri), name).parent
    progress = Progress(name, run, ())

    def interrupt() -> None:
        time.sleep(DOWN_AFTER)
        server.kill()
        time.sleep(DOWN_SECONDS)
        server.start()

    thread = threading.Thread(target=interrupt)
    if outage:
        thread.start()
    started, in_logging = time.monotonic(), 0.0
    for step in range(1, STEPS + 1):
        until = time.monotonic() + STEP_SECONDS
        while time.monotonic() < until:
            pass
        before = time.monotonic()
        progress(step, {"progress": step / STEPS, **{f"m{i}": float(step) for i in range(METRICS - 1)}})
        in_logging += time.monotonic() - before
    seconds = time.monotonic() - started
    run.end("FINISHED")
    if outage:
        thread.join()
    close_all()
    ended = time.monotonic() - started - seconds
    client = MlflowClient(tracking_uri=server.uri)
    keys = [f"{name}/progress", *(f"{name}/m{i}" for i in range(METRICS - 1))]
    steps = [[entry.step for entry in client.get_metric_history(run.run_id, key)] for key in keys]
    return {
        "seconds": seconds,
        "logging_seconds": in_logging,
        "end_seconds": ended,
        "points": sum(map(len, steps)),
        "distinct_points": sum(len(set(one)) for one in steps),
        "status": client.get_run(run.run_id).info.status,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        server = Server(root)
        try:
            undisturbed = train(server, "undisturbed", root, outage=False)
            outage = train(server, "outage", root, outage=True)
        finally:
            server.kill()
    expected = STEPS * METRICS
    found = {
        "undisturbed": undisturbed,
        "outage": outage,
        "outage_seconds": DOWN_SECONDS,
        "outage_cost": outage["seconds"] / undisturbed["seconds"] - 1,
        "logging_share": outage["logging_seconds"] / outage["seconds"],
        "points_lost": expected - outage["distinct_points"],
        "points_twice": outage["points"] - outage["distinct_points"],
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=2))
    print(f"{STEPS} steps, MLflow away for {DOWN_SECONDS:.0f} s of {outage['seconds']:.0f}")
    print(f"  time            {found['outage_cost']:+.2%} (bound 1 %); logging itself {found['logging_share']:.3%}")
    print(f"  points lost     {found['points_lost']} of {expected} (bound 0), twice {found['points_twice']}")
    print(f"-> {OUT}")


if __name__ == "__main__":
    main()
