"""Estimates against hand numbers, against what stages took, and against the model's own weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from sarm.data.formats.model_shapes import KNOWN_MODELS, shape_of
from sarm.engine.ray.machine import Machine, cluster_machine
from sarm.settings.jobs import Pipeline, TrainSae
from sarm.settings.model import ModelSettings
from sarm.settings.presets import PRESETS
from sarm.settings.reward import RewardSettings
from sarm.settings.sae import AlsoSaes
from sarm.stages.dry_run.costs import stage_costs
from sarm.stages.dry_run.formulas import Extracted, extracted, response_rows, reward_depths, reward_gb
from sarm.stages.dry_run.scaling import all_reduce_seconds, busy_share
from sarm.stages.dry_run.source_sizes import sizes_of
from sarm.stages.dry_run.stage_cost import StageCost
from sarm.stages.stage import STAGES

H100 = Machine(cores=16, num_gpus=1, gpu="H100")


def preset(name: str, out: Path, **changed: object) -> Pipeline:
    found = PRESETS[name][1]
    return replace(found, run=replace(found.run, out=out), **changed)


def costs_of(config: object, machine: Machine = H100) -> dict[str, StageCost]:
    return {cost.stage: cost for cost in stage_costs(config, machine)}


@pytest.mark.parametrize("name", ["demo:smollm2", "tiny:llama"])
def test_the_weights_that_are_planned_are_the_models(name):
    from sarm.data.formats.models import model_folder
    from sarm.nn.pretrained import load_backbone, read_depth

    folder = model_folder(ModelSettings(name=name))
    shape = KNOWN_MODELS[name].shape
    assert shape_of(ModelSettings(name=str(folder))) == shape, "read from its config, it is what is known by name"
    assert read_depth(folder) == shape.num_blocks
    backbone = load_backbone(folder, 1)
    block = sum(p.numel() for p in backbone.layers[0].parameters() if p.dim() == 2)
    assert block == shape.weights_a_block
    matrices = sum(p.numel() for p in backbone.parameters() if p.dim() == 2)
    assert matrices == shape.backbone(1)


def test_the_papers_largest_model_costs_what_a_hand_calculation_says(tmp_path):
    shape = KNOWN_MODELS["meta-llama/Llama-3.1-8B-Instruct"].shape
    block = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336
    assert shape.weights_a_block == block == 218_103_808
    sarm_4b = preset("sarm-4b", tmp_path)
    texts = extracted(
        shape, sizes_of(tmp_path, sarm_4b.data, sarm_4b.extraction).texts, None, sarm_4b.extraction.units, {16}
    )
    # A billion tokens, 2 FLOPs a weight of 16 blocks; an H100 at 40 % of 989 TFLOP/s; 50 M rows of 8,192 + 60 bytes.
    assert texts.flops == pytest.approx(1e9 * 2 * block * 16) == pytest.approx(6.98e18, rel=1e-3)
    assert texts.flops / (0.4 * 989e12) / 3600 == pytest.approx(4.90, abs=0.005)
    assert texts.disk_bytes == pytest.approx(50e6 * (8192 + 60))
    costs = costs_of(sarm_4b)
    # 98 % of 77,000 pairs of 1,000 tokens, 3 epochs, 8 FLOPs a weight with gradient checkpointing, for the SARM and the scalar head.
    flops = 77_000 * 0.98 * 1000 * 3 * 8 * block * 16 * 2
    assert (
        costs["train_sarm"].gpu_hours == pytest.approx(flops / (0.4 * 989e12) / 3600) == pytest.approx(8.87, abs=0.01)
    )
    # 12,244 steps of 30.4 ms, worked out in test_scaling.py.
    rows = 50e6 + 2 * 77_000 * 0.98
    assert costs["train_sae"].gpu_hours == pytest.approx(rows / 4096 * 0.0304 / 3600, rel=1e-3)
    assert costs["train_sae"].rows == pytest.approx(rows)
    assert "1.3 million texts" in costs["prepare_data"].work, "the preset's own limit, and not the whole data set"


def test_reward_training_takes_16_bytes_a_weight_that_zero_shares_out():
    shape = KNOWN_MODELS["meta-llama/Llama-3.1-8B-Instruct"].shape
    weights = 16 * shape.weights_a_block + 128256 * 4096
    reward = replace(PRESETS["sarm-4b"][1].reward, zero_stage=3)
    plain = reward_gb(shape, 16, replace(reward, zero_stage=0), 8)
    assert 16 * weights / 1e9 < plain < 16 * weights / 1e9 + 5
    assert reward_gb(shape, 16, reward, 1) == pytest.approx(plain)
    assert reward_gb(shape, 16, reward, 8) < plain / 4
    # One H100 has 80 GB: stage 3 fits into it, stage 2 with its copy of the weights does not.
    assert reward_gb(shape, 16, reward, 1) < 80 < reward_gb(shape, 16, replace(reward, zero_stage=2), 1)
    frozen = RewardSettings(train_backbone=False, zero_stage=0, precision="bfloat16", batch_tokens=8192)
    assert reward_gb(shape, 16, frozen, 1) < plain / 3


# README's demo on 2 cores: the same stages, added up by job.
DEMO_SECONDS = {
    "prepare_data": 1.7 + 0.1,
    "extract_activations": 94 + 66 + 19.8,
    "train_sae": 45.3,
    "train_sarm": 249 + 234,
    "evaluate": 48.6,
    "collect_contexts": 30,
}
# `jobs/pipeline.py tiny` on 2 cores that other processes used too.
TINY_SECONDS = {
    "extract_activations": 43.3 + 15.8 + 17.9,
    "train_sae": 46.0,
    "train_sarm": 27.4 + 26.3,
    "evaluate": 14.2,
    "collect_contexts": 13,
}


def test_a_fresh_demo_is_planned_by_its_own_sources_and_takes_what_it_took(tmp_path):
    costs = costs_of(preset("demo", tmp_path), Machine(cores=2))
    assert list(costs) == list(STAGES)
    assert costs["prepare_data"].work.startswith("600 texts, ")
    for stage, seconds in DEMO_SECONDS.items():
        # What takes two seconds may be planned with a few.
        assert seconds / 2 <= costs[stage].seconds <= max(2 * seconds, 5), (stage, costs[stage].seconds)
    total = sum(cost.seconds for cost in costs.values())
    assert 11.65 * 60 / 2 <= total <= 11.65 * 60 * 2, "11 min 39 s on one processor, 13 min 17 s on another"


def test_a_fresh_tiny_takes_what_it_took(tmp_path):
    costs = costs_of(preset("tiny", tmp_path), Machine(cores=2))
    total, took = sum(cost.seconds for cost in costs.values()), sum(TINY_SECONDS.values())
    assert took / 2 <= total <= took * 2
    # Starting processes is most of it, and that waits for whatever else the machine does.
    assert all(seconds / 3.1 <= costs[stage].seconds <= 2 * seconds for stage, seconds in TINY_SECONDS.items())


def test_more_models_epochs_and_dictionaries_cost_more(tmp_path):
    demo = preset("demo", tmp_path)
    before = costs_of(demo)
    full = costs_of(replace(demo, reward=replace(demo.reward, baselines=("scalar", "scalar_full"))))
    # 15 + 15 blocks, and then 30 more.
    assert full["train_sarm"].gpu_hours == pytest.approx(2 * before["train_sarm"].gpu_hours)
    assert full["train_sarm"].gpu_gb > before["train_sarm"].gpu_gb
    also = TrainSae(
        **{name: getattr(demo, name) for name in ("run", "data", "model", "extraction", "sae")},
        also=AlsoSaes(k=(13, 54)),
    )
    on_cores = {config: costs_of(config, Machine(cores=2))["train_sae"].seconds - 15 for config in (demo, also)}
    assert on_cores[also] == pytest.approx(3 * on_cores[demo])
    # 6 D S a row by TopK, of which 2 for the encoder; k of those by matching pursuit.
    pursuit = replace(demo, sae=replace(demo.sae, architecture="matching_pursuit", reward_share=0))
    times = (4 + 2 * demo.sae.k) / 6
    assert costs_of(pursuit, Machine(cores=2))["train_sae"].seconds - 15 == pytest.approx(times * on_cores[demo])
    assert costs_of(pursuit)["train_sae"].gpu_hours > 1.2 * before["train_sae"].gpu_hours
    auxk = replace(demo, sae=replace(demo.sae, aux_k=288))
    assert costs_of(auxk)["train_sae"].gpu_hours > before["train_sae"].gpu_hours


def test_ends_of_turn_are_rows_of_texts_and_of_responses_and_a_token_each(tmp_path):
    demo = preset("demo", tmp_path)
    shape, sizes = shape_of(demo.model), sizes_of(tmp_path, demo.data)
    texts, pairs = sizes.texts, sizes.pairs

    def of(*units: str, word_share: float | None = None) -> Extracted:
        return extracted(shape, texts, pairs, units, {15}, word_share)

    plain, ends, words = of("document"), of("document", "turn_end"), of("document", "turn_end", word_share=0.1)
    assert ends.rows["turn_end"] == texts.sentences > texts.rows
    # A sentence has 20 tokens; as many answers there are at least.
    of_responses = ends.rows["turn_end of responses"]
    assert 2 * pairs.train < of_responses == pytest.approx(pairs.train * 51 / 20)
    assert response_rows(pairs._replace(tokens_a_pair=30)) == 2 * pairs.train
    assert words.rows["turn_end"] - ends.rows["turn_end"] == pytest.approx(0.1 * 0.75 * texts.tokens)
    more = texts.tokens + texts.sentences + of_responses
    assert ends.flops - plain.flops == pytest.approx(2 * shape.weights_a_block * 15 * more)
    assert ends.disk_bytes > plain.disk_bytes
    config = replace(demo, extraction=replace(demo.extraction, units=("document", "turn_end")))
    assert "rows of turn_end of responses" in costs_of(config)["extract_activations"].work
    assert costs_of(config)["train_sae"] == costs_of(demo)["train_sae"], (
        "it learns from ends of turn, which of the units is the first"
    )


def test_a_cluster_is_planned_by_the_gpus_that_it_reports(tmp_path):
    told = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:A100-80G": 1.0, "node:10.0.0.1": 1.0}
    cluster = cluster_machine(told, "the cluster at 10.0.0.1:6379")
    assert (cluster.num_gpus, cluster.gpu) == (8, "A100")
    sarm_4b = preset("sarm-4b", tmp_path)
    one = costs_of(replace(sarm_4b, run=replace(sarm_4b.run, num_workers=1)), cluster)["train_sarm"]
    assert one.gpu_hours / costs_of(sarm_4b)["train_sarm"].gpu_hours == pytest.approx(989 / 312)
    eight = costs_of(sarm_4b, cluster)["train_sarm"]
    # Eight pairs a step keep eight workers busy for 59 % of the time.
    # Eight cards reduce 7 GB of gradients a step and model besides.
    steps = 77_000 * 0.98 * 3 / 8
    network = steps * all_reduce_seconds(2 * 2 * 218_103_808 * 16, 8)
    assert (one.seconds - 30) / (eight.seconds - 30 - network) == pytest.approx(8 * busy_share(8, 8))
    assert eight.gpu_hours == one.gpu_hours
    # One card takes stage 3, and eight stage 2.
    assert eight.gpu_gb < one.gpu_gb / 2


def test_a_model_that_is_not_here_has_no_made_up_cost(tmp_path):
    costs = costs_of(preset("sarm-1b", tmp_path, model=ModelSettings(name="nobody/has-this", layer=3)))
    for stage in ("extract_activations", "train_sae", "train_sarm", "evaluate", "collect_contexts"):
        assert costs[stage][1:6] == (None,) * 5


def test_disk_for_a_copy_in_mlflow_is_planned_only_where_one_is_asked_for(tmp_path):
    demo = preset("demo", tmp_path)
    plain, none, copy = (
        costs_of(replace(demo, run=replace(demo.run, mlflow_models=how)))["train_sarm"].disk_gb
        for how in ("reference", "none", "copy")
    )
    assert plain == none < copy
    shape, model = shape_of(demo.model), demo.model
    depths = reward_depths(model, demo.reward, shape)
    weights = sum(shape.backbone(depth) for depth in depths) + 2 * shape.d_in * demo.sae.d_sae
    assert copy - plain == pytest.approx(4 * weights / 1e9), "the weights once more, in float32"
