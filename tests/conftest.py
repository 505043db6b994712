"""What all tests share: a tiny model, its tokenizer, and shape annotations of `sarm.nn` that are checked while tests run."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

# Before anything imports sarm.nn: the hook rewrites modules as they load.
install_import_hook("sarm.nn", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tests.canaries import CANARIES  # noqa: E402

from sarm.config import Model  # noqa: E402
from sarm.data.chat import ChatTokenizer, load_chat_tokenizer  # noqa: E402
from sarm.data.tiny_source import tiny_model  # noqa: E402

# No deadline: a loaded machine is not a bug. The same examples every time: a failure can be repeated.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")


# Folders and files whose tests share a cluster or a finished run.
_SHARED = {
    "runtime": "cluster",
    "test_jobs": "chain",
    "chaos": "chain",
    "test_submit": "chain",
    "test_stopping": "chain",
    "test_secrets": "chain",
    "test_documented_commands": "chain",
}


def _group(path: Path) -> str:
    return _SHARED.get(path.parent.name) or _SHARED.get(path.stem) or str(path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that the two processes of `make test` end together."""
    items.sort(key=lambda item: _group(item.path) not in _SHARED.values())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes, tests that share fixtures stay in one of them (xdist's own marks for it need another pytest)."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(Path(nodeid.partition("::")[0]))

    return Grouped(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on one thread: faster than sharing them out, and sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A random two-layer Llama of width 64 with a ChatML tokenizer."""
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_chat(tiny_folder: Path) -> ChatTokenizer:
    """The tokenizer of `tiny_folder`."""
    return load_chat_tokenizer(Model(name="tiny:llama", layer=1, max_length=128), tiny_folder)


@pytest.fixture(scope="session")
def ray_logs() -> Iterator[Path]:
    """Where the clusters of jobs that run as processes leave their logs; a short path, since Ray puts sockets beside them."""
    with tempfile.TemporaryDirectory(prefix="sarm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def run_job(ray_logs: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a job's script as a user does: (name, *arguments)."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        environment |= CANARIES | {"RAY_TMPDIR": str(ray_logs)}
        script = Path(__file__).parent.parent / "jobs" / f"{name}.py"
        command = [sys.executable, str(script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800, check=False)

    return run


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> Path:
    """The whole tiny chain in one job."""
    out = tmp_path_factory.mktemp("outputs") / "tiny"
    done = run_job("pipeline", "tiny", "--out", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (out.parent / "job.log").write_text(done.stdout + done.stderr)
    assert "held-out accuracy" in done.stdout
    assert str(out / "report.html") in done.stdout.replace("\n", "")
    return out


@pytest.fixture(scope="session")
def mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow's without runs, to copy: making its tables takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path
