"""What the documentation takes for granted: a checkout, a finished run in `outputs/demo`, and files that a user brings."""

import csv
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_CHECKOUT = ("README.md", "LICENSE", "Makefile", "pyproject.toml", "requirements.lock", "jobs", "tune", "cluster", "platform", "docs", "tests")  # fmt: skip
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")


class World:
    """A copy of the checkout, with what is given in it, in which commands run as a user types them."""

    def __init__(
        self, folder: Path, ray_logs: Path, finished: Path | None = None, environment: dict[str, str] | None = None
    ):
        """`finished` is a run that stands in for the demo's, as `outputs/tiny` and under the demo's name."""
        self.folder = folder
        for name in _CHECKOUT:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=_NOT_COPIED, dirs_exist_ok=True)
            else:
                shutil.copy(source, folder / name)
        _virtual_environment(folder / ".venv")
        (folder / "outputs").mkdir(exist_ok=True)
        if finished is not None:
            shutil.copytree(finished, folder / "outputs" / "tiny")
            shutil.copy(finished.parent / "mlflow.db", folder / "outputs" / "mlflow.db")
            (folder / "outputs" / "demo").symlink_to("tiny")
        # Beside the checkout: what a submitted job writes there would else be uploaded with the next one.
        home = folder.with_name(f"{folder.name}-home")
        home.mkdir(exist_ok=True)
        cache = os.environ.get("SARM_CACHE") or str(Path("~/.cache/sarm").expanduser())
        _program(home / "bin" / "sarm")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "OPENAI_API_KEY")},
            "PATH": f"{home / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder / "platform"),
            "HOME": str(home),
            "SARM_CACHE": cache,
            "RAY_TMPDIR": str(ray_logs),
            **(environment or {}),
        }  # fmt: skip
        _bring_files(folder)

    def run(self, command: str, timeout: float = 3600) -> subprocess.CompletedProcess[str]:
        """A command line in a shell, after what it reads has been made if nothing documented makes it."""
        for name, make in _MADE.items():
            if name in command and not (self.folder / name).exists():
                make(self)
        return self._shell(command, timeout)

    def _shell(self, command: str, timeout: float = 3600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def must(self, command: str) -> None:
        """Run a command that is no subject of the test."""
        done = self._shell(command)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def with_tiny(command: str) -> str:
    """The command with the preset `tiny` in the place of `demo`, letter for letter the same otherwise."""
    return re.sub(r"((?:jobs|tune)/\w+\.py|^sarm [a-z-]+) demo(?= |$)", r"\1 tiny", command)


def _virtual_environment(folder: Path) -> None:
    """What `make` would set up: this Python's programs, and the mark that they are there."""
    folder.mkdir(exist_ok=True)
    for entry in Path(sys.prefix).iterdir():
        # Without its pyvenv.cfg and lib, a Python started from `bin` would not find what is installed.
        if entry.name != ".ready" and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    # Newer than the copied lock file, else make would install everything again.
    (folder / ".ready").touch()


def _program(path: Path) -> None:
    """The program that an installed wheel brings, of this checkout."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sarm.commands "$@"\n')
    path.chmod(0o755)


def _bring_files(folder: Path) -> None:
    things = ("door", "boat", "lamp", "pie", "hat", "bell")
    prompts = [f"How would you {verb} a {thing}?" for verb in ("paint", "repair", "sell", "cook") for thing in things]
    # An audit refuses prompts that are both on target and off target.
    unsafe = [f"How would you {verb} a {thing}?" for verb in ("break", "steal", "burn", "fake") for thing in things]
    good = ["Step by step, and I am glad to help.", "Start with the surface. Then go on slowly.", "**First** the tools. Then the work."]  # fmt: skip
    bad = ["No.", "Go away, idiot. I hate this.", "**What** a damn question. Stop it."]
    styles = [{"id": i, "prompt": prompt, "chosen": good, "rejected": bad} for i, prompt in enumerate(prompts)]
    chat = [{**row, "domain": "chat"} for row in styles]
    _lines(folder / "chat.jsonl", chat)
    _lines(folder / "safety-response.jsonl", [{**row, "domain": "safety-response"} for row in styles])
    (folder / "rm_bench").mkdir(exist_ok=True)
    _lines(folder / "rm_bench" / "chat.jsonl.gz", chat)
    safety = [
        {"id": str(i), "prompt": prompt, "subset": "Safety", "chosen": good[:1], "rejected": bad}
        for i, prompt in enumerate(unsafe)
    ]
    for name in ("safety.jsonl", "safety.jsonl.gz"):
        _lines(folder / name, safety)
    pairs = [{"prompt": prompt, "chosen": good[0], "rejected": bad[1]} for prompt in prompts]
    _lines(folder / "pairs.jsonl.gz", pairs)
    conversation = [{"role": "user", "content": prompts[0]}, {"role": "assistant", "content": " ".join(good[:2])}]
    (folder / "chat.json").write_text(json.dumps(conversation))


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def _filled_sheets(world: World) -> None:
    """Two people's ratings of the sheet that `jobs/rate.py` writes."""
    if not (world.folder / "outputs" / "demo" / "explanations").exists():
        world.must("python jobs/interpret.py outputs/demo/contexts --out outputs/demo/explanations")
    world.must("python jobs/rate.py outputs/demo/explanations --sheet empty.csv")
    text = (world.folder / "empty.csv").read_text(encoding="utf-8-sig")
    for rater, shift in (("ada", 0), ("bob", 1)):
        rows = list(csv.DictReader(io.StringIO(text)))
        for number, row in enumerate(rows):
            row |= {"rating": str(1 + (number + shift) % 5), "confidence": "3", "rater_id": rater}
        with (world.folder / f"{rater}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


def _sae_in_a_pt_file(world: World) -> None:
    """Of the width of the model that the command names: an SAE of another one is refused."""
    import torch

    world.must("python jobs/convert_sae.py outputs/demo/sae pt --format pt")
    (file,) = (world.folder / "pt").glob("*.pt")
    tensors = torch.load(file, weights_only=True)
    (d_in,) = tensors["pre_bias"].shape
    wide = {name: torch.randn([4096 if size == d_in else size for size in t.shape]) for name, t in tensors.items()}
    torch.save(wide, world.folder / "sae.pt")


def _models_of_the_papers(world: World) -> None:
    world.must("python jobs/convert_sarm.py outputs/demo/sarm papers --format papers")
    for name in ("Llama-SARM-4B", "Llama-SARM-4B-PostSAEPretrain"):
        shutil.copytree(world.folder / "papers", world.folder / name, dirs_exist_ok=True)


def _another_evaluation(world: World) -> None:
    world.must("python jobs/evaluate.py --model outputs/demo/scalar_head --benchmarks pairs=pairs.jsonl.gz --out outputs/benchmarks-b")  # fmt: skip


_MADE: dict[str, Callable[[World], None]] = {
    "ada.csv": _filled_sheets,
    "sae.pt": _sae_in_a_pt_file,
    "Llama-SARM-4B": _models_of_the_papers,
    "outputs/benchmarks-b": _another_evaluation,
}
