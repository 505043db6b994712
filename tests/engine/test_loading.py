"""A process that loads gives signs of life as long as it gets anywhere, and none while it hangs."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest

from sarm.engine.ray import loading as module
from sarm.engine.ray.loading import LOADING, loading
from sarm.engine.ray.watching import Limits, Watched, watched
from sarm.settings.checks import StalledError


def reads(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(1 << 22))
    (folder / "weights").read_bytes()


def computes(_: Path) -> None:
    sum(i * i for i in range(400_000))


def hangs(_: Path) -> None:
    time.sleep(0.5)


def _signs_while(works: Callable[[Path], None], folder: Path) -> set[str]:
    """The different signs of three seconds' loading."""
    module._BEAT_SECONDS = 0.25
    seen = set()
    with loading(folder / "signs"):
        ended = time.monotonic() + 3
        while time.monotonic() < ended:
            works(folder)
            seen |= {path.read_text() for path in (folder / "signs").glob(f"{LOADING}*.json")}
    return seen


@pytest.mark.parametrize(("works", "lives"), [(reads, True), (computes, True), (hangs, False)])
def test_signs_come_while_a_load_gets_anywhere(works: Callable[[Path], None], lives: bool, tmp_path: Path) -> None:
    # In a process of its own: threads that earlier tests left in this one compute too.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        seen = alone.submit(_signs_while, works, tmp_path).result()
    assert (len(seen) > 3) == lives, seen
    assert not list((tmp_path / "signs").iterdir()), "what is loaded leaves no sign"


@pytest.mark.parametrize("error", [psutil.AccessDenied, AttributeError])
def test_a_system_that_does_not_tell_what_is_read_shows_what_computes(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_: psutil.Process) -> None:
        raise error

    monkeypatch.setattr(psutil.Process, "io_counters", refuses)
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.1)
    (sign,) = _signs_of(tmp_path)
    assert int(sign) > 0


def _signs_of(folder: Path) -> set[str]:
    """The last sign of a second's computing."""
    last = set()
    with loading(folder):
        ended = time.monotonic() + 1
        while time.monotonic() < ended:
            computes(folder)
            last = {path.read_text() for path in folder.glob(f"{LOADING}*.json")} or last
    return last


def test_before_the_first_block_the_longer_limit_holds_whatever_an_earlier_run_left(
    ray_cluster: None, tmp_path: Path
) -> None:
    (tmp_path / "000003.json").write_text('{"pid": 1, "host": "gone"}')
    seen = Watched(name="pass", blocks=(), signs=tmp_path, num_actors=1, threads=1, use_gpu=False)

    def nothing() -> list[dict[str, object]]:
        time.sleep(60)
        return []

    started = time.monotonic()
    with pytest.raises(StalledError, match="nothing has happened for 4 s"):
        list(watched(nothing, seen, Limits(stall=0.4, start=4.0)))
    assert time.monotonic() - started >= 4


def test_from_the_first_block_on_the_shorter_one_does(ray_cluster: None, tmp_path: Path) -> None:
    def one() -> object:
        yield {"rows": 1}
        time.sleep(60)

    seen = Watched(name="pass", blocks=(), signs=tmp_path, num_actors=1, threads=1, use_gpu=False)
    with pytest.raises(StalledError, match="nothing has happened for 1 s"):
        list(watched(one, seen, Limits(stall=1.0, start=60.0)))  # type: ignore[arg-type]
