import dataclasses
import json
from pathlib import Path

import pytest

from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings
from sarm.settings.evaluation import EvaluationSettings
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.identity import as_json, identity
from sarm.settings.jobs import Pipeline, TrainSae, TrainSarm
from sarm.settings.model import ModelSettings
from sarm.settings.presets import PRESETS
from sarm.settings.reward import RewardSettings
from sarm.settings.run import RunSettings
from sarm.settings.sae import SaeSettings

NAN, INFINITE = float("nan"), float("inf")

BAD = [
    (RunSettings, {"num_workers": -1}, "--num-workers"),
    (RunSettings, {"num_actors": -1}, "--num-actors"),
    (RunSettings, {"cpus_per_worker": -1}, "--cpus-per-worker"),
    (ModelSettings, {"name": ""}, "--model.name"),
    (ModelSettings, {"layer": 0}, "--model.layer"),
    (ModelSettings, {"max_length": 7}, "--model.max-length"),
    (DataSettings, {"heldout_share": 0.0}, "--data.heldout-share"),
    (DataSettings, {"heldout_share": 1.0}, "--data.heldout-share"),
    (DataSettings, {"heldout_share": NAN}, "--data.heldout-share"),
    (DataSettings, {"max_texts": 0}, "--data.max-texts"),
    (DataSettings, {"max_pairs": 0}, "--data.max-pairs"),
    (DataSettings, {"max_pairs_per_prompt": -1}, "--data.max-pairs-per-prompt"),
    (ExtractionSettings, {"batch_tokens": 63}, "--extraction.batch-tokens"),
    (ExtractionSettings, {"block_kilobytes": 0}, "--extraction.block-kilobytes"),
    (ExtractionSettings, {"limit_rows": 0}, "--extraction.limit-rows"),
    (ExtractionSettings, {"units": ()}, "--extraction.units"),
    (ExtractionSettings, {"layers": (0,)}, "--extraction.layers"),
    (ExtractionSettings, {"word_share": 0.1}, "--extraction.word-share"),
    (ExtractionSettings, {"units": ("turn_end",), "word_share": 0.0}, "--extraction.word-share"),
    (ExtractionSettings, {"units": ("turn_end",), "word_share": 1.1}, "--extraction.word-share"),
    (ExtractionSettings, {"units": ("turn_end",), "word_share": NAN}, "--extraction.word-share"),
    (SaeSettings, {"d_sae": 0}, "--sae.d-sae"),
    (SaeSettings, {"k": 0}, "--sae.k"),
    (SaeSettings, {"d_sae": 8, "k": 9}, "--sae.k"),
    (SaeSettings, {"lr": 0.0}, "--sae.lr"),
    (SaeSettings, {"lr": NAN}, "--sae.lr"),
    (SaeSettings, {"chat_lr": INFINITE}, "--sae.chat-lr"),
    (SaeSettings, {"chat_lr": -1e-3}, "--sae.chat-lr"),
    (SaeSettings, {"batch_size": 0}, "--sae.batch-size"),
    (SaeSettings, {"text_epochs": -1}, "--sae.text-epochs"),
    (SaeSettings, {"chat_epochs": -1}, "--sae.chat-epochs"),
    (SaeSettings, {"text_epochs": 0, "chat_epochs": 0}, "--sae.text-epochs"),
    (SaeSettings, {"shares": (0.5, 0.4)}, "--sae.shares"),
    (SaeSettings, {"shares": (1.5, -0.5)}, "--sae.shares"),
    (SaeSettings, {"steps": 0}, "--sae.steps"),
    (SaeSettings, {"reward_share": 0.1}, "--sae.reward-share"),
    (SaeSettings, {"recipe": "turn_ends", "reward_share": 1.0}, "--sae.reward-share"),
    (SaeSettings, {"recipe": "turn_ends", "cross_entropy_texts": 8}, "--sae.cross-entropy-texts"),
    (
        SaeSettings,
        {"recipe": "turn_ends", "reward_share": 0.1, "architecture": "matching_pursuit"},
        "--sae.reward-share",
    ),
    (SaeSettings, {"warmup_share": 0.9, "decay_share": 0.2}, "--sae.warmup-share"),
    (SaeSettings, {"warmup_share": -0.1}, "--sae.warmup-share"),
    (SaeSettings, {"decay_share": -0.01}, "--sae.decay-share"),
    (SaeSettings, {"heldout_share": 0.5}, "--sae.heldout-share"),
    (SaeSettings, {"heldout_share": 0.0}, "--sae.heldout-share"),
    (RewardSettings, {"lr": -1e-6}, "--reward.lr"),
    (RewardSettings, {"lr": NAN}, "--reward.lr"),
    (RewardSettings, {"head_lr": 0.0}, "--reward.head-lr"),
    (RewardSettings, {"weight_decay": -0.1}, "--reward.weight-decay"),
    (RewardSettings, {"weight_decay": NAN}, "--reward.weight-decay"),
    (RewardSettings, {"epochs": 0}, "--reward.epochs"),
    (RewardSettings, {"batch_pairs": 0}, "--reward.batch-pairs"),
    (RewardSettings, {"batch_tokens": 63}, "--reward.batch-tokens"),
    (RewardSettings, {"warmup_share": 1.0}, "--reward.warmup-share"),
    (RewardSettings, {"warmup_share": -0.1}, "--reward.warmup-share"),
    (RewardSettings, {"max_grad_norm": 0.0}, "--reward.max-grad-norm"),
    (EvaluationSettings, {"top_features": 0}, "--evaluation.top-features"),
    (EvaluationSettings, {"contexts_per_feature": 0}, "--evaluation.contexts-per-feature"),
]


@pytest.mark.parametrize(("section", "values", "flag"), BAD, ids=[f"{s.__name__}-{v}" for s, v, _ in BAD])
def test_a_bad_value_is_refused_with_its_flag(section, values, flag):
    with pytest.raises(UserError) as error:
        section(**values)
    assert flag in str(error.value).split("Pass ")[1]


def test_the_error_says_what_it_got():
    with pytest.raises(UserError, match=r"k must be between 1 and d_sae=4608, got 0\. Pass --sae\.k\."):
        SaeSettings(d_sae=4608, k=0)


@pytest.mark.parametrize(
    "allowed",
    [
        lambda: SaeSettings(d_sae=8, k=8),
        lambda: SaeSettings(text_epochs=0),
        lambda: SaeSettings(chat_epochs=0),
        lambda: SaeSettings(warmup_share=0.0, decay_share=1.0),
        lambda: RewardSettings(lr=0.0),
        lambda: RewardSettings(warmup_share=0.0),
        lambda: DataSettings(max_texts=None, max_pairs=1),
    ],
)
def test_the_edge_of_a_range_is_allowed(allowed):
    allowed()


def test_a_config_is_never_mutated():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SaeSettings().k = 3


def test_out_is_absolute_wherever_a_worker_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert RunSettings(out=Path("outputs/x")).out == tmp_path / "outputs" / "x"
    assert RunSettings(out=Path("~/x")).out == tmp_path / "home" / "x"
    assert RunSettings(out=Path("/somewhere/x")).out == Path("/somewhere/x")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            RunSettings(out=Path("a"), num_workers=1),
            RunSettings(out=Path("b"), num_workers=4, mlflow_uri="http://x", dry_run=True),
        ),
        (ExtractionSettings(batch_tokens=64), ExtractionSettings(batch_tokens=4096)),
        (RewardSettings(batch_tokens=64), RewardSettings(batch_tokens=4096, gradient_checkpointing=True)),
        (SaeSettings(split="rows"), SaeSettings(split="latents")),
    ],
)
def test_identity_ignores_how_fast_and_where_a_stage_runs(one, other):
    assert identity(one) == identity(other)


def test_identity_has_every_field_that_decides_the_result():
    for section in (ModelSettings(), DataSettings(), EvaluationSettings()):
        # A later field is there once it decides something, so that what was made before it stays what it is.
        later = {field.name for field in dataclasses.fields(section) if field.metadata.get("absent_at_default")}
        assert identity(section).keys() == {field.name for field in dataclasses.fields(section)} - later
    assert identity(DataSettings(columns="prompt=a"))["columns"] == "prompt=a"
    assert identity(ModelSettings(chat_template="default"))["chat_template"] == "default"
    operational = {"split", "checkpoint_every_seconds", "checkpoint_every_steps"}
    assert identity(SaeSettings()).keys() == {field.name for field in dataclasses.fields(SaeSettings)} - operational
    assert identity(RunSettings()) == {"seed": 0}
    assert identity(SaeSettings(k=1)) != identity(SaeSettings(k=2))
    assert identity(SaeSettings(), seed=1) == {**identity(SaeSettings()), "seed": 1}
    assert "seed" not in identity(SaeSettings())


def test_identity_is_the_same_after_a_round_trip_through_json():
    found = identity(DataSettings(texts=("a", "b")))
    assert json.loads(json.dumps(found)) == found


def test_part_is_the_config_of_one_job():
    preset = PRESETS["demo"][1]
    before = {"run": preset.run, "data": preset.data, "model": preset.model, "extraction": preset.extraction}
    assert preset.part(TrainSae) == TrainSae(**before, sae=preset.sae)
    assert preset.part(TrainSarm) == TrainSarm(**before, sae=preset.sae, reward=preset.reward)
    assert preset.part(Pipeline) == preset


@pytest.mark.parametrize("name", PRESETS)
def test_as_json_is_the_whole_config(name):
    preset = PRESETS[name][1]
    found = json.loads(as_json(preset))
    assert found.keys() == {field.name for field in dataclasses.fields(preset)}
    assert found["sae"]["k"] == preset.sae.k
    assert found["run"]["out"] == str(preset.run.out)


# SARM table 1 and section 4.1: d_sae 16 d_in, k 3/64 d_in. SAFER's scripts: 8 d_in, k 64 at d_in 2048; its ratios at 3072.
@pytest.mark.parametrize(
    ("name", "model", "layer", "d_sae", "k"),
    [
        ("sarm-1b", "Llama-3.2-3B-Instruct", 14, 49152, 144),
        ("sarm-2b", "Llama-3.2-3B-Instruct", 21, 49152, 144),
        ("sarm-4b", "Llama-3.1-8B-Instruct", 16, 65536, 192),
        ("safer-1b", "Llama-3.2-1B-Instruct", 12, 16384, 64),
        ("safer-3b", "Llama-3.2-3B-Instruct", 21, 24576, 96),
    ],
)
def test_the_presets_have_the_papers_numbers(name, model, layer, d_sae, k):
    preset = PRESETS[name][1]
    assert preset.model.name.endswith(model)
    assert (preset.model.layer, preset.sae.d_sae, preset.sae.k) == (layer, d_sae, k)
    assert preset.sae.lr == 5e-4


def test_the_papers_reward_training_numbers():
    for name in ("sarm-1b", "sarm-2b", "sarm-4b"):
        reward = PRESETS[name][1].reward
        assert (reward.lr, reward.batch_pairs, reward.epochs) == (4e-6, 8, 3)
    for name in ("safer-1b", "safer-3b"):
        assert (PRESETS[name][1].reward.lr, PRESETS[name][1].reward.epochs) == (2e-5, 2)


def test_presets_write_to_different_folders():
    folders = [preset.run.out for _, preset in PRESETS.values()]
    assert len(set(folders)) == len(folders)
