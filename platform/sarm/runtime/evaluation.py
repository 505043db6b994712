"""The evaluation stage: score held-out pairs on the cluster, then measure, attribute and collect contexts in this process."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from sarm import schema
from sarm.config import Evaluation, Extraction, Model
from sarm.data.activations import ActivationStore
from sarm.data.artifacts import load_sarm
from sarm.data.models import model_folder
from sarm.evaluate import pairs as measures
from sarm.evaluate.probe import fit_probe
from sarm.interpret.attribution import check_completeness, feature_table
from sarm.interpret.contexts import ContextRecord, collect_contexts
from sarm.manifest import read_manifest
from sarm.nn.sae import standardise
from sarm.runtime.actors import PairScores, Source
from sarm.runtime.extraction import run_over
from sarm.runtime.reward_training import load_pairs
from sarm.runtime.session import Session, say
from sarm.runtime.tracking import StageRun


def evaluate(
    session: Session, extraction: Extraction, evaluation: Evaluation, folder: Path, child: StageRun
) -> Mapping[str, Any]:
    """Write scores, `metrics.json`, features and contexts into `folder`; returns the stage's counts."""
    settings = (evaluation.resamples, session.run.seed)
    scores = {"sarm": _score(session, extraction, "sarm", folder)}
    if session.folders.scalar_head.exists():
        scores["scalar_head"] = _score(session, extraction, "scalar_head", folder)
    say("evaluate: fitting the logistic probe on frozen activations")
    scores["probe"] = probe_scores(session, scores["sarm"])
    metrics: dict[str, Any] = {name: measures.measure_pairs(table, *settings) for name, table in scores.items()}
    metrics |= {f"{name}_answer": value for name, value in measures.length_baseline(scores["sarm"], *settings).items()}
    metrics["random"] = measures.random_baseline(scores["sarm"], *settings)
    metrics["sarm_minus"] = {
        name: measures.accuracy_difference(scores["sarm"], table, *settings)
        for name, table in scores.items()
        if name != "sarm"
    }

    weight = load_sarm(session.folders.sarm).score.weight.detach().squeeze(0).numpy()
    metrics["completeness"] = check_completeness(scores["sarm"], weight)
    features = feature_table(scores["sarm"], weight)
    contexts = collect_contexts(_records(session, scores["sarm"]), None, evaluation.contexts_per_feature)
    pq.write_table(features, folder / "features.parquet", write_page_checksum=True)
    pq.write_table(contexts, folder / "contexts.parquet", write_page_checksum=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    child.log_artifact(folder / "metrics.json")
    child.log_artifact(folder / "features.parquet")
    child.log_table(
        features.sort_by([("mean_margin_contribution", "descending")]).slice(0, 200).to_pylist(), "features.json"
    )
    figures = {
        "heldout_accuracy": metrics["sarm"].get("accuracy"),
        "length_baseline_accuracy": metrics["shorter_answer"].get("accuracy"),
        "probe_accuracy": metrics["probe"].get("accuracy"),
        "scalar_head_accuracy": metrics.get("scalar_head", {}).get("accuracy"),
        "num_features": features.num_rows,
        "completeness": metrics["completeness"],
    }
    return {"figures": figures, "rows": scores["sarm"].num_rows}


def probe_scores(session: Session, like: pa.Table) -> pa.Table:
    """The held-out pairs of `like` with the rewards of a logistic probe on the frozen activations of the training pairs."""
    train = _sides(session.folders.chat_activations)
    heldout = _sides(session.folders.heldout_activations)
    pairs = load_pairs(session.folders.pairs, "train").select(["pair_id", "prompt_id"]).to_pylist()
    usable = [pair for pair in pairs if (pair["pair_id"], "chosen") in train and (pair["pair_id"], "rejected") in train]
    chosen, rejected = (np.stack([train[pair["pair_id"], side] for pair in usable]) for side in ("chosen", "rejected"))
    probe = fit_probe(chosen, rejected, np.array([pair["prompt_id"] for pair in usable]), session.run.seed)
    for side in ("chosen", "rejected"):
        width = chosen.shape[1]
        x = np.stack(
            [heldout.get((pair_id, side), np.full(width, np.nan)) for pair_id in like.column("pair_id").to_pylist()]
        )
        index = like.schema.get_field_index(f"{side}_reward")
        like = like.set_column(index, like.schema.field(index), pa.array(probe.rewards(x), pa.float32()))
    return like


def _sides(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    table, vectors = ActivationStore(folder).read(["doc_id", "side"])
    keys = zip(table.column("doc_id").to_pylist(), table.column("side").to_pylist(), strict=True)
    return dict(zip(keys, standardise(vectors).numpy(), strict=True))


def _score(session: Session, extraction: Extraction, name: str, folder: Path) -> pa.Table:
    say(f"evaluate: scoring held-out pairs with {name}")
    reward_model = session.folders.out / name
    config = read_manifest(reward_model, "sarm/v1").config
    model = Model(
        **{
            key: config[key]
            for key in ("name", "revision", "gguf_file", "layer", "dtype", "max_length", "system_prompt")
        }
    )
    target = folder / f"{name}_scores"
    arguments = {"model": model, "folder": model_folder(model), "reward_model": reward_model, "extraction": extraction}
    files = sorted(session.folders.pairs.glob("*.parquet"))
    work = Source(f"score with {name}", read_manifest(session.folders.pairs, "pairs/v1").counts["splits"]["heldout"])
    run_over(
        work,
        files,
        _heldout,
        PairScores,
        arguments,
        schema.PAIR_SCORES,
        target,
        extraction.rows_per_file,
        session.run,
        session.cluster,
    )
    return ds.dataset([str(path) for path in sorted(target.glob("*.parquet"))]).to_table().replace_schema_metadata(None)


def _heldout(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table.column("split"), "heldout"))


def _records(session: Session, scores: pa.Table) -> Iterator[ContextRecord]:
    texts = {
        pair["pair_id"]: pair
        for pair in load_pairs(session.folders.pairs, "heldout").select(["pair_id", "chosen", "rejected"]).to_pylist()
    }
    for row in scores.to_pylist():
        for side in ("chosen", "rejected"):
            yield ContextRecord(
                row["pair_id"], side, texts[row["pair_id"]][side], row[f"{side}_latents"], row[f"{side}_values"]
            )
