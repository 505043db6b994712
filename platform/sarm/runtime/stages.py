"""The stages of the platform, each from finished folders to a finished folder. Jobs call these in order."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sarm import schema
from sarm.config import Data, Evaluation, Extraction, Model, Pipeline, Reward, Sae, UserError, identity
from sarm.data import pair_sources, text_sources
from sarm.data.activations import ACTIVATIONS, ActivationStore, statistics_of
from sarm.data.artifacts import SAE, SARM
from sarm.data.chat import ChatTokenizer
from sarm.data.models import check_model, model_folder
from sarm.data.prepare import prepare_corpus, prepare_pairs
from sarm.manifest import Manifest, StageFolder, read_manifest, refuse_other_config
from sarm.runtime.session import Folders, Session
from sarm.runtime.tracking import StageRun

CORPUS, PAIRS, EVALUATION = "corpus/v1", "pairs/v1", "evaluation/v1"
_OF_TEXTS = ("texts", "text_field", "max_texts")


def check_sources(data: Data) -> None:
    """Raise UserError unless every source can be opened."""
    for spec in data.texts:
        text_sources.check_source(spec, data.text_field)
    for spec in data.pairs:
        pair_sources.check_source(spec)
    if not data.pairs:
        raise UserError(
            "there are no preference pairs. Pass --data.pairs with files, hf:NAME, or a preset that names them."
        )


def refuse_other_run(config: Pipeline) -> None:
    """Raise UserError if any stage folder was made with other settings, before the first stage is paid for."""
    folders, data = Folders(config.run.out), identity(config.data)
    rewards = {**identity(config.model), **identity(config.reward, seed=config.run.seed)}
    plans = {
        folders.corpus: (CORPUS, {key: data[key] for key in _OF_TEXTS}),
        folders.pairs: (PAIRS, {key: value for key, value in data.items() if key not in _OF_TEXTS}),
        folders.sae: (SAE, identity(config.sae, seed=config.run.seed)),
        folders.sarm: (SARM, rewards),
        folders.scalar_head: (SARM, rewards),
        folders.evaluation: (EVALUATION, identity(config.evaluation, seed=config.run.seed)),
    }
    for folder, split in (
        (folders.text_activations, "all"),
        (folders.chat_activations, "train"),
        (folders.heldout_activations, "heldout"),
    ):
        plans[folder] = (ACTIVATIONS, {**identity(config.model), **identity(config.extraction), "split": split})
    for folder, (stage_schema, settings) in plans.items():
        refuse_other_config(folder, stage_schema, settings)


def prepare(session: Session, data: Data) -> None:
    """Sources -> corpus/v1 and pairs/v1; without text sources there is no corpus."""
    settings = identity(data)
    corpus = {key: settings[key] for key in _OF_TEXTS}
    pairs = {key: value for key, value in settings.items() if key not in _OF_TEXTS}
    if data.texts:
        folder = StageFolder(session.folders.corpus, CORPUS, corpus)
        session.stage(
            "prepare corpus", folder, lambda _: _with_figures(prepare_corpus(data, folder.folder), "rows", "duplicates")
        )
    folder_of_pairs = StageFolder(session.folders.pairs, PAIRS, pairs)
    session.stage(
        "prepare pairs",
        folder_of_pairs,
        lambda _: _with_figures(prepare_pairs(data, folder_of_pairs.folder), "rows", "prompts"),
    )


def extract(session: Session, model: Model, extraction: Extraction) -> None:
    """corpus/v1 and pairs/v1 -> activations/v1 at sentence ends, at the training responses' ends, and at the held-out ones'."""
    from sarm.runtime.actors import ChatActivations, TextActivations

    chat = check_model(model)
    folders = session.folders
    plans: list[tuple[str, Any, Any, str, Any, Any]] = [
        (
            "extract chat ends",
            folders.chat_activations,
            folders.pairs,
            PAIRS,
            ChatActivations,
            functools.partial(_of_split, split="train"),
        ),
        (
            "extract held-out chat ends",
            folders.heldout_activations,
            folders.pairs,
            PAIRS,
            ChatActivations,
            functools.partial(_of_split, split="heldout"),
        ),
    ]
    if folders.corpus.exists():
        plans.insert(
            0, ("extract sentence ends", folders.text_activations, folders.corpus, CORPUS, TextActivations, None)
        )
    for name, target, source, source_schema, actor, keep in plans:
        config = {**identity(model), **identity(extraction), "split": "all" if keep is None else keep.keywords["split"]}
        folder = StageFolder(target, ACTIVATIONS, config, {source_schema: (source, source_schema)})
        session.stage(
            name, folder, functools.partial(_extract, session, model, extraction, chat, actor, keep, source, target)
        )


def train_sae(session: Session, sae: Sae) -> None:
    """activations/v1 -> SAE."""
    from sarm.runtime import sae_training

    phases = {
        "text": (session.folders.text_activations, sae.text_epochs),
        "chat": (session.folders.chat_activations, sae.chat_epochs),
    }
    used = {name: path for name, (path, epochs) in phases.items() if epochs > 0}
    folder = StageFolder(
        session.folders.sae,
        SAE,
        identity(sae, seed=session.run.seed),
        {f"activations/{n}": (p, ACTIVATIONS) for n, p in used.items()},
    )

    def body(child: StageRun) -> Mapping[str, Any]:
        sae_training.check_activations(sae, {name: ActivationStore(path) for name, path in used.items()})
        task = sae_training.SaeTask(session.run, sae, used.get("text"), used.get("chat"), folder.folder, child)
        result = sae_training.train_on_cluster(task, session.cluster)
        _write_history(folder, result["history"])
        _log_curves(child, "sae", result["history"])
        child.log_artifact(folder.folder / "cfg.json")
        return {"figures": result["figures"]}

    session.stage("train SAE", folder, body)


def train_sarm(session: Session, model: Model, reward: Reward) -> None:
    """pairs/v1 and SAE -> SARM, and the scalar-head baseline beside it."""
    from sarm.runtime import reward_training

    check_model(model)
    folders = session.folders
    read_manifest(folders.sae, SAE)
    reward_training.check_sae(folders.sae, model)
    config = {**identity(model), **identity(reward, seed=session.run.seed)}
    inputs = {PAIRS: (folders.pairs, PAIRS)}
    plans = [("train SARM", folders.sarm, folders.sae, {**inputs, SAE: (folders.sae, SAE)})]
    if reward.scalar_baseline:
        plans.append(("train scalar head", folders.scalar_head, None, inputs))
    for name, target, sae_folder, needed in plans:
        folder = StageFolder(target, SARM, config, needed)

        def body(child: StageRun, sae_folder: Any = sae_folder, folder: StageFolder = folder) -> Mapping[str, Any]:
            task = reward_training.RewardTask(
                session.run, model, model_folder(model), reward, folders.pairs, sae_folder, folder.folder, child
            )
            result = reward_training.train_on_cluster(task, session.cluster)
            _write_history(folder, {folder.folder.name: result["history"]})
            _log_curves(child, "reward", {folder.folder.name: result["history"]})
            child.log_artifact(folder.folder / "config.json")
            return {"figures": result["figures"]}

        session.stage(name, folder, body)


def evaluate(session: Session, extraction: Extraction, evaluation: Evaluation) -> Manifest:
    """pairs/v1, activations and models -> held-out scores, baselines, attributions and contexts."""
    from sarm.runtime import evaluation as work

    folders = session.folders
    inputs = {SARM: (folders.sarm, SARM), PAIRS: (folders.pairs, PAIRS)}
    inputs |= {
        "activations/chat": (folders.chat_activations, ACTIVATIONS),
        "activations/heldout": (folders.heldout_activations, ACTIVATIONS),
    }
    if folders.scalar_head.exists():
        inputs["scalar_head"] = (folders.scalar_head, SARM)
    folder = StageFolder(folders.evaluation, EVALUATION, identity(evaluation, seed=session.run.seed), inputs)
    return session.stage(
        "evaluate", folder, functools.partial(work.evaluate, session, extraction, evaluation, folder.folder)
    )


def _extract(
    session: Session,
    model: Model,
    extraction: Extraction,
    chat: ChatTokenizer,
    name: str,
    actor: type,
    keep: Any,
    source: Any,
    target: Any,
    child: StageRun,
) -> Mapping[str, Any]:
    from sarm.nn.backbone import read_config
    from sarm.runtime.actors import Source
    from sarm.runtime.extraction import run_over

    folder = model_folder(model)
    d_in = read_config(folder, model.layer, revision=model.revision, gguf_file=model.gguf_file).hidden_size
    metadata = {
        "d_in": d_in,
        "dtype": extraction.dtype,
        "layer": model.layer,
        "model": model.name,
        "revision": model.revision,
        "tokenizer": chat.tokenizer_hash,
        "template": chat.template_hash,
    }
    table_schema = schema.activations(d_in, metadata)
    files = sorted(source.glob("*.parquet"))
    arguments = {"model": model, "folder": folder, "extraction": extraction, "table_schema": table_schema}
    read = read_manifest(source, PAIRS if keep else CORPUS).counts
    work = Source(name, read["splits"][keep.keywords["split"]] if keep else read["rows"])
    counts = run_over(
        work,
        files,
        keep,
        actor,
        arguments,
        table_schema,
        target,
        extraction.rows_per_file,
        session.run,
        session.cluster,
    )
    (target / "statistics.json").write_text(json.dumps(statistics_of(counts.pop("moments"))))
    child.log_table([{"reason": reason, "rows": rows} for reason, rows in counts["rejected"].items()], "rejected.json")
    return {**_with_figures(counts, "rows", "truncated"), "activations": metadata}


def _of_split(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pc.equal(table.column("split"), split))


def _with_figures(counts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    figures = {name: counts[name] for name in names if name in counts}
    return {**counts, "figures": {**figures, "rejected": sum(counts.get("rejected", {}).values())}}


def _write_history(folder: StageFolder, history: Mapping[str, Any]) -> None:
    (folder.folder / "history.json").write_text(json.dumps(history))


def _log_curves(child: StageRun, kind: str, histories: Mapping[str, Any]) -> None:
    from sarm.interpret import figures

    draw = figures.sae_curves if kind == "sae" else figures.reward_curves
    child.log_figure(draw(histories), f"{kind}_curves.png")
