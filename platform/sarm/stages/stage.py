"""The stages of the chain, each declared once: which folders it writes and from what, what lies there already, how it is run.

The pipeline, refusals, `--redo-from`, dry runs and the README's table go by this. What a stage's work needs is imported when it runs, so
that who is refused waits for nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarm.contracts.folders import (
    ACTIVATIONS_FOLDER,
    BASELINES,
    CONTEXTS_FOLDER,
    CORPUS_FOLDER,
    EVALUATION_FOLDER,
    EXPLANATIONS_FOLDER,
    PAGES_FOLDER,
    PAIRS_FOLDER,
    RESPONSES_FOLDER,
    SAE_FOLDER,
    SARM_FOLDER,
    Folders,
)
from sarm.contracts.manifest import CLAIM, MANIFEST
from sarm.settings.run import StageName
from sarm.settings.sae import AlsoSaes
from sarm.settings.started import called
from sarm.stages import plan
from sarm.stages.plan import UNPAIRED, FolderPlan
from sarm.stages.variants import variants

if TYPE_CHECKING:
    from sarm.engine.session import Session

# Path and the schema that it should have.
Place = tuple[Path, str]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the chain. `config` is that of a job that has the settings of this stage and of all before it."""

    reads: str
    """What it reads, for the README."""
    writes: str
    """What it writes, for the README."""
    folders: Callable[[Any, Folders], list[FolderPlan]]
    """(config, folders of the run) -> the folders that it writes."""
    there: Callable[[Folders], Iterable[Place]]
    """The folders that it may have written, under whatever settings."""
    run: Callable[["Session", Any], Any]
    """Do what is not done; returns what its job shows."""
    files: tuple[str, ...] = ()
    """What it writes beside its folders."""
    states: str = ""
    """Which training states go with its folders, besides those of the folders' names: a pattern."""


def _prepared(config: Any, folders: Folders) -> list[FolderPlan]:
    corpus = [plan.corpus(folders, config.data)] if config.data.texts else []
    responses = [plan.responses(folders, config.data)] if config.data.responses else []
    return [*corpus, plan.pairs(folders, config.data), *responses]


def _extracted(config: Any, folders: Folders) -> list[FolderPlan]:
    planned = plan.activations(folders, config.model, config.extraction)
    absent = {split for split, given in (("all", config.data.texts), (UNPAIRED, config.data.responses)) if not given}
    return [folder for (split, _, _), folder in planned.items() if split not in absent]


def _extractions(folders: Folders) -> Iterable[Place]:
    root = folders.out / "activations"
    for name in (MANIFEST, CLAIM):
        yield from ((path.parent, ACTIVATIONS_FOLDER) for path in sorted(root.rglob(name)))


def _saes(config: Any, folders: Folders) -> list[FolderPlan]:
    seed, activations = config.run.seed, _of_sae(config, folders)
    planned = plan.sae_folders(folders, config.sae, getattr(config, "also", AlsoSaes()), seed)
    return [
        plan.sae(folder=path, sae=sae, seed=seed, activations=activations, init_seed=init_seed)
        for _, path, sae, init_seed in planned
    ]


def _of_sae(config: Any, folders: Folders) -> dict[str, Path]:
    return plan.sae_activations(folders, config.data, config.sae, config.extraction.units)


def _reward_models(config: Any, folders: Folders) -> list[FolderPlan]:
    planned = []
    for variant in variants(config.model, config.reward, folders.sae, depth_of=lambda model: model.layer):
        folder = plan.reward_model(folders, variant, config.run.seed)
        planned.append(folder._replace(settings=None) if variant.folder == "scalar_head_full" else folder)
    return planned


def _evaluation(config: Any, folders: Folders) -> list[FolderPlan]:
    asked = {folder.folder.name for folder in _reward_models(config, folders)}
    there = {name for name in BASELINES if (folders.out / name).exists()}
    return [plan.evaluation(folders, config.evaluation, config.run.seed, asked | there)]


def _prepare(session: "Session", config: Any) -> None:
    from sarm.stages.prepare import prepare

    prepare(session, config.data)


def _extract(session: "Session", config: Any) -> None:
    from sarm.stages.extract import extract

    extract(session, config.model, config.extraction)


def _train_sae(session: "Session", config: Any) -> None:
    from sarm.stages.train_sae import train_sae

    train_sae(session, config.sae, _of_sae(config, session.folders), getattr(config, "also", AlsoSaes()))


def _train_sarm(session: "Session", config: Any) -> None:
    from sarm.stages.train_sarm import train_sarm

    train_sarm(session, config.model, config.reward)


def _evaluate(session: "Session", config: Any) -> Any:
    from sarm.data.formats.reward_classes import is_attached
    from sarm.stages.evaluate import evaluate

    if is_attached(session.folders.sarm):
        from sarm.engine.terminal import say

        say(
            f"evaluate: {session.folders.sarm} is a reward model of others: {called('evaluate')} --model scores it on benchmarks"
        )
        return None
    evaluate(session, config.extraction, config.evaluation)
    # Seconds of imports, that who is refused at the first stage need not wait for.
    from sarm.stages.report import report

    return report(session, config.run.out.name, config.evaluation)


def _collect(session: "Session", config: Any) -> Any:
    from sarm.stages.contexts import collect

    return collect(session, config.contexts)


def _write_pages(session: "Session", config: Any) -> Any:
    from sarm.stages.contexts import write_pages

    return write_pages(session, config.pages)


STAGES: dict[StageName, Stage] = {
    "prepare_data": Stage(
        reads="sources",
        writes="`corpus`, `pairs`; with `--data.responses` also `responses`",
        folders=_prepared,
        there=lambda folders: [(folders.corpus, CORPUS_FOLDER), (folders.pairs, PAIRS_FOLDER), (folders.responses, RESPONSES_FOLDER)],
        run=_prepare,
    ),
    "extract_activations": Stage(
        reads="`corpus`, `pairs`",
        writes="`activations/text`, `activations/chat`, `activations/heldout`; with `--layers`, `--units` more of these ([extraction](docs/extraction.md))",
        folders=_extracted,
        there=_extractions,
        run=_extract,
    ),
    "train_sae": Stage(
        reads="`activations`",
        writes="`sae` (SAELens layout)",
        folders=_saes,
        there=lambda folders: [(path, SAE_FOLDER) for path in (folders.sae, *sorted((folders.out / "saes").glob("*")))],
        run=_train_sae,
        states="*",
    ),
    "train_sarm": Stage(
        reads="`pairs`, `sae`",
        writes="`sarm`, `scalar_head` (the baseline; more with `--reward.baselines`)",
        folders=_reward_models,
        there=lambda folders: [(path, SARM_FOLDER) for path in (folders.sarm, *(folders.out / name for name in BASELINES))],
        run=_train_sarm,
    ),
    "evaluate": Stage(
        reads="all of these",
        writes="`evaluation`, `report.html`, `report.md`, `report.json`",
        folders=_evaluation,
        there=lambda folders: [(folders.evaluation, EVALUATION_FOLDER)],
        run=_evaluate,
        files=("report.html", "report.md", "report.json"),
    ),
    "collect_contexts": Stage(
        reads="`sarm`, `pairs`, `corpus`",
        writes="`contexts`: the texts that make each latent fire ([reading a reward model](docs/interpretation.md))",
        folders=lambda config, folders: [plan.contexts(folders, config.contexts)],
        there=lambda folders: [(folders.contexts, CONTEXTS_FOLDER), (folders.explanations, EXPLANATIONS_FOLDER)],
        run=_collect,
    ),
    "feature_pages": Stage(
        reads="`contexts`, `sarm`, `explanations`",
        writes="`features/features.html`: an index and pages of features",
        folders=lambda config, folders: [plan.pages(folders, config.pages)],
        there=lambda folders: [(folders.pages, PAGES_FOLDER)],
        run=_write_pages,
    ),
}  # fmt: skip
"""In the order in which they read each other."""


def existing(stage: StageName, folders: Folders) -> list[Place]:
    """The folders of a stage that are there, whatever their settings, with the schema that they should have."""
    return [place for place in dict.fromkeys(STAGES[stage].there(folders)) if place[0].exists()]
