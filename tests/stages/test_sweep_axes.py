"""Settings as axes of an ablation: how they are read, which cells they make, what those share and are called."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from sarm.engine.mlflow.run_card import description, parameters
from sarm.engine.ray.machine import Machine
from sarm.settings.axes import Axis, axes_of
from sarm.settings.checks import UserError
from sarm.settings.identity import as_json
from sarm.settings.sweep import Ablation
from sarm.settings.sweep_presets import ABLATIONS
from sarm.stages.fitting import fitted
from sarm.stages.job import parse
from sarm.stages.sweep.cells import check_sweep, sweep_plan
from sarm.stages.sweep.cost import describe_sweep
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.readings import contents_of, folders_of
from sarm.stages.sweep.stages import _of_one_read
from sarm.stages.sweep.trials import _space, cell_of

KINDS = ("text", "chat", "heldout")


def plan_of(*axes: str, **changed: object) -> SweepPlan:
    """The plan of `tiny` at one layer and width, with these axes."""
    tiny = ABLATIONS["tiny"][1]
    one = {"layers": (1,), "widths": (4,), "components": ("sarm",), "centre": None}
    config = replace(tiny, sweep=replace(tiny.sweep, axes=axes, **{**one, **changed}))
    return sweep_plan(config, check_sweep(config), lambda model: 64)


def test_values_are_read_as_the_settings_flags_read_them():
    texts = (
        "sae.architecture=topk,jumprelu",
        "reward.lr=1e-6,5e-6",
        "sae.signed=true,False",
        "sae.prefixes=32 64,128",
        "extraction.limit-rows=None,10",
        "reward.zero_stage=0,2",
        "model.name=org/a, org/b",
    )
    assert axes_of(texts) == (
        Axis("sae.architecture", ("topk", "jumprelu")),
        Axis("reward.lr", (1e-6, 5e-6)),
        Axis("sae.signed", (True, False)),
        Axis("sae.prefixes", ((32, 64), (128,))),
        Axis("extraction.limit_rows", (None, 10)),
        Axis("reward.zero_stage", (0, 2)),
        Axis("model.name", ("org/a", "org/b")),
    )


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["sae.architectur=topk"], r"no setting of .*Did you mean sae\.architecture\?"),
        (["lr=1e-6"], r"Did you mean sae\.lr or reward\.lr\?"),
        (["data.max_texts=3"], "data.max_texts is no setting of model, extraction, sae, reward, evaluation"),
        (["sae.architecture=topc"], r"cannot be 'topc'. It is one of topk, .*Did you mean topk\?"),
        (["reward.lr=fast"], "reward.lr cannot be 'fast'. It is a number"),
        (["reward.epochs=1.5"], "It is a whole number"),
        (["sae.signed=maybe"], "It is true or false"),
        (["extraction.limit_rows=all"], "It is a whole number or None"),
        (["sae.prefixes=32 x"], "one or more values with spaces between them, each a whole number"),
        (["sae.lr=1e-3,"], "cannot be ''"),
        (["sae.lr"], "takes SETTING=VALUE,VALUE"),
        (["sae.lr=1e-3", "sae.lr=2e-3"], "sae.lr twice"),
        (["sae.lr=1e-3,0.001"], "a value twice"),
        (["sae.k=4,8"], "Pass --sweep.ks"),
        (["sae.d_sae=64,128"], "Pass --sweep.widths"),
        (["model.layer=1,2"], "Pass --sweep.layers"),
        (["reward.encoder=random"], "Pass --sweep.components"),
        (["run.seed=0,1"], "Pass --sweep.seeds"),
        (["reward.batch_tokens=512,1024"], "not what comes out.*Pass --reward.batch-tokens"),
    ],
)
def test_what_is_no_axis_is_refused_in_one_line_by_the_command_line(axes, message):
    with pytest.raises(UserError, match=message) as refused:
        parse(Ablation, "x", ["tiny", "--sweep.axes", *axes], ABLATIONS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["reward.lr=-1"], r"a cell with reward.lr=-1.0 cannot be: lr must be finite and above 0"),
        (
            ["sae.signed=true,false", "sae.architecture=topk,jumprelu"],
            "sae.architecture=jumprelu, sae.signed=True cannot be: signed must be off",
        ),
        (["extraction.units=document,token"], "learn from one unit"),
        (["extraction.units=document sentence"], "learn from one unit"),
        (["extraction.units=document,turn_end"], "the recipe papers learns from sentence ends"),
        (["sae.recipe=papers,turn_ends"], "cross_entropy_texts must be 0 where the recipe is turn_ends"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_starts(axes, message):
    with pytest.raises(UserError, match=message):
        plan_of(*axes)


def test_dictionaries_of_turn_ends_read_all_that_their_recipe_does():
    tiny = ABLATIONS["tiny"][1]
    extraction = replace(tiny.extraction, units=("turn_end",))
    sae = replace(tiny.sae, recipe="turn_ends", cross_entropy_texts=0)
    sweep = replace(
        tiny.sweep, axes=("sae.reward_share=0,0.1",), layers=(2,), widths=(4,), components=("sarm",), centre=None
    )
    config = replace(tiny, sae=sae, extraction=extraction, sweep=sweep)
    plan = sweep_plan(config, check_sweep(config), lambda model: 64)
    (reading,) = plan.readings
    assert contents_of(reading).keys() == {"text", "chat", "heldout", "chat-turn_end", "responses-turn_end"}
    assert {plan.sae(key).reward_share for key in plan.saes} == {0.0, 0.1}
    assert folders_of(plan.config, reading).activations("chat-turn_end", 2, 2).parts[-2:] == ("layer2", "chat-turn_end")


def test_a_dictionary_is_measured_against_its_own_models_width():
    assert len(plan_of("sae.prefixes=32 64,128").cells) == 2
    with pytest.raises(UserError, match="rising sizes between 1 and 255"):
        plan_of("sae.prefixes=32,256")


def test_every_combination_is_a_cell_with_its_settings_put_in():
    plan = plan_of("sae.architecture=topk,jumprelu", "reward.lr=1e-6,5e-6", seeds=(0, 1))
    put_in = [plan.settings(cell) for cell in plan.cells]
    assert len(plan.cells) == 8
    assert {(one.sae.architecture, one.reward.lr) for one in put_in} == {
        (architecture, lr) for architecture in ("topk", "jumprelu") for lr in (1e-6, 5e-6)
    }
    assert all((one.model.layer, one.sae.d_sae, one.sae.k) == (1, 256, 8) for one in put_in)
    assert len({plan.cell_folder(cell) for cell in plan.cells}) == len({plan.name(cell) for cell in plan.cells}) == 8
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_the_sweeps_own_value_makes_the_cell_that_is_there_without_the_axis():
    """So that an axis that is added later runs only what is new."""
    before, after = plan_of(), plan_of("sae.architecture=topk,jumprelu", "reward.lr=1e-4,5e-6")
    assert set(before.cells) < set(after.cells)
    assert {before.cell_folder(cell) for cell in before.cells} < {after.cell_folder(cell) for cell in after.cells}
    assert {before.sae_folder(key) for key in before.saes} < {after.sae_folder(key) for key in after.saes}


def test_an_axis_of_one_value_is_shown_too():
    for value in ("topk", "jumprelu"):
        plan = plan_of(f"sae.architecture={value}")
        assert [plan.axes(cell)["sae.architecture"] for cell in plan.cells] == [value]


def test_the_order_in_which_axes_are_named_changes_no_folder():
    texts = ("sae.architecture=topk,jumprelu", "reward.lr=1e-6,5e-6")
    one, other = plan_of(*texts), plan_of(*reversed(texts))
    assert {one.cell_folder(cell) for cell in one.cells} == {other.cell_folder(cell) for cell in other.cells}


def test_cells_share_an_sae_unless_it_would_be_another():
    plan = plan_of("sae.architecture=topk,jumprelu", "reward.lr=1e-6,5e-6", "evaluation.top_features=5,6")
    assert len(plan.cells) == 8
    assert [dict(key.settings) for key in plan.saes] == [{}, {"sae.architecture": "jumprelu"}]
    assert len(plan.readings) == 1
    assert len(_of_one_read(plan, plan.saes)) == 1, "architectures learn from one read"


def test_saes_of_other_rates_or_batches_learn_apart():
    plan = plan_of("sae.lr=1e-3,2e-3", "sae.aux_k=0,4")
    groups = _of_one_read(plan, plan.saes)
    assert [len(group) for group in groups] == [2, 2]
    assert all(len({plan.sae(key).lr for key in group}) == 1 for group in groups)


def test_what_a_component_does_not_depend_on_makes_no_cells():
    plan = plan_of(
        "sae.architecture=topk,jumprelu",
        "reward.lr=1e-4,5e-6",
        "extraction.units=document,sentence",
        components=("scalar", "token_sae"),
    )
    scalar, token = ([cell for cell in plan.cells if cell.component == name] for name in ("scalar", "token_sae"))
    assert [dict(cell.settings) for cell in scalar] == [{}, {"reward.lr": 5e-6}]
    assert len(token) == 4, "it never reads sentences"
    assert plan.axes(scalar[1]) == {
        "layer": 1,
        "width": 0,
        "k": 0,
        "component": "scalar",
        "seed": 0,
        "d_sae": 0,
        "sae.architecture": None,
        "reward.lr": 5e-6,
        "extraction.units": None,
    }


def test_activations_are_extracted_once_for_each_reading_of_the_texts():
    plan = plan_of("extraction.units=document,sentence", "sae.lr=1e-3,2e-3", layers=(1, 2))
    assert list(plan.readings.values()) == [[1, 2], [1, 2]]
    own, sentences = (folders_of(plan.config, reading) for reading in plan.readings)
    assert [own.called(name) for name in KINDS] == ["text", "chat", "heldout"]
    assert [sentences.called(name) for name in KINDS] == ["text-sentence", "chat", "heldout"]
    coarse = plan_of("extraction.dtype=float16,bfloat16")
    own, other = (folders_of(coarse.config, reading) for reading in coarse.readings)
    assert own.called("text") == "text"
    assert {other.called(name) for name in KINDS}.isdisjoint({"text", "chat", "heldout"})
    assert (
        len({coarse.sae_folder(key) for key in coarse.saes})
        == len({coarse.cell_folder(cell) for cell in coarse.cells})
        == 2
    )


def test_models_of_several_widths_are_one_axis():
    config = plan_of("model.name=tiny:llama,demo:smollm2").config
    widths = {"tiny:llama": 64, "demo:smollm2": 576}
    plan = sweep_plan(config, check_sweep(config), lambda model: widths[model.name])
    assert [plan.axes(cell)["d_sae"] for cell in plan.cells] == [256, 2304]
    assert [plan.sae(key).d_sae for key in plan.saes] == [256, 2304]


def test_one_axis_at_a_time_goes_through_the_sweeps_own_value_or_the_first():
    plan = plan_of(
        "sae.architecture=batch_topk,topk", "reward.lr=1e-6,5e-6", design="axes", centre=(1, 4, 8), widths=(2, 4)
    )
    points = [(cell.width, plan.axes(cell)["sae.architecture"], plan.axes(cell)["reward.lr"]) for cell in plan.cells]
    assert points == [(4, "topk", 1e-6), (2, "topk", 1e-6), (4, "batch_topk", 1e-6), (4, "topk", 5e-6)]


def test_components_and_more_seeds_stand_at_the_centre_of_every_axis():
    plan = plan_of("reward.lr=1e-6,5e-6", centre=(1, 4, 8), components=("sarm", "scalar"), centre_seeds=(1,))
    found = [(cell.component, plan.axes(cell)["reward.lr"], cell.seed) for cell in plan.cells]
    assert found == [
        ("sarm", 1e-6, 0),
        ("sarm", 1e-6, 1),
        ("sarm", 5e-6, 0),
        ("scalar", 1e-6, 0),
        ("scalar", 1e-6, 1),
    ]


def test_a_searcher_proposes_values_of_the_axes_and_lands_on_cells_of_the_plan():
    plan = plan_of("sae.prefixes=32 64,128", "reward.lr=1e-4,5e-6", search="optuna", components=("sarm", "scalar"))
    space = _space(plan, plan.cells)
    assert {"sae.prefixes", "reward.lr"} < space.keys()
    for component in ("sarm", "scalar"):
        for number in (0, 1):
            proposed = {"layer": 1, "width": 4, "k": 8, "component": component, "seed": 0}
            cell = cell_of(plan, {**proposed, "sae.prefixes": number, "reward.lr": number})
            assert cell in plan.cells
            assert plan.axes(cell)["reward.lr"] == (1e-4, 5e-6)[number]


def test_no_value_makes_a_name_too_long_or_a_path():
    plan = plan_of(f"model.system_prompt=be/good,{'x' * 500},{'x' * 501}")
    names = [plan.name(cell) for cell in plan.cells]
    assert len(set(names)) == 3
    assert all(len(name) < 150 and "/" not in name for name in names)


def test_the_dry_run_and_mlflow_name_the_axes(tmp_path):
    config = plan_of("sae.architecture=topk,jumprelu", "reward.lr=1e-6,5e-6").config
    config = replace(config, run=replace(config.run, out=tmp_path))
    said = describe_sweep(config)
    assert "axis         sae.architecture topk, jumprelu" in said
    assert "4 of sarm; 2 SAEs" in said
    few = parameters(json.loads(as_json(config)))
    assert few["axes"] == "sae.architecture=topk,jumprelu, reward.lr=1e-6,5e-6"
    assert few["axes"] in description(few, {})
    assert "axes" not in parameters(json.loads(as_json(ABLATIONS["tiny"][1])))


@pytest.mark.parametrize("name", ABLATIONS)
def test_grids_of_named_axes_keep_the_folders_that_they_always_had(name, tmp_path):
    """Recorded before settings could be axes, the papers' when they got a limit of sentences: a folder of another name would be trained again."""
    recorded = json.loads((Path(__file__).parent / "sweep_names.json").read_text())[name]
    d_in = {"tiny": 64, "paper-3b": 3072, "paper-8b": 4096}.get(name, 576)
    config = ABLATIONS[name][1]
    config = fitted(replace(config, run=replace(config.run, out=tmp_path)), Machine(2)).config
    plan = sweep_plan(config, check_sweep(config), lambda model: d_in)
    assert [plan.cell_folder(cell).name for cell in plan.cells] == recorded["cells"]
    assert [plan.sae_folder(key).name for key in plan.saes] == recorded["saes"]
    assert {folders_of(config, reading).called("chat") for reading in plan.readings} == {"chat"}
    has_tokens = "token_sae" in config.sweep.components
    assert [folders_of(config, reading).called("text") for reading in plan.readings] == ["text"] + [
        "text-token"
    ] * has_tokens
