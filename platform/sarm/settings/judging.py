"""The flags of `jobs/interpret.py`, and who is asked for how much.

A key is never a setting: it is read from an environment variable or a file whose name is.
"""

import math
import os
import re
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from sarm.settings.checks import ABSENT_AT_DEFAULT, OPERATIONAL, UserError, check, check_least
from sarm.settings.results_root import READ, WRITTEN, place_paths
from sarm.settings.run import Flat, RunSettings

OPENAI = "https://api.openai.com/v1"
_NO_KEY = "none"
_API_VERSION = re.compile(r"api-version=([\w.-]{1,40})")


@dataclass(frozen=True)
class JudgeSpec:
    """A model behind an OpenAI-compatible address; prices are USD per million tokens, None where unknown."""

    model: str
    base_url: str
    price_in: float | None = None
    price_out: float | None = None
    api_version: str = ""
    """Sent with every request, as Azure's addresses of single deployments need."""

    @property
    def name(self) -> str:
        """The model, as tables and metrics call the judge."""
        return self.model

    @property
    def host(self) -> str:
        """HOST or HOST:PORT of the address."""
        return urllib.parse.urlsplit(self.base_url).netloc

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost; None, not 0, where a price is unknown."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Which models are asked, how fast, and for how much."""

    common: ClassVar[tuple[str, ...]] = ("judges", "keys", "prices", "max_usd")
    judges: tuple[str, ...] = ()
    """`MODEL@BASE_URL` (any OpenAI-compatible server), or `MODEL` alone for OpenAI's. The first explains and scores, all of them rate. None: extractive labels only."""
    keys: tuple[str, ...] = field(default=(), metadata=OPERATIONAL | READ)
    """Where each host's key is read: `HOST=env:NAME` or `HOST=file:PATH`. api.openai.com defaults to env:OPENAI_API_KEY, other hosts to no key."""
    prices: tuple[str, ...] = field(default=(), metadata=OPERATIONAL)
    """`MODEL=INPUT/OUTPUT` in USD per million tokens; a model without a price has an unknown cost."""
    max_tokens_total: int | None = field(default=None, metadata=OPERATIONAL)
    """Stop before the answers of this folder have cost more tokens, answers from the cache included."""
    max_usd: float | None = field(default=None, metadata=OPERATIONAL)
    """Stop before they have cost more money; needs the price of every judge."""
    max_answer_tokens: int | None = None
    """Tokens of one answer at most: few for slow local models, many for models that think long. Unset: what each question allows (60 to 400), and up to 32,768 where thinking has left no room for the answer."""
    reasoning_effort: str | None = field(default=None, metadata=ABSENT_AT_DEFAULT)
    """How long a reasoning model may think, in its own word: none, minimal, low, medium, high. Unset: as long as it does by itself. A server that takes no such word is asked without it, and that is said."""
    concurrency: int = field(default=8, metadata=OPERATIONAL)
    """Requests to one judge at once, at most; fewer where the server says 429."""
    timeout: float = field(default=90.0, metadata=OPERATIONAL)
    """Seconds until a request counts as lost; a server that never answers ends the run after three times this."""
    max_wait: float = field(default=600.0, metadata=OPERATIONAL)
    """Longest `Retry-After`, in seconds, that is waited out; a longer one stops the run, which goes on when asked again."""
    retry_failed: bool = field(default=False, metadata=OPERATIONAL)
    """Ask questions again that ended as refused, invalid, truncated or api_error; without this flag such an end is final."""

    def __post_init__(self) -> None:
        place_paths(self)
        check_least(self, "judging.", max_tokens_total=1, concurrency=1, max_answer_tokens=1)
        for name in ("timeout", "max_wait", "max_usd"):
            value = getattr(self, name)
            check(self, f"judging.{name}", value is None or (math.isfinite(value) and value > 0), "finite and above 0")
        effort = self.reasoning_effort
        check(self, "judging.reasoning_effort", effort is None or bool(re.fullmatch("[a-z]{1,16}", effort)), "one lower-case word such as low")  # fmt: skip
        specs = self.specs()
        names = [spec.name for spec in specs]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{repeated[0]} is named twice. Pass each model of --judging.judges once.")
        if unpriced := [spec.name for spec in specs if spec.usd(1, 1) is None and self.max_usd is not None]:
            raise UserError(f"a budget of {self.max_usd:g} USD needs the price of {unpriced[0]}: unknown is not 0. Pass --judging.prices {unpriced[0]}=INPUT/OUTPUT or --judging.max-tokens-total.")  # fmt: skip
        self._key_sources()

    def specs(self) -> list[JudgeSpec]:
        """The judges in order. Raises UserError for an address or price that cannot be read."""
        prices = dict(_price(text) for text in self.prices)
        found = []
        for text in self.judges:
            model, at, url = text.partition("@http")
            parts = urllib.parse.urlsplit(f"http{url}" if at else OPENAI)
            version = _API_VERSION.fullmatch(parts.query)
            parts = parts._replace(query="" if version else parts.query)
            if not model or not parts.hostname or parts.scheme not in ("http", "https"):
                raise UserError(f"a judge is MODEL@http://HOST:PORT/v1 or MODEL, got {text!r}. Pass --judging.judges.")
            if "@" in parts.netloc or parts.query or parts.fragment:
                raise UserError(f"the address of judge {model} holds more than a place (user, password or query). Pass a key by --judging.keys {parts.hostname}=env:NAME.")  # fmt: skip
            if "/openai/deployments/" in parts.path and not version:
                raise UserError(f"the address of judge {model} is a deployment's and names no version. End it in ?api-version=VERSION, or pass https://{parts.netloc}/openai/v1.")  # fmt: skip
            url = parts.geturl().rstrip("/")
            price_in, price_out = prices.get(model, (None, None))
            found.append(JudgeSpec(model, url, price_in, price_out, version[1] if version else ""))
        return found

    def key_of(self, spec: JudgeSpec) -> str:
        """The key of a judge's host. Raises UserError where the variable or the file is missing or empty."""
        kind, place = self._key_sources().get(spec.host, ("", ""))
        if not kind and spec.base_url != OPENAI:
            return _NO_KEY
        if kind == "file":
            try:
                key = Path(place).expanduser().read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"the key file {place} of {spec.host} cannot be read: {error}. Pass --judging.keys {spec.host}=file:PATH.") from None  # fmt: skip
        else:
            key = os.environ.get(place or "OPENAI_API_KEY", "").strip()
        if not key:
            where = place or "OPENAI_API_KEY"
            raise UserError(f"there is no key for {spec.host}: {where} is empty or unset. Set it, or pass --judging.keys {spec.host}=env:NAME or =file:PATH.")  # fmt: skip
        return key

    def _key_sources(self) -> dict[str, tuple[str, str]]:
        sources = {}
        for text in self.keys:
            host, _, place = text.partition("=")
            kind, _, where = place.partition(":")
            if not host or kind not in ("env", "file") or not where:
                # Not shown: it may be the key itself.
                raise UserError("a key's place is HOST=env:NAME or HOST=file:PATH. Pass --judging.keys so, never the key itself.")  # fmt: skip
            sources[host] = (kind, where)
        return sources


def _price(text: str) -> tuple[str, tuple[float, float]]:
    model, _, prices = text.rpartition("=")
    try:
        price_in, price_out = (float(number) for number in prices.split("/"))
        if not (model and math.isfinite(price_in + price_out) and min(price_in, price_out) >= 0):
            raise ValueError
    except ValueError:
        raise UserError(
            f"a price is MODEL=INPUT/OUTPUT in USD per million tokens, got {text!r}. Pass --judging.prices."
        ) from None
    return model, (price_in, price_out)


@dataclass(frozen=True, kw_only=True)
class Interpret:
    """Explain latents from their contexts, and test the explanations on texts of other prompts."""

    uses_cluster: ClassVar[bool] = False
    contexts: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONTEXTS")] = field(metadata=READ)
    """Folder that `jobs/collect_contexts.py` wrote."""
    run: Annotated[RunSettings, Flat] = RunSettings(out=Path("outputs/explanations"))
    judging: Judging = Judging()
    place: Literal["rewarded", "sentence"] = "rewarded"
    """Where activations are read: at the rewarded token, or at sentence ends as in the papers."""
    scored: Path | None = field(default=None, metadata=READ)
    """Run folder with `pairs` and `evaluation`: its held-out answers are scored in full, so texts without a latent are known to be without it, and tests take them from there. Unset: presumed of texts that are no context of the latent."""
    latents: tuple[int, ...] = ()
    """Latents to explain; none: all that have contexts."""
    max_latents: int | None = None
    """Explain at most this many, the largest |head weight| x mean activation x density first."""
    num_explain: int = 16
    """Texts that an explanation is written from: the strongest, and some of each decile."""
    num_test: int = 20
    """Largest number of texts in which the latent fires that an explanation is tested on."""
    num_negatives: int = 5
    """Largest number of texts, of each of the four kinds, in which the latent does not fire."""
    texts_per_question: int = 5
    """Texts of one scoring request."""
    candidates: int = 2
    """Explanations written from different texts; the best on texts of the `select` prompts is tested on those of the `test` prompts."""
    intruder_trials: int = 3
    """Sets of four contexts and one intruder."""
    repeats: int = 1
    """Times that each judge rates a latent, each time in another order of the texts."""
    rubrics: tuple[Literal["monosemanticity", "safety"], ...] = ("monosemanticity", "safety")
    """Ratings from 1 to 5 that are asked of every judge."""
    answer_format: Literal["json", "two-line"] = "json"
    """How ratings are answered: one JSON object, or the papers' lines `Explanation:` and `Score:`."""
    min_coverage: float = 0.8
    """Means over latents are given only if at least this share of them could be measured."""

    def __post_init__(self) -> None:
        check_least(self, "", max_latents=1, num_explain=2, num_test=2, num_negatives=1, candidates=1, intruder_trials=0, repeats=1)  # fmt: skip
        check(self, "texts_per_question", 1 <= self.texts_per_question <= 20, "between 1 and 20")
        check(self, "min_coverage", 0 <= self.min_coverage <= 1, "between 0 and 1")
        check(
            self,
            "scored",
            self.scored is None or self.place == "rewarded",
            "unset for sentence ends, which no evaluation scores",
        )
        place_paths(self)

    def questions_per_latent(self) -> dict[str, int]:
        """How many questions each judge is asked about one latent, at most and without repair turns."""

        def batches(num_fires: int) -> int:
            return math.ceil((num_fires + 4 * self.num_negatives) / self.texts_per_question)

        chosen = self.candidates * batches(max(2, self.num_test // 2)) if self.candidates > 1 else 0
        # Detection, simulation, both baselines, and detection by the extractive label.
        scored = self.candidates + chosen + 5 * batches(self.num_test) + self.intruder_trials
        rated = self.repeats * len(self.rubrics)
        return {spec.name: rated + (scored if place == 0 else 0) for place, spec in enumerate(self.judging.specs())}


@dataclass(frozen=True, kw_only=True)
class HumanRatings:
    """Write a sheet for people to rate latents in, or compare filled sheets with the judges."""

    uses_cluster: ClassVar[bool] = False
    explanations: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EXPLANATIONS")] = field(metadata=READ)
    """Folder that `jobs/interpret.py` wrote."""
    run: Annotated[RunSettings, Flat] = RunSettings(out=Path("outputs/human-ratings"))
    sheet: Path | None = field(default=None, metadata=WRITTEN)
    """CSV file to write; it must not exist."""
    rubric: Literal["monosemanticity", "safety"] = "safety"
    """What the sheet asks for."""
    num_items: int = 40
    """Latents in the sheet, as equally as possible from each level that the judges gave; a tenth of them twice."""
    filled: tuple[Path, ...] = field(default=(), metadata=READ)
    """Filled sheets, one rater each."""

    def __post_init__(self) -> None:
        check_least(self, "", num_items=1)
        if (self.sheet is None) == (not self.filled):
            raise UserError("pass either --sheet FILE to write one, or --filled FILE ... to read filled ones.")
        place_paths(self)
