"""An output folder with every kind of artifact, made by the writers that the stages use, but without a cluster: seconds, not minutes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow as pa
import torch
from tests.stages.random_sarm import random_sarm

from sarm.contracts.folders import ACTIVATIONS_FOLDER, CORPUS_FOLDER, PAIRS_FOLDER, SAE_FOLDER, SARM_FOLDER, Folders
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import activations_table
from sarm.data.formats.sae_folder import save_sae
from sarm.data.formats.sae_weights import STANDARDISED
from sarm.data.sources.prepare import prepare_corpus, prepare_pairs
from sarm.data.store.activations import activation_table, statistics_of
from sarm.data.store.checkpoints import Checkpoints
from sarm.data.store.parts import finished_table, read_counts, write_part
from sarm.data.tokens.chat import ChatTokenizer
from sarm.nn.architectures import build_sae
from sarm.settings.presets import PRESETS
from sarm.stages import plan

TINY = PRESETS["tiny"][1]
D_IN, ROWS = 64, 96
STATES = {"config": {"lr": 0.1}, "inputs": {}}


def activation_folder(
    folder: Path, key: tuple[str, str, int], x_ND: torch.Tensor, made_from: tuple[str, Path] | None, **about: object
) -> None:
    """activations/v1 of these vectors, as the tiny preset would have it: finished, of two parts."""
    settings = plan.activation_settings(TINY.model, TINY.extraction, *key)
    inputs = {made_from[0]: (made_from[1], made_from[0])} if made_from else None
    stage = StageFolder(folder, ACTIVATIONS_FOLDER, settings, inputs)
    stage.claim()
    kind = {"d_in": x_ND.shape[1], "dtype": "float16", "layer": key[2], "model": "tiny:llama", **about}
    table_schema = activations_table(x_ND.shape[1], kind)
    for number, rows in enumerate(torch.arange(len(x_ND)).chunk(2)):
        columns = {
            "row_id": rows.tolist(),
            "doc_id": [f"doc{n // 3}" for n in rows.tolist()],
            "side": ["text"] * len(rows),
            "position": rows.tolist(),
            "token_id": [5] * len(rows),
            "num_tokens": [9] * len(rows),
        }
        table = activation_table(columns, x_ND[rows], "float16", table_schema)
        table = table.append_column("reject", pa.nulls(len(rows), pa.string()))
        table = table.append_column("truncated", pa.array([False] * len(rows)))
        write_part(finished_table(table, table_schema), folder, number)
    counts = read_counts(folder)
    (folder / "statistics.json").write_text(json.dumps(statistics_of(counts.pop("moments"))))
    stage.finish({**counts, "activations": kind})


def write_run(out: Path, tiny_folder: Path, chat: ChatTokenizer) -> Path:
    """corpus, pairs, activations, SAE, SARM and two training states of the tiny preset; nothing in it was trained."""
    data = dataclasses.replace(TINY.data, max_texts=30, max_pairs=60)
    for planned, prepare in (
        (plan.corpus, prepare_corpus),
        (plan.pairs, prepare_pairs),
    ):
        stage = planned(Folders(out), TINY.data).open()
        stage.claim()
        stage.finish(prepare(data, stage.folder))
    x_ND = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0))
    activation_folder(out / "activations" / "text", ("all", "document", 1), x_ND, (CORPUS_FOLDER, out / "corpus"))
    activation_folder(out / "activations" / "chat", ("train", "chat", 1), x_ND + 1, (PAIRS_FOLDER, out / "pairs"))
    write_sae(out / "sae", out, {"model": "tiny:llama", "layer": 1, "d_in": D_IN})
    sarm = StageFolder(out / "sarm", SARM_FOLDER, {})
    sarm.claim()
    random_sarm(out / "sarm", tiny_folder, chat)
    sarm.finish({"figures": {}})
    states = Checkpoints(out / "training" / "sarm", STATES)
    for step in (1, 2):
        states.save(step, {"shared": {"weight": torch.full((64,), float(step))}, "rank-0": {"losses": [0.5, step]}})
    return out


def write_sae(folder: Path, out: Path, made_for: dict[str, object], d_in: int = D_IN) -> None:
    """The SAE of the tiny preset on the run's activations, untrained."""
    shutil.rmtree(folder, ignore_errors=True)
    inputs = {f"activations/{name}": (out / "activations" / name, ACTIVATIONS_FOLDER) for name in ("text", "chat")}
    stage = StageFolder(folder, SAE_FOLDER, plan.sae_settings(TINY.sae, TINY.run.seed), inputs)
    stage.claim()
    sae = build_sae("topk", d_in, TINY.sae.d_sae, TINY.sae.k)
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    save_sae(sae, folder, {"input": STANDARDISED, "activations": made_for})
    stage.finish({"figures": {}})


def refinish(folder: Path, kind: str) -> None:
    """Write the manifest of a folder again over what it holds now, as somebody would who means it to be believed."""
    fields = json.loads((folder / "manifest.json").read_text())
    stage = StageFolder(folder, kind, fields["config"])
    stage.inputs = fields["inputs"]
    stage.finish(fields["counts"])
