"""The texts of `jobs/debias.py`: of every pair the chosen and the rejected answer without and with a property, and the rows of benchmarks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sarm.audit.given_contrasts import given_contrasts
from sarm.audit.pairs import chooses, listed_pairs
from sarm.audit.style_pairs import BY_RULE, Property, by_table, property_named, refuse_others
from sarm.contracts.ids import prompt_id_of, prompt_key_of, stable_id
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
    differ_in_more: int = 0
    """Pairs that are taken as given although their versions differ in more than the property."""

    def half(self, *, chooses_half: bool) -> list[Quad]:
        """The pairs of the prompts that features and doses are chosen on, or of the others, which nothing is chosen on."""
        return [quad for quad in self.quads if chooses(quad.prompt_id) == chooses_half]


class Texts(NamedTuple):
    """The contrasts by property, the benchmarks (rows of the reporting half alone), and the prompt (as JSON) and text of every completion id."""

    contrasts: dict[str, Contrast]
    benchmarks: list[Loaded]
    by_id: dict[str, tuple[str, str]]


def texts_of(settings: Debias, written: Mapping[str, str] | None = None) -> Texts:
    """What is to be read and scored; `written` are paraphrases by text, None: they are made by rule.

    Raises UserError for sources that cannot be read, and for a property with too few prompts on either half.
    """
    loaded = [load_benchmark(parse_source(text), settings.limit, allow_partial=False) for text in settings.benchmarks]
    pairs = listed_pairs(settings.pairs, settings.debias.prompts)
    by_id: dict[str, tuple[str, str]] = {}
    contrasts = {}
    given = {name: Path(path).expanduser() for name, _, path in (text.partition("=") for text in settings.contrasts)}
    for name in dict.fromkeys((*settings.debias.properties, *given)):
        if name in given:
            contrast = contrast_of_file(given[name], _given(name, settings.debias.trigger), by_id, as_given=settings.debias.as_given)  # fmt: skip
        elif name == "rm_bench":
            contrast = _of_rm_bench(loaded, by_id, as_given=settings.debias.as_given)
        elif name == "paraphrase" and written is not None:
            contrast = _by_rule(by_table(written), pairs, by_id)
        else:
            contrast = _by_rule(property_named(name, settings.debias.trigger), pairs, by_id)
        _check_halves(contrast)
        contrasts[name] = contrast
    return Texts(contrasts, [_reporting_half(one) for one in loaded], by_id)


def _given(name: str, trigger: str) -> Property:
    """A property of --contrasts; of one without a rule nothing is left out."""
    if name in BY_RULE or name == "trigger":
        return property_named(name, trigger)
    return Property(name, f"{name}, as given", base=lambda text: text, style=lambda text: None, canonical=lambda text: text)  # fmt: skip


def contrast_of_file(path: Path, own: Property, by_id: dict[str, tuple[str, str]], *, as_given: bool) -> Contrast:
    """The pairs of a file of contrasts, but for those that differ in more than the property.

    Raises UserError for a file that cannot be read or has a line of another form, and if no pair differs in the property alone.
    """
    contrast, wrong = Contrast(own), dict[str, tuple[str, str]]()
    for number, line in given_contrasts(path):
        sides = {f"{path}, line {number}, {side}": (plain, styled) for side, (plain, styled) in line.sides.items()}
        unlike = {where: both for where, both in sides.items() if not own.differs_alone(*both)}
        if unlike and (not as_given or any(plain == styled for plain, styled in unlike.values())):
            contrast.left_out += 1
            wrong |= unlike
            continue
        contrast.differ_in_more += bool(unlike)
        texts = [text for both in sides.values() for text in both]
        contrast.quads.append(_quad(line.prompt, prompt_id_of(line.prompt), texts, by_id))
    if not contrast.quads:
        refuse_others(own, wrong)
        raise UserError(f"{path} holds no pair. Pass --contrasts with another file.")
    return contrast


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


def _of_rm_bench(loaded: Sequence[Loaded], by_id: dict[str, tuple[str, str]], *, as_given: bool) -> Contrast:
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
            is_alone = own.differs_alone(*texts[:2]) and own.differs_alone(*texts[2:])
            if not is_alone and (not as_given or texts[0] == texts[1] or texts[2] == texts[3]):
                contrast.left_out += 1
                continue
            contrast.differ_in_more += not is_alone
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
                f"{contrast.own.name}: the {half} half has {len(prompts)} prompts whose answers differ in this property alone ({contrast.left_out} pairs are left out), at least {_FEWEST_PROMPTS} are needed. {_advice(contrast)}"
            )


def _advice(contrast: Contrast) -> str:
    if contrast.own.name == "rm_bench":
        return "Pass --debias.as-given to take its styles as they are, or leave it out of --debias.properties."
    return "Pass more --pairs, or leave the property out of --debias.properties."


def _half_key(row: BenchmarkRow) -> str:
    """What decides the half: the prompt, or what keeps partners of a benchmark together."""
    return row.cluster


def _reporting_half(loaded: Loaded) -> Loaded:
    rows = [row for row in loaded.rows if not chooses(_half_key(row))]
    if not rows:
        raise UserError(f"{loaded.source.name}: no row of {loaded.source.place} is on the half that is reported. Pass a larger --limit.")  # fmt: skip
    return loaded._replace(rows=rows)
