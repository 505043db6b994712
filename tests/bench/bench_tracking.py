"""What an outage of MLflow costs a training: its real server is killed for a minute in the middle and started again.

Steps of 250 ms that keep one core busy, as training does, each with 12 metrics; with the server up all the time, and with the outage. Points
are counted in the server's database at the end.

    make bench BENCH=tracking
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

from mlflow import MlflowClient

from sarm.engine.mlflow.outbox import close_all
from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.ray.training_progress import Progress
from sarm.settings.run import RunSettings

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.engine.mlflow_server import MlflowServer

OUT = Path("outputs/bench/tracking.json")
STEPS, STEP_SECONDS, METRICS = 480, 0.25, 12
DOWN_AFTER, DOWN_SECONDS = 20.0, 60.0


def train(server: MlflowServer, name: str, root: Path, outage: bool) -> dict[str, float]:
    """Seconds of the steps and of what follows them, and the points that the server has."""
    run = Tracker(RunSettings(out=root / name, mlflow_uri=server.uri), name).parent
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
        server = MlflowServer(root)
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
