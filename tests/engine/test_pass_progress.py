import pytest
import torch

from sarm.engine.ray.pass_progress import PassProgress
from sarm.passes.usage import ForwardClock, Usage

# Two blocks of two actors that ran side by side for 10 seconds.
BLOCK = {
    "rows": 10,
    "outputs": 50,
    "tokens": 900,
    "padded_tokens": 1000,
    "began": 100.0,
    "ended": 110.0,
    "forward_seconds": 8.0,
    "cpu_seconds": 15.0,
    "rss": 2e9,
    "gpu_memory": 7e9,
}


@pytest.mark.parametrize("use_gpu", [False, True])
def test_progress_tells_rate_padding_time_left_and_use_of_the_machine(capsys, use_gpu):
    logged = {}
    progress = PassProgress(
        "pass", 40, lambda metrics, step: logged.update(metrics, step=step), num_actors=2, threads=2, use_gpu=use_gpu
    )
    progress.add(BLOCK)
    progress.add(BLOCK | {"rss": 1e9, "gpu_memory": 9e9})
    progress.end()
    expected = {"rows": 20, "tokens": 1800, "tokens_per_second": 180.0, "seconds_left": 10.0, "padding_share": 0.1}
    expected |= {"cpu_share": 0.75, "actor_rss_gb": 2.0}
    expected |= {"gpu_share": 0.8, "gpu_memory_gb": 9.0} if use_gpu else {}
    assert logged == pytest.approx({f"extraction/{name}": value for name, value in expected.items()} | {"step": 2})
    said = capsys.readouterr().out
    assert "20 of 40 rows  180 tokens/s  padding 10.0%" in said
    assert ("GPU 80% busy, 9.0 GB" in said) == use_gpu
    assert "CPU 75% busy, 2.0 GB  10 s left" in said


def test_the_clock_counts_passes_that_ended_once():
    clock = ForwardClock(torch.device("cpu"))
    with clock.running():
        torch.zeros(3) + 1
    with pytest.raises(torch.OutOfMemoryError), clock.running():
        raise torch.OutOfMemoryError
    assert len(clock._spans) == 1
    assert clock.seconds() > 0
    assert clock.seconds() == 0


def test_a_process_counts_its_cores_since_it_was_asked_last():
    usage = Usage()
    while (taken := usage.taken())["cpu_seconds"] == 0:
        sum(range(100_000))
    assert taken["rss"] > 1e6
    assert usage.taken()["cpu_seconds"] < 5
