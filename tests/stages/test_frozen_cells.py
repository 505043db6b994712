"""SparseRM as a component of a sweep: which cells it makes, what it costs, and a cell that is done on stored activations without a cluster."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.data.store.activation_stores import table_of, write_store

from sarm.contracts.folders import EVALUATION_FOLDER, PAIRS_FOLDER, SAE_FOLDER, SPARSE_RM_FOLDER
from sarm.contracts.ids import stable_int
from sarm.contracts.manifest import StageFolder, read_manifest
from sarm.data.formats.sae_folder import load_sae, save_sae
from sarm.nn.architectures import build_sae
from sarm.report.sweep_table import as_markdown, best_row
from sarm.settings.sweep import Ablation, SweepSettings
from sarm.settings.sweep_presets import ABLATIONS
from sarm.stages.sweep.cells import cells_of, sweep_plan
from sarm.stages.sweep.frozen_cell import do_frozen
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.points import Cell
from sarm.stages.sweep.readings import CellFolders, folders_of
from sarm.stages.sweep.report import rows_of
from sarm.stages.sweep.trials import _last_loss

D_IN, NUM_TRAIN, NUM_HELDOUT = 64, 120, 60


@pytest.fixture
def config(tmp_path: Path) -> Ablation:
    tiny = ABLATIONS["tiny"][1]
    sweep = SweepSettings(layers=(1,), widths=(2,), ks=(8,), components=("sarm", "sparse_rm"), seeds=(0, 1))
    return replace(tiny, run=replace(tiny.run, out=tmp_path / "sweep"), sweep=sweep)


def plan_of(config: Ablation) -> SweepPlan:
    return sweep_plan(config, cells_of(config), lambda model: D_IN)


def test_a_sparse_rm_stands_at_every_width_and_k_and_reads_the_sae_of_the_sarm_there(config):
    plan = plan_of(config)
    assert plan.cells == (
        Cell(1, 2, 8, "sarm", 0),
        Cell(1, 2, 8, "sarm", 1),
        Cell(1, 2, 8, "sparse_rm", 0),
        Cell(1, 2, 8, "sparse_rm", 1),
    )
    for seed in (0, 1):
        assert plan.sae_key(Cell(1, 2, 8, "sparse_rm", seed)) == plan.sae_key(Cell(1, 2, 8, "sarm", seed))
    assert len(plan.saes) == 2
    assert plan.name(plan.cells[2]) == "sparse-rm-layer1-x2-k8-s0"
    assert plan.readings, "its activations would not be extracted"


def test_settings_of_reward_training_make_no_cells_of_a_sparse_rm_and_those_of_its_sae_do(config):
    axes = replace(config.sweep, axes=("reward.lr=1e-6,5e-6", "sae.architecture=topk,jumprelu"), seeds=(0,))
    cells = cells_of(replace(config, sweep=axes))
    counts = {name: sum(cell.component == name for cell in cells) for name in config.sweep.components}
    assert counts == {"sarm": 4, "sparse_rm": 2}


class Here:
    """A session that does stages in this process, without a cluster and without tracking."""

    def __init__(self, plan: SweepPlan, cell: Cell):
        key = plan.sae_key(cell)
        shared = folders_of(plan.config, plan.reading(key or cell))
        self.run, self.did = plan.run(cell), list[str]()
        self.folders = CellFolders(self.run.out, shared, cell.layer, key and plan.sae_folder(key))

    def stage(self, name: str, folder: StageFolder, body: Any, **_: Any) -> Any:
        if (done := folder.finished()) is not None:
            return done
        self.did.append(name)
        folder.claim()
        counts = body(SimpleNamespace(log_artifact=lambda _: None))
        return folder.finish({**counts, "seconds": 1.5})


def write_shared(plan: SweepPlan, cell: Cell) -> None:
    """Pairs, activations in which one direction tells chosen from rejected, and an SAE of random directions and that one."""
    folders = Here(plan, cell).folders
    generator = torch.Generator().manual_seed(0)
    good_D = torch.nn.functional.normalize(torch.randn(D_IN, generator=generator), dim=0)
    good_D -= good_D.mean()
    ids = [f"p{n}" for n in range(NUM_TRAIN + NUM_HELDOUT)]
    splits = ["train"] * NUM_TRAIN + ["heldout"] * NUM_HELDOUT
    subsets = pa.array([None] * len(ids), pa.string())
    pairs = pa.table({"pair_id": ids, "prompt_id": [f"q{n // 2}" for n in range(len(ids))], "subset": subsets, "split": splits})  # fmt: skip
    StageFolder(folders.pairs, PAIRS_FOLDER, {}).write(lambda: pq.write_table(pairs, folders.pairs / "part-000000.parquet"))  # fmt: skip
    for folder, split in ((folders.chat_activations, "train"), (folders.heldout_activations, "heldout")):
        own = [stable_int(one) for one, of in zip(ids, splits, strict=True) if of == split]
        shared_ND = 0.3 * torch.randn(len(own), D_IN, generator=generator)
        noise = 0.8 * torch.randn(len(own), generator=generator)
        x = torch.cat([shared_ND + (1 + noise)[:, None] * good_D, shared_ND - (1 - noise)[:, None] * good_D])
        sides = ["chosen"] * len(own) + ["rejected"] * len(own)
        write_store(folder, [table_of(x, dtype="bfloat16", own={"row_id": own * 2, "side": sides})])
    sae = build_sae("topk", D_IN, 128, 8)
    sae.initialise_(torch.randn(64, D_IN, generator=generator), generator)
    with torch.no_grad():
        sae.W_dec[5], sae.W_enc[:, 5], sae.W_dec[6], sae.W_enc[:, 6] = good_D, good_D, -good_D, -good_D
        sae.normalise_decoder_()
    stage = StageFolder(folders.sae, SAE_FOLDER, {})
    stage.claim()
    save_sae(sae, folders.sae, {"activations": {"d_in": D_IN, "model": "tiny:llama", "layer": 1}})
    stage.finish({"figures": {}, "seconds": 1.0})


@pytest.fixture
def done(config: Ablation) -> tuple[SweepPlan, Cell, Here]:
    plan = plan_of(replace(config, sweep=replace(config.sweep, components=("sparse_rm",), seeds=(0,))))
    (cell,) = plan.cells
    write_shared(plan, cell)
    session = Here(plan, cell)
    do_frozen(session, plan, cell)  # type: ignore[arg-type]
    return plan, cell, session


def test_a_cell_is_fitted_and_measured_on_stored_activations_and_has_its_row_of_the_table(done):
    plan, cell, session = done
    assert session.did == ["fit SparseRM", "evaluate"]
    (row,) = rows_of(plan)
    assert (row["component"], row["status"], row["k"], row["training_seconds"]) == ("sparse_rm", "done", 8, 1.5)
    assert row["ci95_low"] <= row["heldout_accuracy"] <= row["ci95_high"]
    assert row["heldout_accuracy"] > 0.8
    assert 0 < row["fvu_heldout"] < 2
    assert "| sparse_rm | 1 | 2x | 8 | 1 |" in as_markdown([row], "sweep")
    assert best_row([row]) is None, "a head without a model cannot be registered"
    loss = _last_loss(plan.cell_folder(cell), 10)
    assert loss == read_manifest(plan.cell_folder(cell) / "sparse_rm", SPARSE_RM_FOLDER).counts["figures"]["cv_nll"]
    assert loss < np.log(2)


def test_the_scores_are_those_of_the_head_that_was_written(done):
    plan, cell, session = done
    head = json.loads((plan.cell_folder(cell) / "sparse_rm" / "head.json").read_text())
    sae, _ = load_sae(session.folders.sae)
    assert {5, 6} & set(head["latents"])
    d_FD = sae.W_dec[head["latents"]].detach().numpy()
    by_hand_D = np.array(head["head"]) @ (d_FD / np.linalg.norm(d_FD, axis=1, keepdims=True))
    assert head["weight"] == pytest.approx(by_hand_D, abs=1e-5)
    scores = pq.read_table(plan.cell_folder(cell) / "evaluation" / "sparse_rm_scores" / "part-000000.parquet")
    assert scores.num_rows == NUM_HELDOUT
    won = np.array(scores["chosen_reward"]) > np.array(scores["rejected_reward"])
    found = read_manifest(plan.cell_folder(cell) / "evaluation", EVALUATION_FOLDER).counts["figures"]
    assert found["heldout_accuracy"] == pytest.approx(won.mean())


def test_a_finished_cell_is_not_done_again(done):
    plan, cell, _ = done
    again = Here(plan, cell)
    do_frozen(again, plan, cell)  # type: ignore[arg-type]
    assert again.did == []
