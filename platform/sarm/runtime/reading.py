"""The stages that make a trained reward model readable: contexts of its latents, and feature pages."""

import json
from collections.abc import Mapping
from typing import Any

from sarm.config import Contexts
from sarm.data.artifacts import SARM
from sarm.interpret.context_store import CONTEXTS
from sarm.manifest import Manifest, StageFolder, read_manifest
from sarm.runtime import plan
from sarm.runtime.models import hash_of_folder
from sarm.runtime.plan import CORPUS, PAIRS
from sarm.runtime.session import Session
from sarm.runtime.tracking import StageRun


def collect(session: Session, contexts: Contexts) -> Manifest:
    """SARM, pairs/v1 and corpus/v1 -> contexts/v1.

    Raises UserError for folders that are missing, unfinished or of another kind, before a cluster starts.
    """
    from sarm.runtime.context_collection import collect_contexts, on_cluster, reader_of

    folders = session.folders
    inputs = {SARM: (folders.sarm, SARM)}
    if contexts.split != "none":
        inputs[PAIRS] = (folders.pairs, PAIRS)
    if contexts.corpus:
        inputs[CORPUS] = (folders.corpus, CORPUS)
    folder = StageFolder(folders.contexts, CONTEXTS, plan.contexts_settings(contexts), inputs)
    # What training kept of the model's settings; a SARM from elsewhere is read in float32.
    dtype = read_manifest(folders.sarm, SARM).config.get("dtype", "float32")
    reader = reader_of(folders.sarm, contexts, dtype)

    def body(child: StageRun) -> Mapping[str, Any]:
        pairs, corpus = (sorted(path.glob("*.parquet")) for path in (folders.pairs, folders.corpus))
        stream = on_cluster(session.run, session.cluster)
        counts = collect_contexts(contexts, reader, pairs, corpus, folder.folder, stream)
        child.log_text(json.dumps(counts["places"]), "places.json")
        return {**counts, "model": hash_of_folder(folders.sarm)}

    return session.stage("collect contexts", folder, body)
