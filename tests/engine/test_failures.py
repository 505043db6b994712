import pytest

from sarm.engine.failures import status_of
from sarm.settings.checks import StalledError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConnectionRefusedError("mlflow"), 75),
        (TimeoutError(), 75),
        (StalledError("nothing has happened for 290 s"), 75),
        (OSError(28, "No space left on device"), 2),
        (BrokenPipeError(), None),
        (ValueError("a bug"), None),
        (OSError(13, "Permission denied"), None),
    ],
)
def test_failures_are_told_apart(error, status):
    assert status_of(error) == status
    wrapped = RuntimeError("around it")
    wrapped.__cause__ = error
    assert status_of(wrapped) == status


def test_failures_of_ray_and_of_process_groups_are_worth_another_try():
    import ray.exceptions
    import torch.distributed

    assert status_of(ray.exceptions.ActorDiedError()) == 75
    assert status_of(ray.exceptions.OutOfMemoryError("node")) == 75
    assert status_of(torch.distributed.DistNetworkError("gloo")) == 75
    assert status_of(torch.OutOfMemoryError("cuda")) is None
