"""Sources -> corpus/v1, pairs/v1 and responses/v1."""

from typing import Any

from sarm.data.sources.prepare import prepare_corpus, prepare_pairs
from sarm.data.sources.responses import prepare_responses
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.settings.data import DataSettings
from sarm.stages import plan

_SPELLED = "contents_with_control_tokens"


def prepare(session: Session, data: DataSettings) -> None:
    """Sources -> corpus/v1, pairs/v1 and responses/v1; without text sources there is no corpus, and no responses without theirs."""
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
            _told(prepare_pairs(data, pairs.folder)), "rows", "prompts", "near_duplicate_prompts", _SPELLED
        ),
    )
    if data.responses:
        responses = plan.responses(session.folders, data).open()
        session.stage(
            "prepare responses",
            responses,
            lambda _: plan.with_figures(
                prepare_responses(data, session.folders.pairs, responses.folder),
                "rows",
                "in_pairs",
                "heldout",
                _SPELLED,
            ),
        )


def _told(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts of pairs, after what a reader looks for first, and should know of them, was printed."""
    splits = counts["splits"]
    rejected = ", ".join(f"{number:,} {reason}" for reason, number in counts["rejected"].items())
    say(
        f"pairs: {counts['rows']:,} of {counts['prompts']:,} prompts, {splits['train']:,} to train on and {splits['heldout']:,} held out; rejected rows: {rejected or 'none'}"
    )
    for note in counts.pop("notes"):
        say(f"pairs: {note}")
    return counts
