"""Rows 48 to 67: models, SAEs and training states."""

import json
import os
import pickle
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.untrusted.small_run import STATES, refinish
from tests.untrusted.world import Table, World

from sarm.data.formats.models import backbone_of
from sarm.data.store.checkpoints import Checkpoints
from sarm.engine.writer_lock import WriterLock
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings

TABLE = Table()
row = TABLE.row
WEIGHTS = "model.safetensors"


def extract(world: World, model: object, *words: str) -> str:
    """Extraction with this model is refused; the run's pairs are there already."""
    if not world.out.exists():
        world.run(without=("sarm", "activations", "sae"))
    return world.refuses(*words, of=("extract_activations", "tiny", "--model.name", model))


def converted(world: World, source: Path, *words: str) -> str:
    """An SAE file is refused."""
    line = world.refuses(*words, of=("convert_sae", source, world.tmp / "converted"))
    assert not (world.tmp / "converted").exists()
    return line


def changed_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def saved_sae(world: World) -> Path:
    """A `.pt` file as the papers write them."""
    path = world.tmp / "sae.pt"
    ended = world.job("convert_sae", world.small_run / "sae", world.tmp / "pt", "--format", "pt")
    assert ended.code == 0, ended.err
    (found,) = (world.tmp / "pt").glob("*.pt")
    return found.rename(path)


@row(48, "path absent / not a model dir")
def _(world: World) -> None:
    extract(world, world.tmp / "none", "no model folder")
    extract(world, world.small_run / "pairs", "*.safetensors")
    extract(world, "demo:gpt9", "unknown model demo:gpt9", "demo:smollm2")


@row(49, "only pytorch_model.bin")
def _(world: World) -> None:
    folder = world.model()
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    extract(world, folder, "pytorch_model.bin, a pickle", "safetensors")


@row(50, "auto_map, trust_remote_code or _attn_implementation* with / in config.json")
def _(world: World) -> None:
    folder = world.model()
    plain = (folder / "config.json").read_text()
    code = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "evil.py").write_text(f"open({str(world.tmp / 'trace')!r}, 'w')")
    for key, value in (
        ("auto_map", code),
        ("trust_remote_code", True),
        ("_attn_implementation", "owner/kernel"),
        ("_attn_implementation_internal", "owner/kernel"),
    ):
        changed_json(folder / "config.json", **{key: value})
        extract(world, folder, "config.json names code of its own", key)
        (folder / "config.json").write_text(plain)
    changed_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    extract(world, folder, "tokenizer_config.json names code of its own", "auto_map")
    assert not (world.tmp / "trace").exists()


@row(51, "no revision pinned")
def _(world: World) -> None:
    ended = world.job("extract_activations", "sarm-1b", "--dry-run")
    assert ended.code == 0
    assert "revision main may move: pin a commit with --model.revision" in ended.out
    pinned = world.job("extract_activations", "sarm-1b", "--dry-run", "--model.revision", "0" * 40)
    assert "may move" not in pinned.out


@row(52, "tokenizer ≠ model vocab")
def _(world: World) -> None:
    folder = world.model()
    changed_json(folder / "config.json", vocab_size=500)
    extract(world, folder, "tokens, its model 500")


@row(53, "safetensors truncated / header 1 TiB / empty")
def _(world: World) -> None:
    folder = world.model()
    content = (folder / WEIGHTS).read_bytes()
    for damaged in (content[:-40], struct.pack("<Q", 1 << 40) + content[8:], b"", content[:5]):
        (folder / WEIGHTS).write_bytes(damaged)
        extract(world, folder, WEIGHTS, f"({len(damaged):,} bytes)", "no whole safetensors file")


@row(54, "sharded index names a missing file, or ../x")
def _(world: World) -> None:
    folder = world.model()
    index = folder / "model.safetensors.index.json"
    for name, words in (
        ("model-00002.safetensors", "is not there"),
        ("../x", "no file of this folder"),
        ("/x", "no file"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": name}}))
        extract(world, folder, "index.json", words)


@row(55, "weights with NaN")
def _(world: World) -> None:
    # A backbone's weights are read by whoever computes with them, before its first row; an SAE's before anything starts.
    folder = world.model()
    weights = load_file(folder / WEIGHTS)
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"NaN or infinite values in layers\.0\.mlp\.up_proj\.weight"):
        backbone_of(ModelSettings(name=str(folder), layer=1), str(folder), 1, torch.float32)
    sae = world.run() / "sae"
    tensors = load_file(sae / "sae_weights.safetensors")
    tensors["W_dec"][0, 0] = torch.inf
    save_file(tensors, sae / "sae_weights.safetensors")
    refinish(sae, "sae/v1")
    world.refuses("sae_weights.safetensors", "NaN or infinite values in W_dec", of=("train_sarm", "tiny", "--only"))


@row(56, "num_labels ≠ 1, no chat template")
def _(world: World) -> None:
    pairs = world.lines("pairs.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    evaluate = ("evaluate", "--benchmarks", f"pairs={pairs}", "--model")
    world.refuses("is LlamaForCausalLM and holds no reward head", of=(*evaluate, world.tiny_model))
    folder = world.model()
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "score.weight": torch.ones(1, 64)}, folder / WEIGHTS, {"format": "pt"})
    (folder / "chat_template.jinja").unlink()
    world.refuses("no chat template", of=(*evaluate, folder))
    extract(world, folder, "no chat template")


@row(57, "architecture not in allow-list")
def _(world: World) -> None:
    folder = world.model()
    changed_json(folder / "config.json", model_type="gpt2")
    extract(world, folder, "is a gpt2 model, supported are llama")


@row(58, "truncated .pt")
def _(world: World) -> None:
    path = saved_sae(world)
    path.write_bytes(path.read_bytes()[:-2000])
    converted(world, path, "sae.pt is not a readable pt SAE")


@row(59, "empty .pt")
def _(world: World) -> None:
    converted(world, world.file("empty.pt", b""), "empty.pt is not a readable pt SAE")


@row(60, "bit flip")
def _(world: World) -> None:
    # Of a training state: the one before it is used, and said to be; of a finished folder: refused.
    run = world.run()
    part = run / "training" / "sarm" / "step-000000002" / "shared.safetensors"
    content = bytearray(part.read_bytes())
    content[-3] ^= 4
    part.write_bytes(content)
    states = Checkpoints(run / "training" / "sarm", STATES)
    with pytest.warns(UserWarning, match="has changed since it was written.*Going on from step 1"):
        assert states.latest().step == 1
    weights = run / "sae" / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    world.refuses("sae_weights.safetensors has changed", of=("train_sarm", "tiny", "--only"))


@row(61, "evil pickle")
def _(world: World) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (world.tmp / "trace",))

    torch.save({"W_enc": Evil()}, world.tmp / "zip.pt")
    for path in (world.tmp / "zip.pt", world.file("plain.pt", pickle.dumps({"W_enc": Evil()}))):
        converted(world, path, path.name, "more than tensors, or is torn; it was not opened")
    assert not (world.tmp / "trace").exists()


@row(62, "other shapes")
def _(world: World) -> None:
    run = world.run()
    changed_json(run / "sae" / "cfg.json", d_sae=99)
    refinish(run / "sae", "sae/v1")
    world.refuses("sae_weights.safetensors holds shapes", "99", of=("train_sarm", "tiny", "--only"))


@row(63, "strict=False, all keys wrong (prefix module.)")
def _(world: World) -> None:
    folder = world.small_run / "sarm"
    copy = world.tmp / "sarm"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name not in ("manifest.json", WEIGHTS):
            (copy / path.name).write_bytes(path.read_bytes())
    weights = {f"module.{name}": tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, copy / WEIGHTS, {"format": "pt"})
    flags = ("--prompt", "a", "--response", "b")
    world.refuses("does not fit its config", "got None", of=("reward_card", "--model", copy, *flags))


@row(64, "other config hash / older format version")
def _(world: World) -> None:
    run = world.run()
    with pytest.raises(UserError, match=r"was made with config\.lr=0\.1, now asked for config\.lr=0\.2"):
        Checkpoints(run / "training" / "sarm", {"config": {"lr": 0.2}, "inputs": {}}).latest()
    changed_json(run / "pairs" / "manifest.json", schema="pairs/v0", checksum=None)
    world.refuses("expected pairs/v1", "got pairs/v0", of=("train_sarm", "tiny", "--only"))


TABLE.cannot(
    65,
    "ZeRO world size differs",
    "states are written by parameter, not by rank, and any number of workers reads them: tests/stages/test_resume.py",
)


@row(66, "latest missing")
def _(world: World) -> None:
    # There is no such file: states are found by their names. None at all is a start, none that is whole an error.
    states = Checkpoints(world.run() / "training" / "sarm", STATES)
    for folder in states.folder.iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no training state in .* is whole"), warnings.catch_warnings():
        states.latest()
    assert Checkpoints(world.tmp / "new", STATES).latest() is None


@row(67, "two writers in one dir")
def _(world: World) -> None:
    with WriterLock(world.run() / "sarm", "another job"):
        line = world.refuses("sarm is being written by another job", of=("train_sarm", "tiny", "--only"))
    assert str(os.getpid()) in line
