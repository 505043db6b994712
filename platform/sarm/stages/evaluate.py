"""The evaluation stage: score held-out pairs on the cluster, then measure, attribute and collect contexts in this process."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.contracts.figures import plain_values
from sarm.contracts.folders import BASELINES, SAE_FOLDER, SARM_FOLDER
from sarm.contracts.manifest import Manifest, read_manifest
from sarm.contracts.passes import SPELLED_COUNTS
from sarm.contracts.tables import PAIR_SCORES_TABLE
from sarm.contracts.untrusted import read_json
from sarm.data.formats.models import model_folder
from sarm.data.formats.sae_folder import load_sae
from sarm.data.formats.sarm_folder import read_latents
from sarm.data.sources.prepare import NEAR_DUPLICATES
from sarm.data.store.blocks import plan_blocks
from sarm.data.store.pairs import PAIR_COLUMNS, of_split
from sarm.data.store.parts import read_counts, read_parts
from sarm.engine.mlflow import run_card
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.passes import Pass
from sarm.engine.ray.block_actor import Output
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.evaluate import pairs as measures
from sarm.interpret.attribution import check_completeness, feature_table
from sarm.interpret.contexts import strongest_texts
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.nn.sae import Sae
from sarm.passes.models import sarm_settings
from sarm.passes.pair_scores import PairScores
from sarm.passes.reader import Reader
from sarm.settings.checks import UserError
from sarm.settings.evaluation import EvaluationSettings
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings
from sarm.settings.sae import SaeSettings
from sarm.stages import plan
from sarm.stages.evaluate_frozen import (
    Frozen,
    dictionary_figures,
    probe_scores,
    read_frozen,
    sparse_head_scores,
    sparse_rm_scores,
)
from sarm.stages.evaluate_readability import answers_of, readability_of


def evaluate(session: Session, extraction: ExtractionSettings, evaluation: EvaluationSettings) -> Manifest:
    """pairs/v1, activations and models -> held-out scores, baselines, attributions and contexts."""
    folders = session.folders
    there = [name for name in BASELINES if (folders.out / name).exists()]
    folder = plan.evaluation(folders, evaluation, session.run.seed, there).open()

    def body(child: StageRun) -> Mapping[str, Any]:
        # Which command made it: later ones find it done, and write the same report.
        folder.note(command=run_card.origin().get("command", ""))
        return _measure(session, extraction, evaluation, folder.folder, child)

    return session.stage("evaluate", folder, body, resume=True)


def _measure(
    session: Session, extraction: ExtractionSettings, evaluation: EvaluationSettings, folder: Path, child: StageRun
) -> Mapping[str, Any]:
    """Write scores, `metrics.json`, features and contexts into `folder`; returns the stage's counts."""
    scores = {"sarm": score_heldout(session, extraction, "sarm", folder)}
    contents = _contents(folder / "sarm_scores")
    for name in BASELINES:
        if (session.folders.out / name).exists():
            scores[name] = score_heldout(session, extraction, name, folder)
    say("evaluate: fitting the logistic probe on frozen activations")
    frozen = read_frozen(session)
    scores["probe"] = probe_scores(frozen, scores["sarm"])
    sae, _ = load_sae(session.folders.sae)
    few_latents = _sparse_head(session, frozen, sae, scores)
    directions = _sparse_rm(session, frozen, sae, scores)
    metrics = {**_accuracies(session, scores), "few_latents": few_latents, "sparse_rm_head": directions}
    (weight,) = read_latents(session.folders.sarm, "score.weight")
    metrics["sae_on_heldout"] = dictionary_figures(sae, frozen)
    metrics["protocol_version"] = PROTOCOL_VERSION
    metrics["contents"] = contents
    metrics["completeness"] = check_completeness(scores["sarm"], weight)
    features = feature_table(scores["sarm"], weight)
    answers = answers_of(session.folders.pairs, scores["sarm"])
    say("evaluate: which words tell where its latents fire")
    metrics["readability"], named = readability_of(session.folders.sarm, answers, scores["sarm"], session.run.seed)
    metrics["names"] = {str(name.latent): name.figures() for name in named}
    contexts = strongest_texts(answers, evaluation.contexts_per_feature)
    pq.write_table(features, folder / "features.parquet", write_page_checksum=True)
    pq.write_table(contexts, folder / "contexts.parquet", write_page_checksum=True)
    (folder / "metrics.json").write_text(json.dumps(plain_values(metrics), indent=2))
    child.log_artifact(folder / "metrics.json")
    child.log_artifact(folder / "features.parquet")
    child.log_table(
        features.sort_by([("mean_margin_contribution", "descending")]).slice(0, 200).to_pylist(), "features.json"
    )
    figures = _figures(metrics, features.num_rows)
    return {"figures": figures, "rows": scores["sarm"].num_rows, **contents}


def _accuracies(session: Session, scores: Mapping[str, pa.Table]) -> dict[str, Any]:
    """The part of `metrics.json` that scores decide: each model's, what rules reach, and the SARM's differences from the others."""
    metrics: dict[str, Any] = {name: measures.measure_pairs(table) for name, table in scores.items()}
    metrics |= {f"{name}_answer": value for name, value in measures.length_baseline(scores["sarm"]).items()}
    metrics["random"] = measures.random_baseline(scores["sarm"], session.run.seed)
    metrics["sarm_minus"] = {
        name: measures.accuracy_difference(scores["sarm"], table) for name, table in scores.items() if name != "sarm"
    }
    metrics["near_duplicates"] = without_near_duplicates(scores, session.folders.pairs)
    return metrics


def _figures(metrics: Mapping[str, Any], num_features: int) -> dict[str, Any]:
    """What the manifest and MLflow show of the stage."""
    without = (metrics["near_duplicates"] or {}).get("without", {})
    return {
        "heldout_accuracy": metrics["sarm"].accuracy,
        "length_baseline_accuracy": metrics["shorter_answer"].accuracy,
        "accuracy_without_near_duplicates": without.get("sarm", {}).get("accuracy"),
        "probe_accuracy": metrics["probe"].accuracy,
        "scalar_head_accuracy": metrics["scalar_head"].accuracy if "scalar_head" in metrics else None,
        "fvu_heldout": metrics["sae_on_heldout"].fvu,
        "num_features": num_features,
        "completeness": metrics["completeness"],
        "contents_with_control_tokens": metrics["contents"]["contents_with_control_tokens"],
        "rejected": sum(metrics["contents"]["rejected"].values()),
    }


def _sparse_head(session: Session, frozen: Frozen, sae: Sae, scores: dict[str, pa.Table]) -> dict[str, Any] | None:
    """Add the held-out scores of a head of a few latents; returns how many it has and its penalty, None where there can be none."""
    # An SAE from elsewhere was trained on none of these prompts.
    share = read_manifest(session.folders.sae, SAE_FOLDER).config.get("heldout_share", SaeSettings().heldout_share)
    try:
        head, scores["sparse_head"] = sparse_head_scores(frozen, sae, share, scores["sarm"])
    except UserError as error:
        say(f"evaluate: no head of a few latents: {error}")
        return None
    return {"latents": head.num_latents, "C": head.C}


def _sparse_rm(session: Session, frozen: Frozen, sae: Sae, scores: dict[str, pa.Table]) -> dict[str, Any] | None:
    """Add the held-out scores of SparseRM; returns its size and penalty, None where there can be none."""
    try:
        model, scores["sparse_rm"] = sparse_rm_scores(frozen, sae, session.run.seed, scores["sarm"])
    except UserError as error:
        say(f"evaluate: no SparseRM: {error}")
        return None
    return {"directions": len(model.latents), "C": model.C, "latents": model.latents.tolist()}


def without_near_duplicates(scores: Mapping[str, pa.Table], pairs: Path) -> dict[str, Any] | None:
    """How many held-out prompts and pairs are nearly a training prompt's, and every model's accuracy without them.

    None if the pairs do not say.
    """
    if not (pairs / NEAR_DUPLICATES).exists():
        return None
    duplicates = read_json(pairs / NEAR_DUPLICATES)
    near, prompts = pa.array(list(duplicates["prompts"]), pa.string()), scores["sarm"]["prompt_id"]
    is_near = pc.is_in(prompts, value_set=near)
    measured = {
        name: measures.measure_pairs(table.filter(pc.invert(pc.is_in(table["prompt_id"], value_set=near))))
        for name, table in scores.items()
    }
    kept = ("accuracy", "accuracy_ci95", "num_pairs", "num_prompts")
    return {
        "similarity": duplicates["similarity"],
        "prompts": pc.count_distinct(prompts.filter(is_near)).as_py(),
        "of_prompts": pc.count_distinct(prompts).as_py(),
        "pairs": pc.sum(is_near).as_py() or 0,
        "of_pairs": len(prompts),
        "without": {name: {key: getattr(accuracies, key) for key in kept} for name, accuracies in measured.items()},
    }


def score_heldout(session: Session, extraction: ExtractionSettings, name: str, folder: Path) -> pa.Table:
    """PAIR_SCORES of the held-out pairs by the reward model `name` of the session, kept in `folder`."""
    say(f"evaluate: scoring held-out pairs with {name}")
    reward_model = session.folders.out / name
    target = folder / f"{name}_scores"
    files = sorted(session.folders.pairs.glob("*.parquet"))
    work = Pass(
        name=f"score with {name}",
        blocks=plan_blocks(files, extraction.block_kilobytes, together="prompt_id"),
        columns=PAIR_COLUMNS,
        keep=functools.partial(of_split, split="heldout"),
        actor=PairScores,
        arguments={
            "reader": reader_of(reward_model, extraction),
        },
        outputs={"scores": Output(target, PAIR_SCORES_TABLE)},
        id_columns=("pair_id", "split"),
        output_id="pair_id",
    )
    session.run_pass(work)
    return read_parts(target)


def reader_of(folder: Path, extraction: ExtractionSettings) -> Reader:
    """The reader of a reward model's folder, as its manifest says that it was trained; one that was imported brings its own tokenizer.

    Raises UserError for a folder that is unfinished or of another kind.
    """
    config = read_manifest(folder, SARM_FOLDER).config
    if "name" not in config:
        return Reader(folder=folder, settings=sarm_settings(folder), batch_tokens=extraction.batch_tokens)
    fields = ("name", "revision", "gguf_file", "layer", "dtype", "max_length", "system_prompt", "chat_template")
    model = ModelSettings(**{key: config[key] for key in fields if key in config})
    return Reader(
        folder=folder,
        settings=model,
        dtype=model.dtype,
        batch_tokens=extraction.batch_tokens,
        tokenizer=Path(model_folder(model)),
    )


def _contents(scores: Path) -> dict[str, Any]:
    """What of the held-out pairs could not be encoded, by reason, and how many contents spell control tokens or turns."""
    counts = read_counts(scores)
    return {"rejected": counts["rejected"], **{name: counts.get(name, 0) for name in SPELLED_COUNTS}}
