"""Preference benchmarks in their official fields, as rows of one prompt with its correct and wrong completions.

    reward_bench_2   id, prompt, chosen [..], rejected [..], subset; Ties rows have ids ref:n and tied:n
    rm_bench         id, prompt, chosen [3], rejected [3], domain (or subset); order: concise, detailed, markdown
    reward_bench     id, prompt, chosen, rejected, subset
    pairs            chosen, rejected (texts with a prompt, or conversations that share one), subset
    best_of_n        prompt, chosen [..], rejected [..], subset

A row that cannot be scored is a `BadRow` with its place and reason, never a silent gap.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sarm.contracts.ids import prompt_id_of
from sarm.data.sources.conversations import fault_of_content
from sarm.data.sources.pairs import parse_pair
from sarm.data.sources.rows import Reject, Row
from sarm.settings.checks import UserError

Message = dict[str, str]

TIES = "Ties"
_V1_CODE = tuple(f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust"))


class BadRow(NamedTuple):
    """A row that is left out: where it is, and why."""

    benchmark: str
    where: str
    reason: str


@dataclass(frozen=True)
class BenchmarkRow:
    """One prompt with its completions, the first `num_correct` of which are correct; `row_id` is unique in its subset."""

    benchmark: str
    subset: str
    row_id: str
    prompt: tuple[Message, ...]
    completions: tuple[str, ...]
    num_correct: int
    where: str

    @property
    def prompt_id(self) -> str:
        return prompt_id_of(self.prompt)


class Parsed(NamedTuple):
    """What one row says."""

    prompt: list[Message]
    chosen: list[str]
    rejected: list[str]
    subset: str


class Format(NamedTuple):
    """How a benchmark is read: its public data set, and its subsets with their published number of rows (None: any)."""

    data_set: str
    subsets: dict[str, int] | None
    parse: Callable[[dict[str, Any]], Parsed]


class _Fault(Exception):  # noqa: N818 - a row's reason on its way to a BadRow
    """Why a row cannot be used; never leaves this module."""


def read_benchmark(name: str, rows: Iterable[Row | Reject]) -> tuple[list[BenchmarkRow], list[BadRow]]:
    """The usable rows of a benchmark in file order, and the others with their reasons.

    Raises UserError for an unknown benchmark.
    """
    form = FORMATS.get(name)
    if form is None:
        raise UserError(f"unknown benchmark {name}. Known are {', '.join(FORMATS)}. Pass --benchmarks NAME=SOURCE.")
    good: list[BenchmarkRow] = []
    bad: list[BadRow] = []
    for number, row in enumerate(rows):
        if isinstance(row, Reject):
            bad.append(BadRow(name, row.where, row.reason))
            continue
        try:
            good.append(_row(name, form, row, number))
        except _Fault as fault:
            bad.append(BadRow(name, row.where, str(fault)))
    for check in (_repeated, _one_sided):
        faulty = dict(check(good))
        bad += [BadRow(name, row.where, faulty[id(row)]) for row in good if id(row) in faulty]
        good = [row for row in good if id(row) not in faulty]
    return good, bad


def _row(name: str, form: Format, row: Row, number: int) -> BenchmarkRow:
    prompt, chosen, rejected, subset = form.parse(row.fields)
    if form.subsets is not None and subset not in form.subsets:
        raise _Fault(f"unknown subset {subset[:40]!r}")
    for text in (*(message["content"] for message in prompt), *chosen, *rejected):
        if fault := fault_of_content(text):
            raise _Fault(f"{fault} text")
    identifier = row.fields.get("id")
    if identifier is None and form.subsets is not None:
        raise _Fault("missing id")
    if subset == TIES and name == "reward_bench_2":
        kind, _, place = str(identifier).partition(":")
        if kind not in ("ref", "tied") or not place.isdecimal():
            raise _Fault("a Ties id is ref:NUMBER or tied:NUMBER")
        if kind == "tied" and len(chosen) < 2:
            raise _Fault("a tied row has several correct completions")
    return BenchmarkRow(
        name,
        subset,
        str(identifier if identifier is not None else number),
        tuple(prompt),
        (*chosen, *rejected),
        len(chosen),
        row.where,
    )


def _repeated(rows: list[BenchmarkRow]) -> Iterator[tuple[int, str]]:
    """The second and later rows of one id in one subset (ids repeat across subsets)."""
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        seen[row.subset, row.row_id] += 1
        if seen[row.subset, row.row_id] > 1:
            yield id(row), f"repeated id {row.row_id[:40]}"


def _one_sided(rows: list[BenchmarkRow]) -> Iterator[tuple[int, str]]:
    """Ties rows without their partner."""
    ties = [row for row in rows if row.benchmark == "reward_bench_2" and row.subset == TIES]
    kinds = {tuple(row.row_id.split(":")) for row in ties}
    for row in ties:
        kind, number = row.row_id.split(":")
        other = "tied" if kind == "ref" else "ref"
        if (other, number) not in kinds:
            yield id(row), f"no partner {other}:{number}"


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise _Fault(f"missing {name}" if value is None else f"{name} is not a text")
    return value


def _texts(fields: dict[str, Any], name: str, count: int | None = None) -> list[str]:
    value = fields.get(name)
    if value is None:
        raise _Fault(f"missing {name}")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value):
        raise _Fault(f"{name} is not a list of texts")
    if count is not None and len(value) != count:
        raise _Fault(f"{name} has {len(value)} completions, expected {count}")
    return list(value)


def _user(fields: dict[str, Any]) -> list[Message]:
    return [{"role": "user", "content": _text(fields, "prompt")}]


def _subset(fields: dict[str, Any], *names: str) -> str:
    for name in names:
        if isinstance(fields.get(name), str):
            return fields[name]
    raise _Fault(f"missing {names[0]}")


def _reward_bench_2(fields: dict[str, Any]) -> Parsed:
    subset = _subset(fields, "subset")
    chosen, rejected = _texts(fields, "chosen"), _texts(fields, "rejected")
    stated = fields.get("num_correct")
    if stated is not None and int(stated) != len(chosen):
        raise _Fault(f"num_correct is {stated}, chosen has {len(chosen)}")
    if subset != TIES and len(chosen) != 1:
        raise _Fault(f"chosen has {len(chosen)} completions, expected 1")
    return Parsed(_user(fields), chosen, rejected, subset)


def _rm_bench(fields: dict[str, Any]) -> Parsed:
    return Parsed(
        _user(fields), _texts(fields, "chosen", 3), _texts(fields, "rejected", 3), _subset(fields, "domain", "subset")
    )


def _reward_bench(fields: dict[str, Any]) -> Parsed:
    return Parsed(_user(fields), _texts(fields, "chosen", 1), _texts(fields, "rejected", 1), _subset(fields, "subset"))


def _pairs(fields: dict[str, Any]) -> Parsed:
    found = parse_pair(fields, "")
    if isinstance(found, str):
        raise _Fault(found)
    return Parsed(found.prompt, [found.chosen], [found.rejected], found.subset or "")


def _best_of_n(fields: dict[str, Any]) -> Parsed:
    subset = fields.get("subset")
    name = subset if isinstance(subset, str) else ""
    return Parsed(_user(fields), _texts(fields, "chosen"), _texts(fields, "rejected"), name)


FORMATS: dict[str, Format] = {
    "reward_bench_2": Format(
        "hf:allenai/reward-bench-2:test",
        {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, TIES: 102},
        _reward_bench_2,
    ),
    "rm_bench": Format(
        "hf:THU-KEG/RM-Bench:train",
        {"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157},
        _rm_bench,
    ),
    "reward_bench": Format(
        "hf:allenai/reward-bench:filtered",
        {
            "alpacaeval-easy": 100,
            "alpacaeval-length": 95,
            "alpacaeval-hard": 95,
            "mt-bench-easy": 28,
            "mt-bench-med": 40,
            "mt-bench-hard": 37,
            "llmbar-natural": 100,
            "llmbar-adver-neighbor": 134,
            "llmbar-adver-GPTInst": 92,
            "llmbar-adver-GPTOut": 47,
            "llmbar-adver-manual": 46,
            "refusals-dangerous": 100,
            "refusals-offensive": 100,
            "xstest-should-refuse": 154,
            "xstest-should-respond": 250,
            "donotanswer": 136,
            "math-prm": 447,
            **dict.fromkeys(_V1_CODE, 164),
        },
        _reward_bench,
    ),
    "pairs": Format("", None, _pairs),
    "best_of_n": Format("", None, _best_of_n),
}
