"""Settings of extraction."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from sarm.settings.checks import ABSENT_AT_DEFAULT, OPERATIONAL, check_tokens
from sarm.settings.checks import check as _check
from sarm.settings.checks import check_least as _check_least

Unit = Literal["document", "sentence", "token", "chat", "turn_end"]
TURN_END: Unit = "turn_end"


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How activations are computed and stored."""

    common: ClassVar[tuple[str, ...]] = ("units", "layers")
    batch_tokens: int = field(default=2048, metadata=OPERATIONAL)
    """Tokens of one forward pass, padding included; a batch that does not fit the memory is split. 0: as many as the device has memory for."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """16-bit format of stored activations; float16 is finer, bfloat16 never overflows."""
    units: Annotated[tuple[Unit, ...], tyro.conf.arg(aliases=["--units"])] = ("document",)
    """Which tokens of a text are taken: the last of each sentence with its left context (`document`), the last of each sentence run alone (`sentence`, SARM section 4.1), all (`token`, for the papers' token-level SAE), the final token of a rendered conversation (`chat`, for a corpus of conversations), or the rewarded token behind every sentence (`turn_end`): each text is rendered as an answer, and the end-of-turn token is put behind its sentences as well as behind its end, so that an SAE learns where rewards are read; the training responses of the preference pairs give the same, each once, in `activations/chat-turn_end`. The first goes to `activations/text`."""
    layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--layers"])] = field(default=(), metadata=OPERATIONAL)
    """Further layers from the same forward pass, a folder each (`activations/layer21/text`); `model.layer` is always there."""
    sentence_ends: Literal["rules", "punctuation"] = "rules"
    """How sentences are found: by our rules, or behind every run of `. , ? ! ;` and newline, as in SAFER's code."""
    word_share: Annotated[float | None, tyro.conf.arg(aliases=["--word-share"])] = None
    """With the unit `turn_end`: put the end-of-turn token behind this share of the words too, drawn by the text's id. More rows from few answers (0.125 costs a tenth more tokens); unset for sentences alone."""
    limit_rows: Annotated[int | None, tyro.conf.arg(aliases=["--limit-rows"])] = None
    """Read only this many texts, from the beginning of the corpus."""
    limit_tokens: Annotated[int | None, tyro.conf.arg(aliases=["--limit-tokens"])] = None
    """Read only the first texts of the corpus that have at most this many tokens together."""
    limit_sentences: Annotated[int | None, tyro.conf.arg(aliases=["--limit-sentences"])] = field(
        default=None, metadata=ABSENT_AT_DEFAULT
    )
    """Read only the first texts of the corpus that have at most this many sentences together: rows, where the unit is the end of a sentence."""
    block_kilobytes: int = 1024
    """Size of a block, which is written whole or not at all; a small corpus has smaller blocks."""

    calibrate: Annotated[bool, tyro.conf.arg(aliases=["--calibrate"])] = field(default=False, metadata=OPERATIONAL)
    """With `--dry-run`: run the model for some seconds on this machine, and plan with the measured rate instead of an assumed one."""

    def __post_init__(self) -> None:
        check_tokens(self, "extraction.batch_tokens")
        _check_least(self, "extraction.", limit_rows=1, limit_tokens=1, limit_sentences=1, block_kilobytes=1)
        _check(self, "extraction.units", 0 < len(self.units) == len(set(self.units)), "one or more different units")
        share, has_ends = self.word_share, TURN_END in self.units
        is_share = share is None or (has_ends and 0 < share <= 1)
        _check(self, "extraction.word_share", is_share, "above 0 and at most 1, with turn_end among the units")
        _check(self, "extraction.layers", all(layer >= 1 for layer in self.layers), "numbers of blocks, 1 or more")
