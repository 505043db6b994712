import json
from pathlib import Path

import pytest

from sarm.contracts.folders import CORPUS_FOLDER, PAIRS_FOLDER, SAE_FOLDER
from sarm.contracts.manifest import Manifest
from sarm.engine.mlflow.run_card import data_set, description, flat_params, origin, parameters
from sarm.settings.benchmarks import Comparison
from sarm.settings.identity import as_json
from sarm.settings.jobs import ExtractActivations
from sarm.settings.presets import PRESETS
from sarm.settings.sweep_presets import ABLATIONS


def config_of(config: object) -> dict:
    return json.loads(as_json(config))


def test_a_pipeline_has_few_parameters_and_they_say_what_was_trained_on_what():
    found = parameters(config_of(PRESETS["demo"][1]))
    assert len(found) <= 16
    expected = {"model": "demo:smollm2", "layer": "15", "d_sae": "2304", "k": "27", "lr_sae": "0.001", "lr_reward": "5e-06",
                "sae_recipe": "turn_ends, reward share 0.1",
                "lr_head": "0.0001", "reward_epochs": "1", "reward_batch": "16", "texts": "demo:openwebtext, demo:wikipedia",
                "pairs": "demo:harm", "seed": "0"}  # fmt: skip
    assert found.items() >= expected.items()
    assert parameters(config_of(PRESETS["demo-papers"][1])).items() >= {"d_sae": "9216", "lr_sae_chat": "0.001"}.items()


def test_runs_that_differ_in_layer_width_and_k_differ_in_these_first():
    """MLflow's parallel coordinates start with the first three parameters, by name, whose values differ."""
    one, other = config_of(PRESETS["tiny"][1]), config_of(PRESETS["tiny"][1])
    other["model"]["layer"], other["sae"]["k"], other["sae"]["d_sae"] = 2, 4, 128
    other["sae"] |= {"lr": 1e-3, "batch_size": 32}
    other["reward"] |= {"lr": 1e-5, "head_lr": 1e-2, "batch_pairs": 8, "epochs": 1, "head_init": "probe"}
    a, b = parameters(one), parameters(other)
    differing = sorted(name for name in a if a[name] != b[name])
    assert differing[:6] == ["d_sae", "k", "layer", "lr_head", "lr_reward", "lr_sae"]


def test_no_parameter_is_operational():
    """A folder goes on under other operational settings, and a run whose parameters differ is another run."""
    changed = config_of(PRESETS["tiny"][1])
    changed["run"] |= {"num_workers": 7, "out": "/elsewhere", "mlflow_uri": "http://h:5000", "cpus_per_worker": 3}
    changed["reward"] |= {"batch_tokens": 99, "baselines": ["scalar_full"], "offload": "optimizer"}
    changed["extraction"]["batch_tokens"] = 77
    assert parameters(changed) == parameters(config_of(PRESETS["tiny"][1]))


def test_other_jobs_have_those_of_their_own():
    assert "lr_sae" not in parameters(config_of(PRESETS["tiny"][1].part(ExtractActivations)))
    ablation = parameters(config_of(ABLATIONS["tiny"][1]))
    assert {"layers", "widths", "ks", "components", "seeds"} <= ablation.keys()
    assert not {"layer", "k", "d_sae", "seed"} & ablation.keys()
    comparing = parameters(config_of(Comparison(run_a=Path("/a"), run_b=Path("/b"))))
    assert comparing.keys() >= {"run_a", "run_b"}
    assert not any(name.startswith("run.") for name in comparing)


def test_a_description_reads_as_sentences():
    settings = {"model": "demo:smollm2", "layer": 15, "d_sae": 9216, "k": 27}
    tags = {"preset": "demo", "command": "python jobs/pipeline.py demo"}
    assert description(settings, tags, "Held-out accuracy **88.0%**.") == (
        "Preset demo: **demo:smollm2** at layer 15, 9,216 latents, 27 active.\n\n"
        "Held-out accuracy **88.0%**.\n\n`python jobs/pipeline.py demo`"
    )
    assert description({"model": "m", "layer": 2, "d_sae": 0, "k": 0}, {}) == "**m** at layer 2."
    swept = description(parameters(config_of(ABLATIONS["tiny"][1])), {})
    assert swept.startswith("Ablation of **tiny:llama**: layers ")


def test_a_command_line_that_holds_a_secret_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["x.py", "--key", "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789"])
    assert "sk-proj" not in json.dumps(origin())


def manifest(schema: str, config: dict, files: dict) -> Manifest:
    return Manifest(schema, "", "", config, {}, {"rows": 5, "splits": {"train": 4}}, files)


def test_a_data_set_is_named_by_its_sources_and_told_apart_by_its_bytes():
    one = data_set(manifest(PAIRS_FOLDER, {"pairs": ["hf:owner/name:train"]}, {"part-0.parquet": "aa"}))
    other = data_set(manifest(PAIRS_FOLDER, {"pairs": ["hf:owner/name:train"]}, {"part-0.parquet": "bb"}))
    assert one is not None
    assert other is not None
    assert (one.name, one.source_type, json.loads(one.source)) == ("hf:owner/name:train", "hf", {"path": "owner/name"})
    assert one.digest != other.digest
    assert json.loads(one.profile) == {"rows": 5, "splits": {"train": 4}}
    many = data_set(manifest(CORPUS_FOLDER, {"texts": [f"/data/{n}.jsonl" for n in range(99)]}, {}))
    assert many is not None
    assert (len(many.name), many.context) == (100, "corpus")
    assert data_set(manifest(SAE_FOLDER, {}, {})) is None


def test_nested_settings_get_dotted_names():
    assert flat_params({"sae": {"k": 3}, "seed": 0}) == {"sae.k": 3, "seed": 0}
