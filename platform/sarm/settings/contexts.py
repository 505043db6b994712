"""Settings of what makes a trained reward model readable: contexts of its latents, and feature pages."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sarm.settings.checks import OPERATIONAL, UserError, check_tokens
from sarm.settings.checks import check_least as _check_least
from sarm.settings.results_root import READ, place_paths


@dataclass(frozen=True, kw_only=True)
class ContextsSettings:
    """Which texts are kept for each latent, from which data."""

    common: ClassVar[tuple[str, ...]] = ("split", "corpus")
    split: Literal["heldout", "train", "all", "none"] = "all"
    """Pairs to read: those whose prompts were held out, the training pairs, all, or none."""
    corpus: bool = False
    """Also read the sentence ends of the corpus."""
    max_texts: int | None = None
    """Read at most this many texts of the corpus, from its beginning."""
    top: int = 20
    """Strongest distinct texts kept of each latent and place."""
    per_decile: int = 2
    """Texts drawn by hash from each tenth of a latent's activations."""
    sampled: int = 128
    """Activations, drawn by hash of the text, from which a latent's quantiles and tenths are computed."""
    text_chars: int = 2000
    """Largest number of characters of a text; a longer text keeps its end."""
    span_contexts: int = 3
    """How many of a latent's strongest texts at the rewarded token get their driving sentence marked, by leaving out each sentence in turn; 0: none."""
    span_answers: int = 100
    """Largest number of answers whose driving sentence is looked for, those of the latents that add most to rewards; each part of an answer costs a forward pass."""
    span_pieces: int = 8
    """Largest number of parts of an answer that are left out in turn; further sentences are joined."""
    batch_tokens: int = field(default=0, metadata=OPERATIONAL)
    """Tokens of one forward pass, padding included; 0: as many as the device has memory for."""

    def __post_init__(self) -> None:
        if self.split == "none" and not self.corpus:
            raise UserError("there is nothing to read. Pass another --contexts.split, or --contexts.corpus.")
        _check_least(self, "contexts.", top=1, per_decile=0, sampled=10, text_chars=80, span_contexts=0, span_answers=0, span_pieces=2, max_texts=1)  # fmt: skip
        check_tokens(self, "contexts.batch_tokens")


@dataclass(frozen=True, kw_only=True)
class PagesSettings:
    """What the feature pages show."""

    common: ClassVar[tuple[str, ...]] = ("features", "explanations")
    features: int = 1000
    """Largest number of latents shown, those that add most to rewards, upwards or downwards."""
    per_page: int = 50
    """Latents of one page; the index is a page of its own."""
    contexts: int = 10
    """Texts shown of each latent and place."""
    pairs: int = 3
    """Pairs shown side by side for each latent."""
    in_pipeline: bool = field(default=True, metadata=OPERATIONAL)
    """Whether `jobs/pipeline.py` ends with contexts and pages."""
    explanations: str = field(default="", metadata=READ)
    """Folder of explanations/v1; empty: `explanations` beside the contexts if it is there, else extractive labels alone."""

    def __post_init__(self) -> None:
        place_paths(self)
        _check_least(self, "pages.", features=1, per_page=1, contexts=1, pairs=0)
