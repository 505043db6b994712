"""Progress lines: what trainings and passes print is read back, and nothing else is taken for it."""

import types

import pytest
from tests.engine.test_pass_progress import BLOCK

from sarm.engine.live.library_lines import LibraryLines
from sarm.engine.live.progress_line import Progress, bare, count, pass_line, read, training_line
from sarm.engine.ray.pass_progress import PassProgress
from sarm.engine.terminal import say


def test_what_a_training_prints_is_read_back(capsys) -> None:
    from sarm.engine.ray.training_progress import Progress as Training

    tracking = types.SimpleNamespace(log_metrics=lambda *_, **__: None)
    training = Training("sae_text", tracking, ("loss", "fvu"), "d512 k8")  # type: ignore[arg-type]
    training(1, {"progress": 0.02, "loss": 0.15534, "fvu": 0.5})
    training(48, {"progress": 1.0, "loss": 0.02088, "other": 1.0})
    first, last = capsys.readouterr().out.splitlines()
    assert read(first) is not None
    assert first.startswith("sae_text d512 k8   2%  step 1  loss 0.1553  fvu 0.5")
    assert read(last) == Progress("sae_text d512 k8", 1.0, 48, "", ("loss 0.02088",), 0.0)


@pytest.mark.parametrize("use_gpu", [False, True])
def test_what_a_pass_prints_is_read_back(capsys, use_gpu: bool) -> None:
    progress = PassProgress("extract chat ends", 4000, None, num_actors=2, threads=2, use_gpu=use_gpu)
    progress.add(BLOCK | {"rows": 1000})
    progress.end()
    found = read(capsys.readouterr().out.rstrip("\n"))
    assert found is not None
    assert found[:4] == ("extract chat ends", 0.25, None, "1,000 of 4,000 rows")
    gpu = ["GPU 40% busy, 7.0 GB"] if use_gpu else []
    assert found.figures == ("90 tokens/s", "padding 10.0%", *gpu, "CPU 38% busy, 2.0 GB")
    assert found.seconds_left == 30


def test_a_count_that_is_said_is_progress_too(capsys) -> None:
    say(f"{count(1200, 4800, 'latents')} explained")
    assert read(capsys.readouterr().out.rstrip("\n")) == Progress("", 0.25, None, "1,200 of 4,800 latents", (), None)


def test_lines_without_time_left_and_lines_of_ray_s_own_way_are_read() -> None:
    line = training_line("sarm", 0.06, 49, ["loss 0.1662"], None)
    assert line == "sarm   6%  step 49  loss 0.1662"
    wanted = Progress("sarm", 0.06, 49, "", ("loss 0.1662",), None)
    assert read(line) == read(f"\x1b[36m(RayTrainWorker pid=17, ip=192.0.2.2)\x1b[0m {line}") == wanted
    assert bare("(a note) stays") == "(a note) stays"
    passed = pass_line("score with sarm", 1, 2, "rows", ["5 tokens/s"], 3.4)
    assert passed == "score with sarm 1 of 2 rows  5 tokens/s  3 s left"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[18:30:18] budget: passes of 1,024 tokens in float32",
        "[18:31:07] train SAE: done in 18 s",
        "[18:30:23] pairs: 120 of 40 prompts, 102 to train on and 18 held out; rejected rows: none",
        "[18:30:23] score: 3 of 4 blocks are done already",
        "[18:30:23] 3 cells to do, 2 at a time",
        "model        tiny:llama, first 1 of 2 blocks, float32",
        "train_sae            to do    15 s      < 0.01   600 MB    4.8 MB    < 1 MB",
        "│  SARM                                      100.0 %  61.0 % to 100.0 %        │",
        "sae_text goes on after step 12",
        "no latents of 0 of 0 rows  x",
    ],
)
def test_other_lines_are_no_progress(line: str) -> None:
    assert read(line) is None


@pytest.fixture
def gathered(tmp_path) -> LibraryLines:
    return LibraryLines(tmp_path / "new" / ".run.warnings.log")


def test_warnings_of_libraries_go_to_a_file_that_is_named(gathered, tmp_path) -> None:
    warned = [
        "2026-11-30 18:30:24,555\tWARNING authentication_token_setup.py:85 -- Token authentication is enabled.",
        "/usr/lib/python3.11/site-packages/torch/cuda.py:63: FutureWarning: The pynvml package is deprecated.",
        "  import pynvml",
        "2026/11/30 18:30:24 INFO mlflow.store.db.utils: Updating database tables",
        "[2026-11-30 18:30:24,123] [WARNING] [real_accelerator.py:162:get_accelerator] no accelerator",
        "[2026-11-30 18:30:30,903 W 2217 3224] core_worker.cc:24: retried",
        "[rank0]:[W1130 18:30:24.123456 ProcessGroup.cpp:1250] Warning: not destroyed",
    ]
    assert gathered.told() == ""
    assert all(gathered.takes(f"{line}\n") for line in warned)
    path = tmp_path / "new" / ".run.warnings.log"
    assert path.read_text().splitlines() == warned
    assert gathered.told() == f"6 warnings of libraries: {path}"


@pytest.mark.parametrize(
    "line",
    [
        "[2026-11-30 18:30:30,903 E 2217 3224] core_worker.cc:2465: the node has died",
        "2026-11-30 18:30:24,555\tERROR worker.py:1 -- out of memory",
        "/home/a/sarm/data/store/checkpoints.py:138: UserWarning: Going on from step 3 instead.",
        "  import pynvml",
        "error: the disk is full",
        "[18:30:18] budget: passes",
    ],
)
def test_errors_and_what_we_warn_of_ourselves_stay_on_the_screen(gathered, line: str) -> None:
    assert not gathered.takes(line)
    assert gathered.told() == ""


def test_where_no_file_can_be_written_warnings_stay_on_the_screen(tmp_path) -> None:
    (tmp_path / "file").touch()
    assert not LibraryLines(tmp_path / "file" / "log").takes("2026-11-30 18:30:24,555 WARNING a.py:1 -- b")
