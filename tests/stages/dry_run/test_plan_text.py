"""What a dry run prints, and what it refuses."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from sarm.engine.ray.machine import Machine
from sarm.settings.checks import UserError
from sarm.settings.presets import PRESETS
from sarm.settings.sweep_presets import ABLATIONS
from sarm.stages.dry_run.costs import stage_costs
from sarm.stages.dry_run.describing import describe
from sarm.stages.dry_run.plan_text import plan_text
from sarm.stages.dry_run.rounding import count, duration, rounded, size
from sarm.stages.sweep.cost import describe_sweep


@pytest.fixture
def demo(tmp_path):
    return replace(PRESETS["demo"][1], run=replace(PRESETS["demo"][1].run, out=tmp_path / "demo"))


@pytest.mark.parametrize("name", [*PRESETS, *(f"ablation {name}" for name in ABLATIONS)])
def test_a_plan_fits_the_terminal_and_comes_first(name, tmp_path):
    preset = (ABLATIONS[name.split()[1]] if " " in name else PRESETS[name])[1]
    config = replace(preset, run=replace(preset.run, out=tmp_path))
    said = describe_sweep(config) if " " in name else describe(config)
    # A path of the user's may be longer than the terminal is wide.
    assert max(len(line) for line in said.splitlines() if str(tmp_path) not in line) <= 80
    assert said.splitlines()[0].startswith("writes to")
    assert "{" not in said
    assert not re.search(r"\d\d\.\d\d|e\+\d\d h|,\d{3}\.\d", said), "no more figures than are known"


def test_stages_are_shown_as_they_stand_and_what_is_done_costs_nothing(demo):
    machine = Machine(cores=2)
    costs = stage_costs(demo, machine)
    states = [
        ("prepare_data", "done"),
        ("extract_activations", "done"),
        ("train_sae", "goes on"),
        ("train_sarm", "to do"),
    ]
    said = plan_text(demo, states, costs, machine)
    table = {line.split()[0]: line for line in said.splitlines() if line and not line.startswith(" ")}
    assert table["prepare_data"].split() == ["prepare_data", "done"]
    assert "goes on" in table["train_sae"]
    left = sum(cost.seconds for cost in costs if cost.stage in ("train_sae", "train_sarm"))
    assert duration(left) in table["total"]
    assert "evaluate" not in table


def test_what_a_real_run_would_refuse_is_refused_in_one_line(demo):
    def refused(**changed: object) -> str:
        with pytest.raises(UserError) as error:
            describe(replace(demo, **changed))
        assert "\n" not in str(error.value)
        return str(error.value)

    said = refused(model=replace(demo.model, layer=99))
    assert "layer 99 is beyond demo:smollm2, which has 30 blocks" in said
    assert "--model.layer" in said
    assert "--layers" in refused(extraction=replace(demo.extraction, layers=(7, 31)))
    assert "/nonexistent/*" in refused(data=replace(demo.data, pairs=("/nonexistent/*",)))
    assert "/nonexistent.jsonl" in refused(data=replace(demo.data, texts=("/nonexistent.jsonl",)))
    assert "no preference pairs" in refused(data=replace(demo.data, pairs=()))
    assert "demo:gpt9" in refused(model=replace(demo.model, name="demo:gpt9"))
    assert "/no/model" in refused(model=replace(demo.model, name="/no/model"))


def test_sources_that_were_read_already_may_be_gone(demo):
    from sarm.contracts.folders import Folders
    from sarm.settings.jobs import TrainSarm
    from sarm.stages import plan

    data = replace(demo.data, texts=("/gone/*.jsonl",), pairs=("/gone.jsonl",))
    for of in (plan.corpus, plan.pairs, plan.responses):
        planned = of(Folders(demo.run.out), data)
        folder = planned.open()
        folder.claim()
        folder.finish({"rows": 10, "characters": 4400, "splits": {"train": 8, "heldout": 2}})
    said = describe(replace(demo, data=data).part(TrainSarm))
    assert re.search(r"prepare_data +done", said)


def test_a_sweep_refuses_layers_that_its_model_does_not_have(tmp_path):
    tiny = ABLATIONS["tiny"][1]
    config = replace(tiny, run=replace(tiny.run, out=tmp_path), sweep=replace(tiny.sweep, layers=(1, 5), centre=None))
    with pytest.raises(UserError, match=r"layer 5 is beyond tiny:llama, which has 2 blocks\. Pass --sweep\.layers"):
        describe_sweep(config)


def test_a_cluster_that_does_not_answer_is_said_and_this_machine_planned(demo):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        said = describe(replace(demo, run=replace(demo.run, ray_address=address)))
    assert f"No cluster answers at {address}" in said
    assert "this machine" in said


# Apart, since a process has one cluster and other tests here have theirs.
CLUSTER = """
from dataclasses import replace
import ray
from sarm.settings.presets import demo
from sarm.engine.ray.machine import machine_of

with ray.init(address="local", num_cpus=3, num_gpus=2, resources={"accelerator_type:L4": 1}, include_dashboard=False):
    cluster = machine_of(replace(demo.run, ray_address=ray.get_runtime_context().gcs_address))
print(cluster.cores, cluster.num_gpus, cluster.gpu)
"""


def test_the_cluster_at_an_address_is_planned_for():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", CLUSTER], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines()[-1:] == ["3 2 L4"], done.stderr[-2000:]


def test_few_pairs_a_step_for_many_workers_are_said(demo):
    config = replace(demo, run=replace(demo.run, num_workers=1))
    said = " ".join(plan_text(demo, machine=Machine(64, 8, "H100")).split())
    assert re.search(r"A step of 16 pairs for 8 workers is fewer than about 8 pairs a worker: .* busy for \d\d% of the time", said)  # fmt: skip
    enough = replace(demo, reward=replace(demo.reward, batch_pairs=64))
    assert all("pairs a worker" not in plan_text(other, machine=Machine(64, 8, "H100")) for other in (config, enough))


def test_the_settings_of_the_plan_are_read_again(run_job, tmp_path):
    """`--json` alone prints JSON, which `--config` takes."""
    first = run_job("pipeline", "tiny", "--sae.k", "5", "--dry-run", "--json", "--out", tmp_path / "out")
    (tmp_path / "settings.json").write_text(first.stdout)
    again = run_job("pipeline", "tiny", "--config", tmp_path / "settings.json", "--dry-run", "--json")
    assert json.loads(first.stdout)["sae"]["k"] == 5
    assert json.loads(again.stdout) == json.loads(first.stdout)


def test_estimates_are_said_with_two_figures():
    assert [duration(s) for s in (0.2, 12, 59, 300, 17_600, 200_000, 1e9)] == ["1 s", "12 s", "59 s", "5 min", "4.9 h", "2.3 days", "32 years"]  # fmt: skip
    assert [size(gb) for gb in (0, 2e-6, 0.0123, 4.55, 412.6, 6177)] == ["-", "< 1 MB", "12 MB", "4.5 GB", "410 GB", "6.2 TB"]  # fmt: skip
    assert [count(n) for n in (600, 87_233, 1_142_857, 15e9)] == ["600", "87,000", "1.1 million", "15 billion"]
    assert [rounded(x) for x in (0.001, 0.057, 8.87, 443_544.07)] == ["< 0.01", "0.057", "8.9", "440,000"]
