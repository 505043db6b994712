"""Sources of text and of preferences, and how they are cleaned and split."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from sarm.settings.checks import ABSENT_AT_DEFAULT, check, check_least
from sarm.settings.registered import listing
from sarm.settings.results_root import READ, place_paths


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Sources of text and of preferences, and how they are cleaned and split."""

    common: ClassVar[tuple[str, ...]] = ("texts", "pairs", "columns", "max_pairs")
    texts: Annotated[tuple[str, ...], listing("built-in texts")] = field(default=(), metadata=READ)
    """Text sources: files, patterns or folders (JSON, CSV, TSV, .txt, packed or in a .tar or .zip; Parquet, Arrow), `hf:NAME[@REVISION][:CONFIG][:SPLIT]`, or built-in ones."""
    pairs: Annotated[tuple[str, ...], listing("built-in pairs")] = field(default=(), metadata=READ)
    """Preference sources: as above, in any layout of docs/compatibility.md, or built-in ones."""
    columns: str = field(default="", metadata=ABSENT_AT_DEFAULT)
    """Columns of the preference sources under other names, e.g. `prompt=question,chosen=answer_a,rejected=answer_b`; `prompt=info.text` looks inside a column."""
    responses: Annotated[tuple[str, ...], listing("built-in responses")] = field(default=(), metadata=READ)
    """Further answers, in no pair, that the dictionary learns from by the recipe `turn_ends`: conversations (`messages`) in files or data sets as above, or built-in ones. Those of held-out prompts are left out."""
    text_field: str = "text"
    """Column that holds the text, or conversations as lists of messages."""
    max_texts: int | None = None
    """Keep at most this many texts of each source."""
    max_pairs: int | None = None
    """Keep at most this many pairs of each source."""
    max_pairs_per_prompt: int | None = 60
    """Keep at most this many pairs of one prompt (chosen by hash), so that no prompt outweighs the others."""
    heldout_share: float = 0.2
    """Share of prompts, by hash of the prompt, that are held out for evaluation."""

    def __post_init__(self) -> None:
        place_paths(self)
        check(self, "data.heldout_share", 0 < self.heldout_share < 1, "between 0 and 1")
        check_least(self, "data.", max_texts=1, max_pairs=1, max_pairs_per_prompt=1)
        parts = [part.partition("=") for part in self.columns.split(",") if self.columns]
        is_mapping = all(name.strip() and source.strip() for name, _, source in parts)
        is_mapping = is_mapping and len({name.strip() for name, *_ in parts}) == len(parts)
        check(self, "data.columns", is_mapping, "NAME=COLUMN pairs with commas between them, each name once")

    @property
    def column_names(self) -> dict[str, str]:
        """`columns` as a mapping: the name that a layout knows -> the column of the source."""
        parts = [part.partition("=") for part in self.columns.split(",") if self.columns]
        return {name.strip(): source.strip() for name, _, source in parts}
