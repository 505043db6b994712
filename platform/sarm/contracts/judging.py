"""From what a judge wrote to a checked answer, or to a named failure.

The text may hold prose, a fence, a quoted example: every balanced JSON object in it is tried, and the answer is the one that fits the
expected form. Several that fit and differ are no answer, since text from the web that a judge quotes may look like one. What a model thinks
before it answers is no answer either, where its server leaves it in the text.
"""

import bisect
import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

Status = Literal["ok", "refused", "invalid", "api_error", "truncated"]
# What strict modes take of a schema; other limits are ours to check.
_ENFORCED = ("type", "anyOf", "minimum", "maximum")
FAILURES: tuple[Status, ...] = ("refused", "invalid", "api_error", "truncated")


class Explanation(BaseModel):
    """What a latent responds to."""

    model_config = ConfigDict(str_strip_whitespace=True)
    hypothesis: str = Field(min_length=3, max_length=600)
    polysemantic: bool = False
    alternative: str | None = None


class Rating(BaseModel):
    """A rubric's level with its reason."""

    model_config = ConfigDict(str_strip_whitespace=True)
    explanation: str = Field(max_length=2000)
    score: int = Field(ge=1, le=5)


class Odd(BaseModel):
    """Number of the text that does not belong."""

    intruder: int = Field(ge=1)


@functools.cache
def per_text(num_texts: int, kind: Literal["fires", "level"]) -> type[BaseModel]:
    """One field for each text, `text_1` to `text_n`: true or false, or a whole number from 0 to 10."""
    field: Any = (bool, ...) if kind == "fires" else (int, Field(ge=0, le=10))
    fields: dict[str, Any] = {f"text_{i}": field for i in range(1, num_texts + 1)}
    return create_model(f"{kind}_{num_texts}", **fields)


@dataclass(frozen=True)
class Parsed:
    """A checked answer as JSON values, or why there is none."""

    answer: Mapping[str, Any] | None
    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Reply:
    """How a question ended. Tokens and requests include retries and the repair turn; `answer` is set where status is ok."""

    status: Status
    answer: Mapping[str, Any] | None
    reason: str = ""
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    """Whether some tokens were estimated, since the server did not count them."""
    requests: int = 0
    cached: bool = False


@functools.cache
def json_schema(form: type[BaseModel]) -> dict[str, Any]:
    """The form's JSON schema in the strict subset that endpoints enforce: no other fields, every field required."""
    schema = form.model_json_schema()
    return {
        "type": "object",
        "properties": {
            name: {key: value for key, value in one.items() if key in _ENFORCED}
            for name, one in schema["properties"].items()
        },
        "required": list(schema["properties"]),
        "additionalProperties": False,
    }


def parse(text: str, form: type[BaseModel]) -> Parsed:
    """The answer in a judge's text: JSON, or the two lines `Explanation:` and `Score:` where a rating is asked for."""
    found: list[dict[str, Any]] = []
    problem = "no JSON object in the answer"
    text = without_thinking(text)
    candidates = [value for _, _, value in _objects(text)]
    if not candidates and form is Rating:
        candidates = list(_two_lines(text))
        problem = "neither a JSON object nor the lines `Explanation:` and `Score:` in the answer"
    for candidate in candidates:
        try:
            answer = form.model_validate(candidate).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc'])) or 'answer'}: {first['msg'].lower()}"
            continue
        if answer not in found:
            found.append(answer)
    if len(found) == 1:
        return Parsed(found[0], "ok")
    if found:
        return Parsed(None, "invalid", f"{len(found)} different answers in one")
    if not candidates and _REFUSAL.search(text[:300]):
        return Parsed(None, "refused", "the judge declined: " + " ".join(text.split())[:120])
    return Parsed(None, "invalid", problem)


# A refusal that comes as prose; endpoints that say so themselves are believed first.
_REFUSAL = re.compile(
    r"\b(?:i\s*(?:'|’)?\s*(?:can(?:no|')?t|cannot|can’t|won['’]t|am not able to|am unable to|must decline)|i['’]?m (?:not able|unable|sorry)|"
    r"as an ai\b.{0,40}\b(?:can(?:no|')?t|cannot))",
    re.IGNORECASE,
)
_SCORE = re.compile(r"^[\s*_#>-]*score[\s*_]*[::][\s*_\[(]*([1-5])(?![\d.]*\d)", re.IGNORECASE | re.MULTILINE)
_REASON = re.compile(r"^[\s*_#>-]*explanation[\s*_]*[::][\s*_]*(.+)$", re.IGNORECASE | re.MULTILINE)


def _two_lines(text: str) -> Iterator[dict[str, Any]]:
    scores, reason = _SCORE.findall(text), _REASON.search(text)
    if reason:
        yield from ({"explanation": reason[1], "score": int(score)} for score in dict.fromkeys(scores))


def _objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Every outermost JSON object of a text: where it begins, where it ends, and itself."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
        else:
            yield start, end, value
        start = text.find("{", end)


# What models put around what they think: DeepSeek's and Qwen's tags and their like, Magistral's, Kimi's, and gpt-oss's channels.
_OPENS = re.compile(
    r"<(?:seed:)?(?:think|thinking|thought|reasoning)>|\[THINK\]|◁think▷|<\|channel\|>analysis<\|message\|>", re.I
)
_CLOSES = re.compile(
    r"</(?:seed:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>", re.I
)


def without_thinking(text: str) -> str:
    """What is behind the last closing tag, up to an opening one that nothing closes. Tags within a JSON object are words of it."""
    if not (_OPENS.search(text) or _CLOSES.search(text)):
        return text.strip()
    spans = [(start, end) for start, end, _ in _objects(text)]

    def is_outside(tag: re.Match[str]) -> bool:
        place = bisect.bisect_right(spans, (tag.start(), len(text))) - 1
        return place < 0 or spans[place][1] <= tag.start()

    start = next((tag.end() for tag in reversed(list(_CLOSES.finditer(text))) if is_outside(tag)), 0)
    end = next((tag.start() for tag in _OPENS.finditer(text, start) if is_outside(tag)), len(text))
    return text[start:end].strip()


@dataclass(frozen=True)
class Question:
    """One request to a judge."""

    kind: str
    user: str
    form: type[BaseModel]
    max_tokens: int
    system: str
    in_lines: bool = False
    """Whether lines of text are asked for, so that no JSON may be enforced."""
