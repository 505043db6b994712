"""Sources -> corpus/v1 and pairs/v1."""

from sarm.data.sources import pairs as pair_sources
from sarm.data.sources import texts as text_sources
from sarm.data.sources.prepare import prepare_corpus, prepare_pairs
from sarm.engine.session import Session
from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings
from sarm.stages import plan

_SPELLED = "contents_with_control_tokens"


def check_sources(data: DataSettings) -> None:
    """Raise UserError unless every source can be opened."""
    for spec in data.texts:
        text_sources.check_source(spec, data.text_field)
    for spec in data.pairs:
        pair_sources.check_source(spec)
    if not data.pairs:
        raise UserError(
            "there are no preference pairs. Pass --data.pairs with files, hf:NAME, or a preset that names them."
        )


def prepare(session: Session, data: DataSettings) -> None:
    """Sources -> corpus/v1 and pairs/v1; without text sources there is no corpus."""
    pairs = plan.pairs(session.folders, data).open()
    # Before the texts are paid for.
    pairs.finished()
    if data.texts:
        corpus = plan.corpus(session.folders, data).open()
        session.stage(
            "prepare corpus",
            corpus,
            lambda _: plan.with_figures(prepare_corpus(data, corpus.folder), "rows", "duplicates", _SPELLED),
        )
    session.stage(
        "prepare pairs",
        pairs,
        lambda _: plan.with_figures(
            prepare_pairs(data, pairs.folder), "rows", "prompts", "near_duplicate_prompts", _SPELLED
        ),
    )
