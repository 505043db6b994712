"""What all tests share: a tiny model, its tokenizer, and shape annotations of `sarm` that are checked while tests run."""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tests.checked  # noqa: F401  # the hook names it
from jaxtyping import install_import_hook

_SARM = Path(__file__).parents[1] / "platform" / "sarm"
# Coverage tests call these for each row of thousands of tables: checks would make the tests several times as slow.
_UNCHECKED = ("evaluate/influence.py", "evaluate/benchmarks/")


def _modules_with_shapes() -> list[str]:
    """Of the other modules a check would find what mypy finds, and each call would take longer."""
    with_shapes = {
        path.relative_to(_SARM) for path in _SARM.rglob("*.py") if "from jaxtyping import" in path.read_text()
    }
    kept = [path for path in with_shapes if not path.as_posix().startswith(_UNCHECKED)]
    return ["sarm.nn", *sorted(".".join(("sarm", *path.with_suffix("").parts)) for path in kept)]


# Before anything imports sarm: the hook rewrites modules as they load.
install_import_hook(_modules_with_shapes(), "tests.checked.checked")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tests.canaries import CANARIES  # noqa: E402

from sarm.data.sources.tiny import tiny_model  # noqa: E402
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer  # noqa: E402
from sarm.engine.ray.cluster import PATIENCE  # noqa: E402
from sarm.settings.jobs import Pipeline  # noqa: E402
from sarm.settings.model import ModelSettings  # noqa: E402
from sarm.settings.presets import PRESETS  # noqa: E402

# Of clusters that tests start themselves, as of those that jobs start.
for _name, _value in PATIENCE.items():
    os.environ.setdefault(f"RAY_{_name}", str(_value))

# No deadline: a loaded machine is not a bug. The same examples every time: a failure can be repeated.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
# Other examples every time, and many (`make test-fuzz`): a failure prints what repeats it.
settings.register_profile("fuzz", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("SARM_HYPOTHESIS", "tests"))


# Files whose tests share a finished run, and fixtures that share a cluster: each of the two stays in one process.
_CHAIN = {
    "test_jobs",
    "test_reward_model",
    "test_stopping",
    "test_secrets",
    "test_documented_commands",
    "test_tutorials",
}
_OF_A_CLUSTER = ("ray_cluster", "extracted")
# The whole chain once: it is run before each commit too.
_IN_QUICK = {"test_jobs", "test_reward_model"}


@functools.cache
def _group(path: Path) -> str:
    if path.stem in _CHAIN or path.parent.name in ("chaos", "submit"):
        return "chain"
    text = (Path(__file__).parents[1] / path).read_text()
    return "cluster" if any(name in text for name in _OF_A_CLUSTER) else str(path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that the two processes of `make test` end together; `make test-quick` leaves it out."""
    items.sort(key=lambda item: _group(item.path) not in ("chain", "cluster"))
    for item in items:
        if _group(item.path) in ("chain", "cluster") and item.path.stem not in _IN_QUICK:
            item.add_marker("slow")


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
    return load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=128), tiny_folder)


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


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests; `local`, since a bare init would join any cluster on the machine."""
    import ray

    # Workers as nice as the clusters that jobs start: behind the other process of the suite they would wait for each other.
    ray.init(
        address="local", num_cpus=6, include_dashboard=False, object_store_memory=200_000_000, logging_level="error",
        _system_config={"worker_niceness": 0},
    )  # fmt: skip
    yield
    # A thread of a pass that was given up may still ask for its results. It would start another cluster, and end the process when that has none.
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False
    ray.shutdown()


@pytest.fixture(scope="session")
def preset() -> Pipeline:
    """The tiny preset."""
    return PRESETS["tiny"][1]


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, preset: Pipeline, mlflow_db: Path) -> Path:
    """An output folder with corpus, pairs and activations of the tiny preset."""
    import dataclasses
    import shutil

    from sarm.engine.session import open_session
    from sarm.settings.run import RunSettings
    from sarm.stages.extract import extract
    from sarm.stages.prepare import prepare

    run = RunSettings(out=tmp_path_factory.mktemp("run") / "tiny", cpus_per_worker=1)
    shutil.copy(mlflow_db, run.out.parent / "mlflow.db")
    with open_session(dataclasses.replace(preset, run=run)) as session:
        prepare(session, preset.data)
        extract(session, preset.model, preset.extraction)
    return run.out
