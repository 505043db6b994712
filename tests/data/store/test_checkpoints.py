import json
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sarm.data.store.checkpoints import Checkpoints, Written
from sarm.data.store.state_tree import join_state, random_state, restore_random_state, split_state
from sarm.settings.checks import UserError

IDENTITY = {"lr": 0.1, "inputs": {"activations": "abc"}}


def state_of(step: int) -> dict:
    """A small training state that differs at every step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {"W": torch.randn(3, 4, generator=generator).T, "count": torch.tensor(step)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "betas": (0.9, 0.999)},
        "losses": [1.0 / (step + 1), None, True, "text"],
    }


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def states(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "training", IDENTITY)


def test_a_state_comes_back_with_its_types_layouts_and_bits(states):
    states.save(7, {"shared": state_of(7), "rank-0": {"random": random_state()}})
    found = states.latest()
    assert (found.step, found.parts) == (7, ("rank-0", "shared"))
    assert equal(found.read("shared"), state_of(7))
    wanted = torch.rand(3)
    restore_random_state(found.read("rank-0")["random"])
    assert torch.equal(torch.rand(3), wanted)
    with pytest.raises(UserError, match="has no part rank-1, it has rank-0, shared"):
        found.read("rank-1")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int64, torch.uint8])
def test_tensors_of_any_kind_and_size_come_back(dtype):
    shared = torch.arange(12).to(dtype)
    state = [
        shared,
        shared[2:5],
        shared.view(3, 4).T,
        shared.view(2, 3, 2).permute(2, 0, 1),
        shared[:0],
        shared.sum().to(dtype),
    ]
    assert equal(join_state(*split_state(state)), state)


def test_keys_that_look_like_marks_and_numbers_are_kept():
    state = {"__tensor__": 1, "a": {3: (1, 2), "3": [None], False: float("inf")}}
    assert equal(join_state(*split_state(state)), state)


def test_an_adam_that_is_saved_and_read_goes_on_bit_for_bit(states):
    def start():
        weight = torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).T)
        return weight, torch.optim.Adam([weight], lr=0.1, fused=True)

    def steps(weight, optimizer, numbers):
        for number in numbers:
            (weight * torch.arange(15.0).view(3, 5) * number).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = start()
    steps(whole, optimizer, range(1, 5))
    weight, optimizer = start()
    steps(weight, optimizer, range(1, 3))
    states.save(2, {"shared": {"weight": weight, "optimizer": optimizer.state_dict()}})
    found = states.latest().read("shared")
    weight, optimizer = start()
    weight.data.copy_(found["weight"])
    optimizer.load_state_dict(found["optimizer"])
    steps(weight, optimizer, range(3, 5))
    assert torch.equal(weight, whole)


def test_what_is_no_state_is_refused(states):
    with pytest.raises(TypeError, match="a training state holds"):
        states.save(1, {"shared": {"model": object()}})
    assert states.latest() is None


def test_nothing_saved_is_none_and_the_last_two_are_kept(states):
    assert states.latest() is None
    for step in (3, 20, 100):
        states.save(step, {"shared": state_of(step)})
    assert [path.name for path in sorted(states.folder.iterdir())] == ["step-000000020", "step-000000100"]
    assert states.latest().step == 100
    states.delete()
    assert states.latest() is None


def test_a_state_of_another_training_is_refused_by_the_name_of_what_differs(states):
    states.save(1, {"shared": state_of(1)})
    other = Checkpoints(states.folder, {**IDENTITY, "inputs": {"activations": "other"}})
    with pytest.raises(
        UserError, match=r"made with inputs\.activations='abc', now asked for inputs\.activations='other'"
    ):
        other.latest()
    assert states.latest().step == 1, "and nothing is lost"


def test_a_save_that_breaks_off_leaves_the_state_before_it(states, monkeypatch):
    states.save(1, {"shared": state_of(1)})
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(self.name)
        if self.name == ".step-000000002":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        states.save(2, {"shared": state_of(2)})
    monkeypatch.undo()
    assert calls
    assert states.latest().step == 1
    states.save(3, {"shared": state_of(3)})
    assert sorted(path.name for path in states.folder.iterdir()) == ["step-000000001", "step-000000003"]


def test_a_full_disk_is_an_error_of_every_worker_and_loses_nothing(states, monkeypatch):
    states.save(1, {"shared": state_of(1)})

    def everyone(value):
        other = Written({}, "No space left on device") if isinstance(value, Written) else value
        return [value, other]

    with pytest.raises(OSError, match=r"step 2 could not be written .*No space left on device"):
        states.save(2, {"shared": state_of(2)}, everyone)
    assert [path.name for path in states.folder.iterdir()] == ["step-000000001"]


def test_workers_write_their_own_parts_into_one_state(states):
    """Two workers one after the other, each told what both wrote, as an all-gather does."""
    written: list[Written] = []

    def gather_of(rank):
        def everyone(value):
            if isinstance(value, Written):
                written.append(value)
                return written
            return [value]

        return everyone

    states.save(5, {"rank-1": state_of(1)}, gather_of(1), is_first=False)
    assert states.latest() is None, "before the first worker has committed it"
    states.save(5, {"rank-0": state_of(0), "shared": state_of(5)}, gather_of(0))
    found = states.latest()
    assert found.parts == ("rank-0", "rank-1", "shared")
    assert equal(found.read("rank-1"), state_of(1))


def test_a_part_on_another_machine_is_noticed_before_the_state_is_used(states):
    def everyone(value):
        return [value, Written({"rank-1.json": "0" * 64}, None)] if isinstance(value, Written) else [value]

    with pytest.raises(OSError, match="the folder must be one that all workers share"):
        states.save(1, {"rank-0": state_of(0)}, everyone)
    assert states.latest() is None


def damage(folder: Path, other: Path, chance: random.Random) -> str:
    """One random fault in the newest state; returns what it was."""
    path = chance.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    kind = chance.choice(
        ["flip", "flip", "flip", "truncate", "delete", "rename", "empty", "swap", "older", "append", "stray"]
    )
    if kind == "flip":
        place = chance.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :])
    elif kind == "truncate":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "delete":
        path.unlink()
    elif kind == "rename":
        path.rename(path.with_name(f"x{path.name}"))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "swap":
        another = chance.choice([p for p in sorted(folder.iterdir()) if p != path])
        path.write_bytes(another.read_bytes())
        another.write_bytes(content)
    elif kind == "older":
        path.write_bytes((other / path.name).read_bytes())
    elif kind == "append":
        path.write_bytes(content + b"\n")
    else:
        (folder / "rank-9.json").write_text("{}")
    return f"{kind} {path.name}"


def test_600_random_faults_are_all_noticed_and_the_state_before_is_used(tmp_path):
    chance = random.Random(0)
    saved = Checkpoints(tmp_path / "saved", IDENTITY)
    for step in (1, 2):
        saved.save(step, {"shared": state_of(step), "rank-0": state_of(step + 10)})
    kinds = set()
    for number in range(600):
        folder = tmp_path / "damaged"
        shutil.copytree(saved.folder, folder)
        fault = damage(folder / "step-000000002", folder / "step-000000001", chance)
        kinds.add(fault.split()[0])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = Checkpoints(folder, IDENTITY).latest()
        assert found.step == 1, f"fault {number}: {fault}"
        assert "Going on from step 1 instead" in str(said[0].message), fault
        shutil.rmtree(folder)
    assert equal(saved.latest().read("shared"), state_of(2)), "without a fault the newest is used"
    assert len(kinds) == 9


def test_with_no_whole_state_training_does_not_silently_start_over(states):
    for step in (1, 2):
        states.save(step, {"shared": state_of(step)})
    for folder in states.folder.iterdir():
        (folder / "shared.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no training state in .* is whole: .*shared\.safetensors has changed.*Delete the folder"
    ):
        states.latest()


def test_a_folder_under_another_step_s_name_is_not_used(states):
    states.save(1, {"shared": state_of(1)})
    shutil.copytree(states.folder / "step-000000001", states.folder / "step-000000009")
    with pytest.warns(UserWarning, match="holds checkpoint/v1 of step 1"):
        assert states.latest().step == 1


def test_saving_again_after_falling_back_replaces_what_is_damaged(states):
    for step in (1, 2):
        states.save(step, {"shared": state_of(step)})
    (states.folder / "step-000000002" / "shared.json").write_text("{}")
    with pytest.warns(UserWarning, match="Going on from step 1"):
        states.latest()
    states.save(2, {"shared": state_of(2)})
    assert equal(states.latest().read("shared"), state_of(2))
    assert sorted(path.name for path in states.folder.iterdir()) == ["step-000000001", "step-000000002"]


def test_the_files_are_what_other_tools_read(states):
    states.save(1, {"shared": state_of(1)})
    folder = states.folder / "step-000000001"
    assert {path.name for path in folder.iterdir()} == {
        "shared.safetensors", "shared.json", "manifest.json", "manifest.json.sha256",
    }  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["schema"], manifest["step"], manifest["identity"]) == ("checkpoint/v1", 1, IDENTITY)


def test_a_process_that_dies_while_a_thread_writes_leaves_the_state_before_it(states):
    """The state is copied first: what training changes while it is written does not get into it."""
    script = f"""
import os, threading
import torch
from pathlib import Path
from sarm.data.store import checkpoints
states = checkpoints.Checkpoints(Path({str(states.folder)!r}), {IDENTITY!r})
weight = torch.ones(3)
copied = checkpoints.snapshot({{"shared": {{"weight": weight}}}})
weight.zero_()
states.commit(1, states.write(1, copied))
checkpoints._to_disk = lambda path: os._exit(9)
thread = threading.Thread(target=states.write, args=(2, checkpoints.snapshot({{"shared": {{"weight": weight}}}})))
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr[-2000:]
    assert (states.folder / ".step-000000002").is_dir(), "it died in the middle"
    found = states.latest()
    assert (found.step, found.read("shared")["weight"].tolist()) == (1, [1, 1, 1])
    states.save(3, {"shared": state_of(3)})
    assert sorted(path.name for path in states.folder.iterdir()) == ["step-000000001", "step-000000003"]


def test_a_request_to_stop_is_seen_by_all_who_share_the_folder_and_can_be_withdrawn(states):
    other = Checkpoints(states.folder, IDENTITY)
    assert not other.is_stop_requested()
    states.request_stop()
    assert other.is_stop_requested()
    states.save(1, {"shared": state_of(1)})
    assert (other.is_stop_requested(), other.newest_step()) == (True, 1)
    other.withdraw_stop()
    assert not states.is_stop_requested()
