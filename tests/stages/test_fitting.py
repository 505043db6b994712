"""Settings that are left to the device are filled in before anything looks at them, and what is finished keeps its own."""

import json
from dataclasses import replace

import pytest
from tests.stages.random_sarm import random_sarm

from sarm.engine.ray.machine import Machine, cluster_machine
from sarm.settings.audit import AuditFeatures
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.budget import Device
from sarm.settings.jobs import PrepareData
from sarm.settings.presets import PRESETS
from sarm.settings.run import RunSettings
from sarm.stages import audit_folder, benchmark
from sarm.stages.fitting import fitted, reading_budget

H100 = Machine(64, 8, "H100", gpu_memory_gb=85.0)


def config(name, tmp_path, **run):
    found = PRESETS[name][1]
    return replace(found, run=replace(found.run, out=tmp_path, **run))


def test_the_demo_is_on_cores_what_it_was_and_on_a_gpu_what_that_holds(tmp_path):
    cores = fitted(config("demo", tmp_path), Machine(2)).config
    assert (cores.model.dtype, cores.reward.precision) == ("float32", "float32")
    assert (cores.extraction.batch_tokens, cores.reward.batch_tokens, cores.contexts.batch_tokens) == (2048,) * 3
    assert (cores.reward.zero_stage, cores.reward.gradient_checkpointing) == (0, False)
    cards, lines = fitted(config("demo", tmp_path), H100)
    assert (cards.model.dtype, cards.reward.precision) == ("bfloat16", "bfloat16")
    assert (cards.extraction.batch_tokens, cards.contexts.batch_tokens) == (65536, 65536)
    assert cards.reward.batch_tokens == 16384
    assert len(lines) == 2
    assert "passes of 65,536 tokens in bfloat16" in lines[0]
    assert lines[1].startswith("training of 16,384 tokens a pass in bfloat16, ZeRO 0")
    assert fitted(cards, Machine(2)).config == cards, "what is filled in stays"


def test_flags_go_over_what_fits(tmp_path):
    asked = config("demo", tmp_path)
    asked = replace(asked, model=replace(asked.model, dtype="float32"), extraction=replace(asked.extraction, batch_tokens=4096))  # fmt: skip
    found = fitted(asked, H100).config
    assert (found.model.dtype, found.extraction.batch_tokens) == ("float32", 4096)
    off = fitted(config("demo", tmp_path, use_gpu="no"), H100).config
    assert (off.model.dtype, off.extraction.batch_tokens) == ("float32", 2048)


def test_a_run_goes_on_in_the_dtype_that_it_began_with(tmp_path):
    for name, made in {"activations/chat": {"compute_dtype": "bfloat16"}, "sarm": {"precision": "bfloat16"}}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"config": made}))
    found = fitted(config("demo", tmp_path), Machine(2)).config
    assert (found.model.dtype, found.reward.precision) == ("bfloat16", "bfloat16")
    (tmp_path / "sarm" / "manifest.json").write_text(json.dumps({"config": {"precision": "bfloat16", "zero_stage": 3}}))
    assert fitted(config("sarm-4b", tmp_path), H100).config.reward.zero_stage == 3, (
        "and the stage that it was raised to"
    )


PLACES = {
    "sarm/manifest.json": ("config",),
    "training/sarm/step-000000042/manifest.json": ("identity", "config"),
    "sweep.json": ("reward",),
}


@pytest.mark.parametrize("place", PLACES, ids=["finished", "begun", "swept"])
@pytest.mark.parametrize(("began_on", "goes_on_on"), [(8, 1), (1, 8), (8, 0)])
def test_a_training_keeps_dtype_and_stage_on_another_number_of_gpus(place, began_on, goes_on_on, tmp_path):
    def of(gpus):
        machine = H100._replace(num_gpus=gpus) if gpus else Machine(2)
        asked = config("sarm-4b", tmp_path)
        return fitted(replace(asked, reward=replace(asked.reward, precision="auto")), machine).config.reward

    began = of(began_on)
    about = {"precision": began.precision, "zero_stage": began.zero_stage}
    said = about
    for key in reversed(PLACES[place]):
        said = {key: said}
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(json.dumps(said))
    found = of(goes_on_on)
    assert {"precision": found.precision, "zero_stage": found.zero_stage} == about


@pytest.mark.parametrize(("gpus", "stage", "memory"), [(1, 3, "69 GB"), (8, 2, "29 GB")])
def test_the_papers_largest_model_takes_the_stage_that_fits(gpus, stage, memory, tmp_path):
    found, lines = fitted(config("sarm-4b", tmp_path), Machine(64, gpus, "H100", gpu_memory_gb=85.0))
    assert found.reward.zero_stage == stage
    assert (found.reward.batch_tokens, found.reward.gradient_checkpointing) == (8192, True)
    assert "does not fit" not in lines[1]
    small = fitted(config("sarm-4b", tmp_path), Machine(64, 1, "L4", gpu_memory_gb=24.0)).lines[1]
    assert "that does not fit: take more GPUs" in small


def test_gpus_that_are_known_by_their_kind_alone_have_the_memory_of_the_smallest(tmp_path):
    told = {"CPU": 64.0, "GPU": 8.0, "node:10.0.0.1": 1.0, "node:__internal_head__": 1.0}
    for kind, memory in {"A100-80G": 85.0, "A100": 42.0, "H100": 85.0, "L4": 24.0}.items():
        machine = cluster_machine(told | {f"accelerator_type:{kind}": 1.0}, "there")
        assert machine.device("auto") == Device(memory), kind
    assert cluster_machine(told, "there").device("auto").gpu_memory_gb == 24.0, (
        "an unknown kind is taken for a small one"
    )
    assert not cluster_machine({"CPU": 4.0}, "there").device("auto").is_gpu
    assert cluster_machine({"CPU": 4.0}, "there").device("yes").is_gpu, "one that has yet to come"
    assert cluster_machine(told | {"accelerator_type:T4": 1.0}, "there").device("auto").has_bfloat16 is False


def test_a_model_in_a_folder_is_read_with_what_its_files_say(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sarm", "backbone": {"hidden_size": 4096, "intermediate_size": 14336}}))  # fmt: skip
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(20_000_000_000)
    large, small = (reading_budget(Device(gb), tmp_path, 4096, 0) for gb in (85.0, 16.0))
    assert (large.dtype, large.batch_tokens) == ("bfloat16", 65536)
    assert small.batch_tokens < large.batch_tokens
    assert reading_budget(Device(85.0), tmp_path, 4096, 640, "float32")[:2] == ("float32", 640)
    assert reading_budget(Device(), tmp_path, 4096, 0)[:2] == ("float32", 2048)
    # A function has no folder, and of a file that says nothing the tokens are those that any GPU holds.
    assert reading_budget(Device(85.0), None, 4096, 0).batch_tokens == 8192
    assert reading_budget(Device(85.0), tmp_path / "nowhere", 4096, 0).batch_tokens == 8192


def test_a_job_without_a_model_has_nothing_to_fit(tmp_path):
    job = PrepareData(run=replace(PRESETS["demo"][1].run, out=tmp_path))
    assert fitted(job, H100) == (job, ())


@pytest.mark.parametrize(
    ("machine", "use_gpu", "dtype", "tokens"),
    [
        (H100, "auto", "bfloat16", 65536),
        (H100, "no", "float32", 2048),
        (Machine(64, 8, "T4", gpu_memory_gb=16.0), "auto", "float32", 65536),
        (Machine(2), "auto", "float32", 2048),
    ],
    ids=["h100", "h100-unused", "t4", "cores"],
)
def test_evaluation_and_audit_read_a_model_as_the_device_has_it(
    machine, use_gpu, dtype, tokens, tiny_folder, tiny_chat, tmp_path, monkeypatch, capsys
):
    sarm = random_sarm(tmp_path / "sarm", tiny_folder, tiny_chat)
    for module in (audit_folder, benchmark):
        monkeypatch.setattr(module, "machine_of", lambda _: machine)
    run = RunSettings(out=tmp_path / "out", use_gpu=use_gpu)
    evaluated, spec = benchmark._fitted(Benchmarking(run=run, model=str(sarm), benchmarks=("pairs=none.jsonl",)))
    assert (spec.dtype, evaluated.batch_tokens) == (dtype, tokens)
    assert f"budget: passes of {tokens:,} tokens in {dtype}" in capsys.readouterr().out
    audited = audit_folder.audit_budget(AuditFeatures(run=run, sarm=sarm, select=("a",), target=("b",), off_target=("c",)))  # fmt: skip
    assert audited[:2] == (dtype, tokens)
    asked = benchmark._fitted(Benchmarking(run=run, model=str(sarm), benchmarks=("pairs=none.jsonl",), dtype="float32", batch_tokens=640))[0]  # fmt: skip
    assert (asked.dtype, asked.batch_tokens) == ("float32", 640)
