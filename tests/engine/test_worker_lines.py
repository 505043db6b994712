"""Lines of workers, as a job's terminal shows them."""

import pytest
from ray._private import ray_logging, worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

from sarm.engine.ray.worker_lines import is_noise, show_plainly


@pytest.fixture
def handlers(monkeypatch):
    before = list(dispatcher.handlers)
    # Ray's own remember lines of earlier tests, and add how often those came.
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(worker, f"{stream}_deduplicator", ray_logging.LogDeduplicator(5, None, None))
    yield dispatcher.handlers
    dispatcher.handlers = before


def test_lines_of_workers_have_no_names_and_no_colours_and_what_ray_says_of_itself_is_left_out(handlers, capfd) -> None:
    show_plainly()
    line = {"pid": 17, "ip": "192.0.2.2", "localhost": "192.0.2.2", "job": "01", "actor_name": "RayTrainWorker", "is_err": False}  # fmt: skip
    dispatcher.emit({**line, "lines": ["Setting up process group for: env:// [rank=0, world_size=1]", "sarm 7%  step 1  loss 0.69"]})  # fmt: skip
    dispatcher.emit({**line, "is_err": True, "lines": ["RuntimeError: it broke"]})
    out, err = capfd.readouterr()
    assert out == "sarm 7%  step 1  loss 0.69\n"
    assert err == "RuntimeError: it broke\n"
    show_plainly()
    assert [name for name, _ in dispatcher.handlers].count("ray_print_logs") == 1


@pytest.mark.parametrize(
    "line",
    [
        "Requesting resources: {'CPU': 1} * 1",
        "Attempting to start training worker group of size 1 with the following resources: [{'CPU': 1}] * 1",
        "Started training worker group of size 1: ",
        "- (ip=192.0.2.2, pid=7601) world_rank=0, local_rank=0, node_rank=0",
        "Writing model shards: 100%|██████████| 1/1 [00:00<00:00, 386.86it/s]",
    ],
)
def test_what_ray_and_bars_say_of_themselves_is_noise(line: str) -> None:
    assert is_noise(line)


@pytest.mark.parametrize("line", ["sae_text 100%  step 48  loss 0.02088  0 s left", "rewards | 3/4 | 75%", "ValueError: 5 workers do not fit"])  # fmt: skip
def test_what_a_job_says_is_no_noise(line: str) -> None:
    assert not is_noise(line)
