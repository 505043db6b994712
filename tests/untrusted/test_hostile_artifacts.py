"""Artifacts that somebody made to run code, read other files or fill the memory: none does, and each is refused in one line.

What would run leaves a trace: a file that must not be there at the end.
"""

import io
import json
import pickle
import resource
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from tests.untrusted.small_run import refinish
from tests.untrusted.world import World

HOSTILE: dict[str, Callable[[World, "Trap"], None]] = {}


class Trap:
    """Unpickled, it writes the trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))

    @property
    def code(self) -> str:
        """Python that writes the trace."""
        return f"open({str(self.trace)!r}, 'w')"


def hostile(name: str) -> Callable[[Callable[[World, Trap], None]], None]:
    def add(check: Callable[[World, Trap], None]) -> None:
        HOSTILE[name] = check

    return add


@hostile("pickle in a .pt file")
def _(world: World, trap: Trap) -> None:
    torch.save({"W_enc": trap}, world.tmp / "new.pt")
    torch.save({"W_enc": trap}, world.tmp / "old.pt", _use_new_zipfile_serialization=False)
    world.file("plain.pt", pickle.dumps(trap))
    for name in ("new.pt", "old.pt", "plain.pt"):
        world.refuses("more than tensors", of=("convert_sae", world.tmp / name, world.tmp / "converted"))


@hostile("pickle in ae.pt of a dictionary_learning folder")
def _(world: World, trap: Trap) -> None:
    (world.tmp / "sae").mkdir()
    torch.save({"encoder.weight": trap}, world.tmp / "sae" / "ae.pt")
    (world.tmp / "sae" / "config.json").write_text('{"trainer": {"k": 3}}')
    world.refuses("more than tensors", of=("convert_sae", world.tmp / "sae", world.tmp / "converted"))


@hostile("pickle in pytorch_model.bin")
def _(world: World, trap: Trap) -> None:
    folder = world.model()
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": trap}, folder / "pytorch_model.bin")
    world.run(without=("activations", "sae", "sarm"))
    world.refuses("a pickle", of=("extract_activations", "tiny", "--model.name", folder))
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "num_labels": 1, "id2label": {"0": "x"}})
    )
    world.refuses("holds more than tensors", of=("evaluate", "--model", folder, "--benchmarks", "pairs=tiny:pairs"))


@hostile("objects in an .npz file")
def _(world: World, trap: Trap) -> None:
    import numpy as np

    path = world.tmp / "texts.npz"
    np.savez(path, text=np.array([trap], dtype=object))
    world.refuses("unknown extension", of=("prepare_data", "tiny", "--data.texts", path))
    world.refuses("no known SAE", of=("convert_sae", path, world.tmp / "converted"))


@hostile("Parquet with pickled extension metadata and objects")
def _(world: World, trap: Trap) -> None:
    payload = pickle.dumps(trap)
    for name in (
        b"ray.data.arrow_pickled_object",
        b"ray.data.arrow_variable_shaped_tensor",
        b"arrow.py_extension_type",
    ):
        metadata = {b"ARROW:extension:name": name, b"ARROW:extension:metadata": payload}
        pair = [pa.field(column, pa.string()) for column in ("prompt", "chosen", "rejected")]
        field = pa.field("subset", pa.binary(), metadata=metadata)
        values = [pa.array(["q"]), pa.array(["yes"]), pa.array(["no"]), pa.array([payload])]
        pq.write_table(pa.table(values, schema=pa.schema([*pair, field])), world.tmp / "evil.parquet")
        world.refuses("extension type", of=("prepare_data", "tiny", "--data.pairs", world.tmp / "evil.parquet"))


@hostile("config and tokenizer with code of their own")
def _(world: World, trap: Trap) -> None:
    folder = world.model()
    (folder / "evil.py").write_text(trap.code)
    world.run(without=("activations", "sae", "sarm"))
    for name, code in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModel": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", None]}),
    ):
        plain = (folder / name).read_text()
        (folder / name).write_text(json.dumps({**json.loads(plain), "auto_map": code, "model_type": "evil"}))
        world.refuses(name, "auto_map", of=("extract_activations", "tiny", "--model.name", folder))
        (folder / name).write_text(plain)


@hostile("a reward model whose own code was changed")
def _(world: World, trap: Trap) -> None:
    card = ("--prompt", "hello", "--response", "good day", "--out", world.tmp / "card.html")
    folder = world.run(without=()) / "sarm"
    for path in folder.glob("*.py"):
        path.write_text(trap.code)
    pairs = world.lines("p.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    world.refuses(
        ".py has changed",
        of=("evaluate", "--model", folder, "--benchmarks", f"pairs={pairs}", "--out", world.tmp / "b"),
    )
    # Even believed, its code is not what computes.
    refinish(folder, "sarm/v1")
    assert world.job("reward_card", "--model", folder, *card).code == 0


@hostile("safetensors whose header lies")
def _(world: World, trap: Trap) -> None:
    del trap
    run = world.run()
    weights = run / "sae" / "sae_weights.safetensors"
    body = weights.read_bytes()
    length = struct.unpack("<Q", body[:8])[0]
    header = json.loads(body[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")

    def written(**fields: object) -> bytes:
        changed = json.dumps({**header, first: {**header[first], **fields}}).encode()
        return struct.pack("<Q", len(changed)) + changed + body[8 + length :]

    for content in (
        struct.pack("<Q", 1 << 62) + body[8:],
        written(data_offsets=[0, 1 << 40]),
        written(shape=[1 << 31, 1 << 31]),
        written(dtype="PICKLE"),
    ):
        weights.write_bytes(content)
        refinish(run / "sae", "sae/v1")
        world.refuses("sae is not a readable SAE", of=("train_sarm", "tiny", "--only"))


@hostile("chat template that looks for the interpreter")
def _(world: World, trap: Trap) -> None:
    folder = world.model()
    world.run(without=("activations", "sae", "sarm"))
    for template in (
        "{{ cycler.__init__.__globals__.os.popen('touch " + str(trap.trace) + "').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
    ):
        (folder / "chat_template.jinja").write_text(template)
        world.refuses("chat template", of=("extract_activations", "tiny", "--model.name", folder))


@hostile("tar whose members lead out of it")
def _(world: World, trap: Trap) -> None:
    path = world.tmp / "texts.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind, target in (
            ("../trace", tarfile.REGTYPE, ""),
            (str(trap.trace), tarfile.REGTYPE, ""),
            ("link.jsonl", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.jsonl", tarfile.LNKTYPE, "/etc/passwd"),
            ("device.jsonl", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"{}\n"))
    world.refuses("holds ../trace", of=("prepare_data", "tiny", "--data.texts", path), keeps=True)
    assert not (world.tmp.parent / "trace").exists()


@hostile("zst of 256 MB in one line")
def _(world: World, trap: Trap) -> None:
    del trap
    packed = zstandard.ZstdCompressor(level=1).compressobj(size=1 << 28)
    block = bytes(1 << 24)
    path = world.tmp / "bomb.jsonl.zst"
    path.write_bytes(b"".join(packed.compress(block) for _ in range(16)) + packed.flush())
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    world.refuses("1 line_too_long, first", of=("prepare_data", "tiny", "--data.texts", path), keeps=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18, "less kB than the line has"


@hostile("manifest that names files elsewhere")
def _(world: World, trap: Trap) -> None:
    del trap
    run = world.run()
    fields = json.loads((run / "pairs" / "manifest.json").read_text())
    fields.pop("checksum")
    for name in ("../sae/cfg.json", "/etc/passwd", "..", "a\\..\\b", "nul\0", ""):
        (run / "pairs" / "manifest.json").write_text(json.dumps({**fields, "files": {name: "0" * 64}}))
        world.refuses("no file of this folder", of=("train_sarm", "tiny", "--only"))


@hostile("training state with a file more")
def _(world: World, trap: Trap) -> None:
    from tests.untrusted.small_run import STATES

    from sarm.data.store.checkpoints import Checkpoints

    state = world.run() / "training" / "sarm" / "step-000000002"
    (state / "rank-1.pkl").write_bytes(pickle.dumps(trap))
    with pytest.warns(UserWarning, match=r"rank-1\.pkl is not of this state.*Going on from step 1"):
        assert Checkpoints(state.parent, STATES).latest().step == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_artifact_is_refused_and_runs_nothing(name: str, world: World) -> None:
    trap = Trap(world.tmp / "trace")
    HOSTILE[name](world, trap)
    assert not trap.trace.exists(), "its code ran"


def test_the_trap_snaps(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "trace")
    pickle.loads(pickle.dumps(trap))
    assert trap.trace.exists()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    exec(trap.code)
    assert trap.trace.exists()
