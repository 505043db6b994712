"""The stages that make a trained reward model readable: contexts of its latents, and feature pages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from sarm.contracts.folders import (
    EVALUATION_FOLDER,
    EXPLANATIONS_FOLDER,
    PAIRS_FOLDER,
    SARM_FOLDER,
)
from sarm.contracts.manifest import Manifest, read_manifest
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.interpret.context_store import load_contexts
from sarm.passes.models import hash_of_folder
from sarm.settings.checks import UserError
from sarm.settings.contexts import ContextsSettings, PagesSettings
from sarm.stages import plan


def collect(session: Session, contexts: ContextsSettings) -> Manifest:
    """SARM, pairs/v1 and corpus/v1 -> contexts/v1.

    Raises UserError for folders that are missing, unfinished or of another kind, before a cluster starts.
    """
    from sarm.passes.reader import sarm_reader
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
    reader = sarm_reader(folders.sarm, contexts.batch_tokens, dtype)

    def body(child: StageRun) -> Mapping[str, Any]:
        pairs, corpus = (sorted(path.glob("*.parquet")) for path in (folders.pairs, folders.corpus))
        counts = collect_contexts(contexts, reader, pairs, corpus, folder.folder, session.run_pass)
        child.log_text(json.dumps(counts["places"]), "places.json")
        return {**counts, "model": hash_of_folder(folders.sarm)}

    return session.stage("collect contexts", folder, body, resume=True)


def write_pages(session: Session, pages: PagesSettings) -> Manifest:
    """contexts/v1 and SARM (and, where they are, held-out scores and explanations) -> feature pages, logged to the run.

    Raises UserError for folders that are missing, unfinished, of another kind or of another model.
    """
    from sarm.interpret.feature_data import add_explanations, add_pairs, features
    from sarm.report.feature_pages import write_feature_pages
    from sarm.report.saedashboard import dashboard

    folders = session.folders
    planned = plan.pages(folders, pages)
    inputs, folder = planned.inputs, planned.open()
    store = load_contexts(folders.contexts, hash_of_folder(folders.sarm))

    def body(child: StageRun) -> Mapping[str, Any]:
        from sarm.data.formats.sarm_folder import read_tensors
        from sarm.report.figures import contribution_bars, save_figure

        config = json.loads((folders.sarm / "config.json").read_text())
        weight_S, W_dec_SD = (
            tensor.float().squeeze(0).numpy() for tensor in read_tensors(folders.sarm, "score.weight", "sae.W_dec")
        )
        shown = features(store, W_dec_SD, weight_S, pages)
        if EVALUATION_FOLDER in inputs:
            add_pairs(shown, _table(folders.evaluation / "sarm_scores"), _table(folders.pairs), weight_S, pages.pairs)
        if EXPLANATIONS_FOLDER in inputs:
            add_explanations(shown, inputs[EXPLANATIONS_FOLDER][0])
        fired = len(set(store.latents["latent"].to_pylist()))
        facts = {
            "model": config["provenance"].get("model", folders.sarm.name),
            "layer": config["layer"],
            "latents": len(weight_S),
            "that fire in these texts": fired,
            "shown": len(shown),
            "texts read": store.facts["rows"],
        }
        notes = (
            [] if EXPLANATIONS_FOLDER in inputs else ["There are no explanations yet: features carry extractive terms."]
        )
        files = write_feature_pages(shown, f"Features of {session.name}", facts, notes, folder.folder)
        raising = [one for one in shown if one["contribution"] > 0][:20]
        lowering = [one for one in shown if one["contribution"] < 0][:20]
        bars = contribution_bars(
            *(
                [{"latent": one["latent"], "mean_contribution": one["contribution"]} for one in side]
                for side in (raising, lowering)
            )
        )
        files.append(folder.folder / "contributions.png")
        save_figure(bars, files[-1])
        for path in files:
            session.tracker.parent.log_artifact(path, "features")
        # Not logged: MLflow's viewer chokes on JSON of some megabytes, and nobody reads it there.
        text = json.dumps(dashboard(shown, facts, store.facts), allow_nan=False, ensure_ascii=False)
        (folder.folder / "saedashboard.json").write_text(text, encoding="utf-8")
        counts = {"features": len(shown), "pages": sum(path.name.startswith("features-") for path in files)}
        return {**counts, "bytes": sum(path.stat().st_size for path in files), "figures": counts}

    return session.stage("feature pages", folder, body)


def _table(folder: Path) -> pa.Table:
    # Rejected rows have a file of their own beside the parts.
    paths = sorted(folder.glob("part-*.parquet"))
    if not paths:
        raise UserError(f"{folder} holds no Parquet files. Delete it and run its stage again.")
    return ds.dataset([str(path) for path in paths]).to_table().replace_schema_metadata(None)
