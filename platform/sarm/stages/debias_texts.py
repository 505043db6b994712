"""The texts of `jobs/debias.py`: of every pair the chosen and the rejected answer without and with a property, and the rows of benchmarks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sarm.audit.pairs import chooses, listed_pairs
from sarm.audit.style_pairs import BY_RULE, Property, property_named
from sarm.contracts.ids import prompt_key_of, stable_id
from sarm.evaluate.benchmarks.benchmark import BenchmarkRow
from sarm.evaluate.benchmarks.sources import Loaded, load_benchmark, parse_source
from sarm.settings.checks import UserError
from sarm.settings.debias import Debias

# Of RM-Bench's three styles those that differ in their marks, not in what they say.
_DETAILED, _MARKDOWN, _STYLES = 1, 2, 3
# Fewer prompts on a half say nothing of the others.
_FEWEST_PROMPTS = 4


class Quad(NamedTuple):
    """One pair: ids of the chosen answer without and with the property, and of the rejected one."""

    prompt_id: str
    ids: tuple[str, str, str, str]


@dataclass
class Contrast:
    """A property and the pairs whose answers have it and have it not; `left_out` are those on which its rule fails, or that differ in more."""

    own: Property
    quads: list[Quad] = field(default_factory=list)
    left_out: int = 0

    def half(self, *, chooses_half: bool) -> list[Quad]:
        """The pairs of the prompts that features and doses are chosen on, or of the others, which nothing is chosen on."""
        return [quad for quad in self.quads if chooses(quad.prompt_id) == chooses_half]


class Texts(NamedTuple):
    """The contrasts by property, the benchmarks (rows of the reporting half alone), and the prompt (as JSON) and text of every completion id."""

    contrasts: dict[str, Contrast]
    benchmarks: list[Loaded]
    by_id: dict[str, tuple[str, str]]


def texts_of(settings: Debias) -> Texts:
    """What is to be read and scored.

    Raises UserError for sources that cannot be read, and for a property with too few prompts on either half.
    """
    loaded = [load_benchmark(parse_source(text), settings.limit, allow_partial=False) for text in settings.benchmarks]
    pairs = listed_pairs(settings.pairs, settings.debias.prompts)
    by_id: dict[str, tuple[str, str]] = {}
    contrasts = {}
    for name in settings.debias.properties:
        if name == "rm_bench":
            contrast = _of_rm_bench(loaded, by_id)
        else:
            contrast = _by_rule(property_named(name, settings.debias.trigger), pairs, by_id)
        _check_halves(contrast)
        contrasts[name] = contrast
    return Texts(contrasts, [_reporting_half(one) for one in loaded], by_id)


def _by_rule(own: Property, pairs: Sequence[dict[str, Any]], by_id: dict[str, tuple[str, str]]) -> Contrast:
    contrast = Contrast(own)
    for pair in pairs:
        versions = [own.versions(pair[side]) for side in ("chosen", "rejected")]
        if None in versions or versions[0] == versions[1]:
            contrast.left_out += 1
            continue
        texts = [text for both in versions if both is not None for text in both]
        contrast.quads.append(_quad(pair["prompt"], pair["prompt_id"], texts, by_id))
    return contrast


def _of_rm_bench(loaded: Sequence[Loaded], by_id: dict[str, tuple[str, str]]) -> Contrast:
    own = Property(
        name="rm_bench",
        title="RM-Bench's markdown, against its detailed answers",
        base=BY_RULE["markdown"].base,
        style=lambda text: None,
        canonical=_letters,
    )
    contrast = Contrast(own)
    for one in loaded:
        for row in one.rows if one.source.name == "rm_bench" else ():
            texts = [row.completions[side + style] for side in (0, _STYLES) for style in (_DETAILED, _MARKDOWN)]
            if not own.differs_alone(*texts[:2]) or not own.differs_alone(*texts[2:]):
                contrast.left_out += 1
                continue
            contrast.quads.append(_quad(row.prompt, _half_key(row), texts, by_id))
    return contrast


def _letters(text: str) -> str:
    """A text's letters and digits: its own authors wrote the two styles, and moved commas with the marks."""
    return " ".join(re.findall(r"\w+", BY_RULE["markdown"].canonical(text).lower()))


def _quad(prompt: Sequence[Any], prompt_id: str, texts: Sequence[str], by_id: dict[str, tuple[str, str]]) -> Quad:
    packed = prompt_key_of(prompt)
    ids = [stable_id(packed, text) for text in texts]
    by_id |= {one: (packed, text) for one, text in zip(ids, texts, strict=True)}
    c0, c1, r0, r1 = ids
    return Quad(prompt_id, (c0, c1, r0, r1))


def _check_halves(contrast: Contrast) -> None:
    for chooses_half in (True, False):
        prompts = {quad.prompt_id for quad in contrast.half(chooses_half=chooses_half)}
        if len(prompts) < _FEWEST_PROMPTS:
            half = "choosing" if chooses_half else "reporting"
            raise UserError(
                f"{contrast.own.name}: the {half} half has {len(prompts)} prompts whose answers differ in this property alone ({contrast.left_out} pairs are left out), at least {_FEWEST_PROMPTS} are needed. Pass more --pairs, or leave the property out of --debias.properties."
            )


def _half_key(row: BenchmarkRow) -> str:
    """What decides the half: the prompt, or what keeps partners of a benchmark together."""
    return row.cluster


def _reporting_half(loaded: Loaded) -> Loaded:
    rows = [row for row in loaded.rows if not chooses(_half_key(row))]
    if not rows:
        raise UserError(f"{loaded.source.name}: no row of {loaded.source.place} is on the half that is reported. Pass a larger --limit.")  # fmt: skip
    return loaded._replace(rows=rows)
