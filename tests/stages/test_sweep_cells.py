"""Which cells an ablation has, what they share, and what is refused before anything starts."""

import json
from dataclasses import replace

import pytest

from sarm.engine.ray.machine import Machine
from sarm.engine.ray.room import Cluster, Node
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.sweep import Ablation, SweepSettings
from sarm.settings.sweep_presets import ABLATIONS
from sarm.stages.fitting import fitted
from sarm.stages.sweep import cells as sweep_cells
from sarm.stages.sweep.cells import check_sweep, sweep_plan
from sarm.stages.sweep.cost import describe_sweep
from sarm.stages.sweep.folder import claim_sweep, move_sweep_aside, refuse_other_sweep
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.points import Cell
from sarm.stages.sweep.run import check_plan
from sarm.stages.sweep.stages import _of_one_read
from sarm.stages.sweep.trials import trials_at_once

GRID = SweepSettings(layers=(1, 2), widths=(2, 4), ks=(4, 8), seeds=(0, 1))


def cells_of(sweep: SweepSettings) -> list[Cell]:
    return sweep_cells.cells_of(replace(ABLATIONS["tiny"][1], sweep=sweep))


def plan_of(config: Ablation, cells: list[Cell]) -> SweepPlan:
    return sweep_plan(config, cells, lambda model: 64)


@pytest.fixture
def tiny(tmp_path) -> Ablation:
    preset = ABLATIONS["tiny"][1]
    return replace(preset, run=replace(preset.run, out=tmp_path / "sweep"))


def test_a_grid_has_every_combination_once():
    cells = cells_of(GRID)
    assert len(cells) == len(set(cells)) == 16
    assert Cell(2, 4, 8, "sarm", 1) in cells


def test_what_a_component_does_not_depend_on_makes_no_cells():
    cells = cells_of(replace(GRID, components=("scalar", "scalar_full")))
    assert cells == [
        Cell(1, 0, 0, "scalar", 0),
        Cell(1, 0, 0, "scalar", 1),
        Cell(2, 0, 0, "scalar", 0),
        Cell(2, 0, 0, "scalar", 1),
        Cell(0, 0, 0, "scalar_full", 0),
        Cell(0, 0, 0, "scalar_full", 1),
    ]


def test_axes_go_through_the_centre_and_components_stand_at_it():
    sweep = replace(GRID, design="axes", centre=(1, 4, 8), components=("sarm", "random_encoder"), seeds=(0,))
    points = {(c.layer, c.width, c.k, c.component) for c in cells_of(sweep)}
    assert points == {
        (1, 4, 8, "sarm"),
        (2, 4, 8, "sarm"),
        (1, 2, 8, "sarm"),
        (1, 4, 4, "sarm"),
        (1, 4, 8, "random_encoder"),
    }


def test_more_seeds_at_the_centre_are_for_the_centre_alone():
    sweep = replace(GRID, centre=(1, 4, 8), components=("sarm", "scalar"), seeds=(0,), centre_seeds=(1, 2))
    more = [cell for cell in cells_of(sweep) if cell.seed]
    assert more == [
        Cell(1, 4, 8, "sarm", 1),
        Cell(1, 4, 8, "sarm", 2),
        Cell(1, 0, 0, "scalar", 1),
        Cell(1, 0, 0, "scalar", 2),
    ]
    assert len(cells_of(sweep)) == 8 + 1 + 4


def test_the_papers_grid_is_its_table():
    sarm = [c for c in cells_of(ABLATIONS["paper-3b"][1].sweep) if c.component == "sarm" and c.seed == 0]
    assert [c.layer for c in sarm if c[1:3] == (16, 144)] == [7, 10, 14, 21, 28]
    assert sorted(c.width for c in sarm if (c.layer, c.k) == (14, 144)) == [8, 12, 16, 24, 32]
    assert sorted(c.k for c in sarm if (c.layer, c.width) == (14, 16)) == [48, 96, 144, 196, 240]
    assert len(sarm) == 13


def test_a_random_search_draws_distinct_cells_of_the_grid():
    drawn = cells_of(replace(GRID, search="random", num_samples=5))
    assert len(set(drawn)) == 5
    assert set(drawn) < set(cells_of(GRID))
    with pytest.raises(UserError, match="at most 16"):
        cells_of(replace(GRID, search="random", num_samples=17))


def test_saes_of_one_layer_and_unit_learn_from_one_read_whatever_their_width_k_and_seed():
    sweep = replace(GRID, components=("sarm", "random_encoder", "token_sae", "scalar"))
    tiny = replace(ABLATIONS["tiny"][1], sweep=sweep)
    plan = plan_of(tiny, cells_of(sweep))
    keys = plan.saes
    assert len(keys) == 32, "random encoders take their biases from the trained SAEs, scalar heads have none"
    groups = _of_one_read(plan, keys)
    assert [{(key.layer, key.unit) for key in group} for group in groups] == [
        {(1, "document")}, {(1, "token")}, {(2, "document")}, {(2, "token")}
    ]  # fmt: skip
    fewer = plan_of(replace(tiny, sweep=replace(sweep, saes_at_once=5)), list(plan.cells))
    assert [len(group) for group in _of_one_read(fewer, keys)] == [5, 3] * 4
    assert plan.sae_key(Cell(1, 0, 0, "scalar", 0)) is None


def test_folders_are_found_by_what_decides_them(tiny):
    cells = cells_of(tiny.sweep)
    plan = plan_of(tiny, cells)
    folders = {plan.cell_folder(cell) for cell in cells}
    assert len(folders) == len(cells)
    slower = plan_of(replace(tiny, reward=replace(tiny.reward, epochs=3)), cells)
    assert folders.isdisjoint({slower.cell_folder(cell) for cell in cells})
    assert {slower.sae_folder(key) for key in plan.saes} == {plan.sae_folder(key) for key in plan.saes}
    random = [Cell(1, 4, 8, name, 0) for name in ("random_encoder", "random_directions")]
    assert len({plan.cell_folder(cell).name.rpartition("-")[2] for cell in random}) == 2
    operational = plan_of(replace(tiny, sweep=replace(tiny.sweep, retries=5, report_steps=1)), cells)
    assert folders == {operational.cell_folder(cell) for cell in cells}


def test_a_cells_folder_does_not_depend_on_the_other_cells(tiny):
    few, many = (replace(tiny, sweep=replace(tiny.sweep, ks=ks)) for ks in ((8,), (4, 8, 16)))
    plans = [plan_of(config, cells_of(config.sweep)) for config in (few, many)]
    assert {plans[0].cell_folder(c) for c in plans[0].cells} < {plans[1].cell_folder(c) for c in plans[1].cells}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": ()}, "the grid would be empty"),
        ({"widths": (4, 4)}, "cells would be repeated"),
        ({"ks": (0,)}, "1 or more"),
        ({"seeds": (-1,)}, "0 or more"),
        ({"design": "axes", "centre": None}, "--sweep.centre"),
        ({"centre": (3, 4, 8)}, "among --sweep.layers"),
        ({"centre_seeds": (1,), "centre": None}, "given for --sweep.centre-seeds"),
        ({"centre_seeds": (0,)}, "not among --sweep.seeds"),
        ({"grace_percent": 0}, "between 1 and 99"),
    ],
)
def test_a_grid_that_is_none_is_refused_where_it_is_made(tiny, changed, message):
    with pytest.raises(UserError, match=message):
        replace(tiny.sweep, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sweep": {"layers": (1, 3)}}, "3.*2"),
        ({"sweep": {"widths": (1,), "ks": (65,), "centre": None}}, "k=65 is more than the 1 x 64 latents"),
        ({"reward": {"baselines": ("scalar",)}}, "components of an ablation"),
        ({"extraction": {"units": ("document", "token")}}, "learn from one unit"),
        ({"sweep": {"search": "optuna", "design": "axes"}}, "Optuna proposes points of a grid"),
        ({"data": {"pairs": ()}}, "no preference pairs"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tiny, changed, message):
    parts = {name: replace(getattr(tiny, name), **values) for name, values in changed.items()}
    with pytest.raises(UserError, match=message):
        check_plan(replace(tiny, **parts))
    assert not tiny.run.out.exists()


def test_a_folder_of_another_sweep_is_refused_and_one_of_other_cells_is_not(tiny, tmp_path):
    claim_sweep(tiny)
    refuse_other_sweep(replace(tiny, sweep=replace(tiny.sweep, ks=(4, 8), seeds=(0, 1))))
    refuse_other_sweep(replace(tiny, run=replace(tiny.run, num_workers=2)))
    for other in (
        replace(tiny, reward=replace(tiny.reward, epochs=3)),
        replace(tiny, model=ModelSettings(name="demo:smollm2", layer=1)),
        replace(tiny, run=replace(tiny.run, seed=1)),
    ):
        with pytest.raises(UserError, match=r"is a sweep with .*, now asked for .* pass another --out"):
            refuse_other_sweep(other)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="no sweep"):
        refuse_other_sweep(replace(tiny, run=replace(tiny.run, out=tmp_path / "other")))


def test_as_many_trials_run_at_once_as_the_cluster_has_room_for(tiny):
    def cluster(cpus: int, gpus: int = 0, *, is_local: bool = False) -> Cluster:
        return Cluster(nodes=(Node(cpus, gpus),), is_local=is_local)

    run = tiny.run
    assert trials_at_once(tiny.sweep, run, cluster(2, is_local=True)) == 2
    assert trials_at_once(tiny.sweep, run, cluster(2)) == 1, "a core of a shared cluster is left to its controllers"
    assert trials_at_once(tiny.sweep, replace(run, cpus_per_worker=0), cluster(8, is_local=True)) == 1
    assert trials_at_once(replace(tiny.sweep, trials_at_once=3), run, cluster(9)) == 3
    assert trials_at_once(tiny.sweep, replace(run, num_workers=4), cluster(64, 8)) == 2
    with pytest.raises(UserError, match=r"the cluster has 8\. Pass"):
        trials_at_once(tiny.sweep, replace(run, num_workers=4, cpus_per_worker=4), cluster(8))
    with pytest.raises(UserError, match="the cluster has 2"):
        trials_at_once(tiny.sweep, replace(run, num_workers=4), cluster(64, 2))


def test_a_dry_run_counts_what_would_be_done(tmp_path):
    smollm2 = replace(ABLATIONS["smollm2"][1], run=replace(ABLATIONS["smollm2"][1].run, out=tmp_path))
    said = describe_sweep(smollm2)
    assert "23 of sarm, random_encoder, random_directions, scalar; 14 SAEs" in said
    assert {"GPU-hours", "disk", "time"} <= {line.split()[0] for line in said.splitlines() if line}
    one = replace(smollm2, sweep=SweepSettings(layers=(8,), widths=(8,), ks=(14,)))
    assert flops(describe_sweep(one)) < flops(said) / 12
    claim_sweep(fitted(smollm2, Machine(2)).config)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "manifest.json").write_text(json.dumps({"counts": {"splits": {"train": 100}}}))
    assert "100 training pairs of 51 tokens" in describe_sweep(smollm2), "what has been counted is not guessed"


def test_the_papers_ablation_costs_what_was_calculated_by_hand(tmp_path):
    paper = replace(ABLATIONS["paper-3b"][1], run=replace(ABLATIONS["paper-3b"][1].run, out=tmp_path))
    said = describe_sweep(paper)
    assert "51 of sarm" in said
    assert "42" in said.partition("cells")[2].partition("search")[0]
    # 100.7 H100-hours at 40 % of the peak, of which all but 5 % are the rewards' three epochs with checkpointing.
    assert flops(said) / (0.4 * 989e12) / 3600 == pytest.approx(101, rel=0.01)
    assert "about 100 of one H100" in said


def flops(said: str) -> float:
    (line,) = [line for line in said.splitlines() if line.startswith("compute")]
    return float(line.split()[1])


def test_the_checks_know_a_plain_grid(tiny):
    assert check_sweep(tiny) == cells_of(tiny.sweep)
    assert json.dumps([list(cell) for cell in check_sweep(tiny)])


def test_a_sweep_is_redone_from_a_stage_with_other_settings_of_that_stage_alone(tmp_path):
    """Seen: after `--redo-from train_sarm` the folder was refused as no sweep, with and without the flag."""
    tiny = replace(ABLATIONS["tiny"][1], run=replace(ABLATIONS["tiny"][1].run, out=tmp_path / "sweep"))
    claim_sweep(tiny)
    for name in ("corpus", "pairs", "activations", "sae", "cells", "report"):
        (tiny.run.out / name).mkdir()
    other = replace(tiny, reward=replace(tiny.reward, lr=1e-5))
    with pytest.raises(UserError, match=r"reward.lr=.*--redo-from train_sarm"):
        refuse_other_sweep(other)
    asked = replace(other, run=replace(other.run, redo_from="train_sarm"))
    refuse_other_sweep(asked)
    with pytest.raises(UserError, match=r"sae.lr=.*--redo-from train_sae"):
        refuse_other_sweep(replace(asked, sae=replace(asked.sae, lr=1e-5)))
    assert move_sweep_aside(asked) is not None
    assert sorted(path.name for path in tiny.run.out.glob("[!.]*")) == [
        "activations",
        "corpus",
        "pairs",
        "sae",
        "sweep.json",
    ]
    refuse_other_sweep(other)
    with pytest.raises(UserError, match="a sweep has no stage evaluate"):
        refuse_other_sweep(replace(tiny, run=replace(tiny.run, redo_from="evaluate")))
