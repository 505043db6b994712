"""Rows 1 to 23: settings. They are flags, so what other tools ask of a settings file is asked of the JSON files that jobs are handed."""

import json
import os

import pytest
from tests.untrusted.world import Table, World

from sarm.engine.ray.room import Cluster, Node
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings

TABLE = Table()
row = TABLE.row
CARD = ("reward_card", "--model")


def card(world: World, content: str | bytes, *words: str) -> None:
    """A conversation file is refused."""
    path = world.file("chat.json", content)
    world.refuses("chat.json", *words, of=(*CARD, world.small_run / "sarm", "--conversation", path))


@row(1, "file missing / is a directory / unreadable")
def _(world: World) -> None:
    sarm = world.small_run / "sarm"
    world.refuses("none.json", of=(*CARD, sarm, "--conversation", world.tmp / "none.json"))
    world.refuses("Is a directory", of=(*CARD, sarm, "--conversation", world.tmp))
    world.refuses("no file", "none.jsonl", of=("prepare_data", "tiny", "--data.pairs", world.tmp / "none.jsonl"))
    world.refuses("is a folder", of=("prepare_data", "tiny", "--data.pairs", world.tmp))


@row(2, "empty YAML / list at top")
def _(world: World) -> None:
    card(world, "", "line 1 column 1")
    card(world, "{}", "ends with nothing")
    run = world.run()
    (run / "pairs" / "manifest.json").write_text("[]")
    world.refuses("pairs/manifest.json", "is not a manifest", of=("train_sarm", "tiny", "--only"))


@row(3, "tab indent, broken YAML")
def _(world: World) -> None:
    card(world, '[\n\t{"role": "user" "content": "a"}]', "line 2 column 18")


@row(4, "unknown key learing_rate")
def _(world: World) -> None:
    world.refuses("--reward.learing-rate", of=("train_sarm", "tiny", "--reward.learing-rate", "1"))
    world.refuses("--sae.kk", "--sae.k", of=("train_sae", "tiny", "--sae.kk", "3"))


@row(5, "duplicate key")
def _(world: World) -> None:
    world.refuses("--sae.k is given twice", of=("train_sae", "tiny", "--sae.k", "4", "--sae.k=5"))
    card(world, '[{"role": "user", "role": "system", "content": "a"}]', "'role' is given twice")


@row(6, "lr: 1e-4")
def _(world: World) -> None:
    ended = world.job("train_sarm", "tiny", "--reward.lr", "1e-4", "--dry-run", "--json")
    assert ended.code == 0
    assert '"lr": 0.0001' in ended.out


@row(7, "no, on, 010, 1.10, 12_345")
def _(world: World) -> None:
    for value in ("no", "on", "1.10", "0x10"):
        world.refuses("--sae.k", repr(value), of=("train_sae", "tiny", "--sae.k", value))
    world.refuses("no", of=("train_sarm", "tiny", "--reward.topk", "no"))
    # Python's whole numbers: ten, not eight, and never text.
    assert '"k": 10,' in world.job("train_sae", "tiny", "--sae.k", "010", "--dry-run", "--json").out


@row(8, ".nan, .inf, negative, 0 lr")
def _(world: World) -> None:
    for value in ("nan", "inf", "-1", "0"):
        world.refuses("finite and above 0", "--sae.lr", of=("train_sae", "tiny", "--sae.lr", value))


@row(9, "!!python/object tag")
def _(world: World) -> None:
    trace = world.tmp / "trace"
    tag = f"!!python/object/apply:os.system ['touch {trace}']"
    world.refuses("--sae.k", of=("train_sae", "tiny", "--sae.k", tag))
    card(world, tag, "line 1 column 1")
    assert not trace.exists()


@row(10, "alias bomb / 200 000-deep JSON")
def _(world: World) -> None:
    card(world, "[" * 200_000, "nested too deeply")
    card(world, "a: &a [" + "*a, " * 1000 + "]", "line 1 column 1")
    card(world, json.dumps([{"role": "user", "content": "x" * 2_000_000}]), "more than")


@row(11, "JSON NaN, 5000-digit int, duplicate keys")
def _(world: World) -> None:
    card(world, '[{"role": "user", "content": NaN}]', "NaN is no JSON number")
    card(world, f'[{{"role": "user", "content": {"9" * 5000}}}]', "digits")
    card(world, '[{"role": "user", "content": "a", "content": "b"}]', "'content' is given twice")


@row(12, "latents: 1000, k: 2000")
def _(world: World) -> None:
    world.refuses(
        "k must be between 1 and d_sae=1000", "2000", of=("train_sae", "tiny", "--sae.d-sae", "1000", "--sae.k", "2000")
    )


@row(13, "layer 40 of a 16-layer model")
def _(world: World) -> None:
    for job in ("extract_activations", "train_sarm", "pipeline"):
        world.refuses("layer 40", "2 blocks", "--model.layer", of=(job, "tiny", "--model.layer", "40"))


TABLE.cannot(
    14,
    "global batch not divisible by world×micro",
    "a step's prompts are dealt to the workers by tokens, so every batch size fits every number of workers",
)


@row(15, "actors need more GPUs/CPUs than cluster")
def _(world: World) -> None:
    cores = len(os.sched_getaffinity(0))
    world.run()
    wanted = ("--num-workers", "900", "--num-actors", "900")
    world.refuses("900 workers", f"the cluster has {cores}", of=("train_sarm", "tiny", *wanted))
    gpus = Cluster(nodes=(Node(32, 1), Node(32, 1)), is_local=False)
    with pytest.raises(UserError, match="8 workers need a GPU each, the cluster has 2"):
        gpus.cpus_each(RunSettings(), 8)


@row(16, "actor pool uses all CPUs")
def _(world: World) -> None:
    # Asked of a cluster that was joined: there is none to start.
    joined = Cluster(nodes=(Node(4), Node(4)), is_local=False)
    with pytest.raises(UserError, match="8 workers of 1 cores and one spare core need 9 CPUs, the cluster has 8"):
        joined.cpus_each(RunSettings(cpus_per_worker=1), 8)


@row(17, "output dir exists with other run")
def _(world: World) -> None:
    world.run()
    world.refuses("was made with k=8, now asked for k=9", "--out", of=("train_sae", "tiny", "--sae.k", "9"))
    other = world.tmp / "other"
    (other / "pairs").mkdir(parents=True)
    (other / "pairs" / "thesis.txt").write_text("mine")
    world.refuses("no stage of this platform claimed", of=("prepare_data", "tiny", "--out", other))
    assert [path.name for path in other.rglob("*")] == ["pairs", "thesis.txt"]


TABLE.cannot(
    18,
    "output on node-local disk, ≥ 2 nodes",
    "only a cluster of several nodes can be asked: tests/engine/test_cluster.py asks one's nodes for a folder that they do not see",
)


@row(19, "s3:// without credentials / wrong region")
def _(world: World) -> None:
    world.refuses("s3:/bucket/run", "mount the bucket", of=("prepare_data", "tiny", "--out", "s3://bucket/run"))
    world.refuses("unknown source s3://b/a.jsonl", of=("prepare_data", "tiny", "--data.pairs", "s3://b/a.jsonl"))


@row(20, "secret pasted in config (sk-…, hf_…)")
def _(world: World) -> None:
    for flag, secret in (
        ("--experiment", "sk-abcdefghijklmnop1234"),
        ("--model.name", "hf_ABCDEFGHIJKLMNOPQRST"),
        ("--mlflow-uri", "http://ada:hunter22@mlflow.internal:5000"),
    ):
        line = world.refuses(flag, "environment", of=("extract_activations", "tiny", flag, secret))
        assert secret not in line


@row(21, "env var reference unset ${FOO}")
def _(world: World) -> None:
    world.refuses("variable", "${FOO}", of=("prepare_data", "tiny", "--out", "${FOO}/run"))
    world.refuses("no folder of its own", of=("prepare_data", "tiny", "--out", ""))


@row(22, "run name ../../x, a/b, 300 chars, emoji, empty")
def _(world: World) -> None:
    for name in ("../../x", "a/b", "x" * 300, "🦊", ""):
        world.refuses("experiment", of=("prepare_data", "tiny", "--experiment", name))
    for name in ("../../x", "a/b", "..", ".", ""):
        world.refuses("a name is made of", of=("steer", "--name", name))
    world.refuses("longer than", of=("prepare_data", "tiny", "--out", world.tmp / ("x" * 300)))


@row(23, "checkpoint interval 0 / > steps")
def _(world: World) -> None:
    # 0 steps is the default and means by time; a time of 0 would be no interval.
    world.refuses("checkpoint_every_seconds", of=("train_sae", "tiny", "--sae.checkpoint-every-seconds", "0"))
    world.refuses("checkpoint_every_steps", of=("train_sarm", "tiny", "--reward.checkpoint-every-steps", "-1"))
