"""The stages that make a trained reward model readable: contexts of its latents, and feature pages."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sarm.contracts.folders import (
    EVALUATION_FOLDER,
    EXPLANATIONS_FOLDER,
    PAIRS_FOLDER,
    SARM_FOLDER,
    Folders,
)
from sarm.contracts.manifest import Manifest, read_manifest
from sarm.data.store.parts import read_parts
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.interpret.context_store import ContextStore, load_contexts
from sarm.passes.models import hash_of_folder
from sarm.settings.checks import UserError
from sarm.settings.contexts import ContextsSettings, PagesSettings
from sarm.stages import plan

_BARS = 20


def collect(session: Session, contexts: ContextsSettings) -> Manifest:
    """SARM, pairs/v1 and corpus/v1 -> contexts/v1.

    Raises UserError for folders that are missing, unfinished or of another kind, before a cluster starts.
    """
    from sarm.passes.attached_model import model_reader
    from sarm.stages.context_collection import collect_contexts

    folders = session.folders
    if contexts.split != "none":
        splits = read_manifest(folders.pairs, PAIRS_FOLDER).counts["splits"]
        if not contexts.corpus and not (
            sum(splits.values()) if contexts.split == "all" else splits.get(contexts.split)
        ):
            raise UserError(f"{folders.pairs} has no {contexts.split} pairs. Pass another --contexts.split, or --contexts.corpus.")  # fmt: skip
    folder = plan.contexts(folders, contexts).open()
    # What training kept of the model's settings; a SARM from elsewhere is read in float32.
    dtype = read_manifest(folders.sarm, SARM_FOLDER).config.get("dtype", "float32")
    reader = model_reader(folders.sarm, contexts.batch_tokens, dtype)

    def body(child: StageRun) -> Mapping[str, Any]:
        pairs, corpus = (sorted(path.glob("*.parquet")) for path in (folders.pairs, folders.corpus))
        counts = collect_contexts(
            settings=contexts,
            reader=reader,
            pairs=pairs,
            corpus=corpus,
            folder=folder.folder,
            run_pass=session.run_pass,
        )
        child.log_text(json.dumps(counts["places"]), "places.json")
        return {**counts, "model": hash_of_folder(folders.sarm)}

    return session.stage("collect contexts", folder, body, resume=True)


def write_pages(session: Session, pages: PagesSettings) -> Manifest:
    """contexts/v1 and SARM (and, where they are, held-out scores and explanations) -> feature pages, logged to the run.

    Raises UserError for folders that are missing, unfinished, of another kind or of another model.
    """
    folders = session.folders
    planned = plan.pages(folders, pages)
    folder = planned.open()
    store = load_contexts(folders.contexts, hash_of_folder(folders.sarm))

    def body(child: StageRun) -> Mapping[str, Any]:
        from sarm.report.dictionary_note import dictionary_note_of
        from sarm.report.feature_pages import write_feature_pages
        from sarm.report.saedashboard import dashboard

        shown = _features(store, folders, pages, planned.inputs)
        facts = _facts(store, folders.sarm, len(shown))
        notes = (
            []
            if EXPLANATIONS_FOLDER in planned.inputs
            else ["There are no explanations yet: features carry extractive terms."]
        )
        notes += dictionary_note_of(folders.sarm)
        files = write_feature_pages(
            features=shown, title=f"Features of {session.name}", facts=facts, notes=notes, folder=folder.folder
        )
        files.append(_picture(shown, folder.folder))
        for path in files:
            session.tracker.parent.log_artifact(path, "features")
        # Not logged: MLflow's viewer chokes on JSON of some megabytes, and nobody reads it there.
        text = json.dumps(dashboard(shown, facts, store.facts), allow_nan=False, ensure_ascii=False)
        (folder.folder / "saedashboard.json").write_text(text, encoding="utf-8")
        counts = {"features": len(shown), "pages": sum(path.name.startswith("features-") for path in files)}
        return {**counts, "bytes": sum(path.stat().st_size for path in files), "figures": counts}

    return session.stage("feature pages", folder, body)


def _features(
    store: ContextStore, folders: Folders, pages: PagesSettings, inputs: Mapping[str, tuple[Path, str]]
) -> list[dict[str, Any]]:
    """What pages say of each feature; with pairs and explanations where the inputs have them."""
    from sarm.data.formats.sarm_folder import read_latents
    from sarm.interpret.feature_data import add_explanations, add_pairs, features

    weight_S, W_dec_SD = read_latents(folders.sarm, "score.weight", "sae.W_dec")
    shown = features(store, W_dec_SD, weight_S, pages)
    if EVALUATION_FOLDER in inputs:
        scores, pairs = read_parts(folders.evaluation / "sarm_scores"), read_parts(folders.pairs)
        add_pairs(shown=shown, scores=scores, pairs=pairs, weight_S=weight_S, num=pages.pairs)
    if EXPLANATIONS_FOLDER in inputs:
        add_explanations(shown, inputs[EXPLANATIONS_FOLDER][0])
    return shown


def _facts(store: ContextStore, sarm: Path, num_shown: int) -> dict[str, Any]:
    config = json.loads((sarm / "config.json").read_text())
    return {
        "model": config["provenance"].get("model", sarm.name),
        "layer": config["layer"],
        "latents": store.facts["d_sae"],
        "that fire in these texts": len(set(store.latents["latent"].to_pylist())),
        "shown": num_shown,
        "texts read": store.facts["rows"],
    }


def _picture(shown: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write the features that raise and lower the reward most as bars."""
    from sarm.report.figures import contribution_bars, save_figure

    bars = [{"latent": feature["latent"], "mean_contribution": feature["contribution"]} for feature in shown]
    raising = [bar for bar in bars if bar["mean_contribution"] > 0][:_BARS]
    lowering = [bar for bar in bars if bar["mean_contribution"] < 0][:_BARS]
    path = folder / "contributions.png"
    save_figure(contribution_bars(raising, lowering), path)
    return path
