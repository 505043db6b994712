"""The flags of `jobs/debias.py`."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sarm.settings.benchmarks import Benchmarking
from sarm.settings.chat_template import template_text
from sarm.settings.checks import ABSENT_AT_DEFAULT, OPERATIONAL, UserError, check_tokens
from sarm.settings.judging import Judging
from sarm.settings.registered import listing
from sarm.settings.results_root import READ, place_paths
from sarm.settings.run import Flat, RunSettings

RANKS = ("strength", "effect")
PROPERTIES = ("markdown", "length", "hedging", "sycophancy", "tone", "position", "injection", "paraphrase", "rm_bench", "trigger")  # fmt: skip
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True, kw_only=True)
class DebiasSettings:
    """Which properties are looked for, and how features that carry them are suppressed."""

    properties: tuple[str, ...] = ("markdown", "length")
    """Properties of answers: markdown, length, hedging, sycophancy, tone, position (of list items), injection (patterns that speak to the judge), paraphrase,
    rm_bench (its own styles), trigger (a planted word). Those of --contrasts are looked for besides."""
    trigger: str = ""
    """The word that `trigger` puts behind answers, as a backdoor has it."""
    as_given: bool = False
    """Take RM-Bench's two styles, and pairs of --contrasts, as their authors wrote them: where their words differ too, they are else left out."""
    ranks: tuple[str, ...] = RANKS
    """Orders in which features are tried: strength (by how much more they fire with the property), effect (by what that does to the reward, to first order)."""
    features: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of features that are suppressed together, the first of each order first."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5)
    """How much of each feature is taken away: 0.5 halves it, 1 suppresses it, 2 turns it round, which also counters what other ways carry on."""
    positions: Literal["all", "answer", "rewarded"] = "all"
    """Tokens at which features are suppressed: all, the answer's, or the one that is rewarded."""
    min_stability: float = 0.7
    """Share of prompts in which a feature has to be stronger with the property."""
    max_cost: float = 0.01
    """Largest loss of accuracy that an edit may have on the half that it is chosen on: on equal styles and where the style helps; for a trigger, on texts without it."""
    controls: int = 8
    """Random sets of features, and as many of equal frequency and size, that the chosen edit is compared with."""
    prompts: int = 200
    """About this many prompts of the pairs, chosen by hash."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.properties if name not in PROPERTIES]:
            raise UserError(f"unknown property {unknown[0]}, known are {', '.join(PROPERTIES)}. Pass --debias.properties.")  # fmt: skip
        if not self.properties or len(set(self.properties)) < len(self.properties):
            raise UserError(f"the properties are {self.properties}, expected some, each once. Pass --debias.properties.")  # fmt: skip
        if not self.ranks or not set(self.ranks) <= set(RANKS) or len(set(self.ranks)) < len(self.ranks):
            raise UserError(f"the ranks are {self.ranks}, expected some of {' and '.join(RANKS)}, each once. Pass --debias.ranks.")  # fmt: skip
        if "trigger" in self.properties and not self.trigger.strip():
            raise UserError("the property trigger has no trigger. Pass --debias.trigger TEXT.")
        if not self.features or min(self.features) < 1 or list(self.features) != sorted(set(self.features)):
            raise UserError(f"features must be rising numbers from 1 on, got {self.features}. Pass --debias.features.")
        if not self.strengths or not all(math.isfinite(one) and 0 < one <= 2 for one in self.strengths):
            raise UserError(f"strengths must be above 0 and at most 2, got {self.strengths}. Pass --debias.strengths.")
        for name, least, most in (("min_stability", 0.5, 1.0), ("max_cost", 0.0, 1.0)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"{name} must be between {least:g} and {most:g}, got {getattr(self, name)}. Pass --debias.{name.replace('_', '-')}.")  # fmt: skip
        for name, fewest in (("controls", 2), ("prompts", 8)):
            if getattr(self, name) < fewest:
                raise UserError(f"{name} must be at least {fewest}, got {getattr(self, name)}. Pass --debias.{name}.")


@dataclass(frozen=True, kw_only=True)
class Debias:
    """Find the features by which a reward model over-rewards a style, suppress them, and measure what that repairs and costs."""

    run: Annotated[RunSettings, Flat] = RunSettings(out=Path("outputs/debias"))
    model: str = field(metadata=READ)
    """Folder or Hugging Face id of a reward model: a SARM, or a sequence classifier of others."""
    sae: tuple[Path, ...] = field(metadata=READ)
    """SAE folders (sae/v1) that were trained on activations of this model, one for each layer to be edited."""
    pairs: tuple[str, ...] = field(metadata=READ)
    """Preferences whose answers get the properties: a pairs/v1 folder (`FOLDER` or `FOLDER:train`, `:heldout`, `:all`), or `NAME=SOURCE` as in `--benchmarks`."""
    contrasts: tuple[str, ...] = field(default=(), metadata=READ | ABSENT_AT_DEFAULT)
    """`PROPERTY=FILE` of pairs of one's own: JSON lines with `prompt`, and `chosen` and `rejected` as [without, with] the property. A property that has a rule is held to it; one that has none needs --debias.as-given."""
    judging: Judging = Judging()
    """Who writes the paraphrases of the property `paraphrase`: the first of `judges`; nobody: they are made by rule."""
    benchmarks: Annotated[tuple[str, ...], listing("known benchmarks")] = field(default=(), metadata=READ)
    """`NAME=SOURCE` of known benchmarks on which the edit is measured too, such as RM-Bench and RewardBench 2."""
    other_model: bool = field(default=False, metadata=ABSENT_AT_DEFAULT)
    """Take SAEs that were trained on another model of the same width, such as the one that the reward model was made from."""
    revision: str = "main"
    """Branch, tag or commit of a Hugging Face model."""
    head: str = field(default="", metadata=ABSENT_AT_DEFAULT)
    """As in `jobs/evaluate.py --model`: `token:ID` is the logit of a token."""
    objectives: tuple[float, ...] = field(default=(), metadata=ABSENT_AT_DEFAULT)
    """Weight of each output of a head with several."""
    chat_template: str = field(default="", metadata=ABSENT_AT_DEFAULT)
    """Chat template of a tokenizer that has none, or several: a file, or the name of one that it has."""
    max_length: int | None = None
    """Tokens of a conversation at most; unset: what a SARM was trained with, else 2048."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the model's body. `auto`: bfloat16 on GPUs that multiply it, else float32."""
    batch_tokens: int = field(default=0, metadata=OPERATIONAL)
    """Tokens of one forward pass, padding included; 0: as many as the device has memory for."""
    limit: int | None = None
    """About this many rows of each benchmark, chosen by hash of the prompt."""
    debias: DebiasSettings = DebiasSettings()

    def __post_init__(self) -> None:
        place_paths(self)
        object.__setattr__(self, "chat_template", template_text(self.chat_template, "--chat-template"))
        check_tokens(self, "batch_tokens")
        if not self.sae or len(set(self.sae)) < len(self.sae):
            raise UserError(f"the SAEs are {[str(one) for one in self.sae]}, expected some, each once. Pass --sae.")
        if not self.pairs:
            raise UserError("there are no pairs. Pass --pairs FOLDER or NAME=SOURCE.")
        self._check_contrasts()
        if "rm_bench" in self.debias.properties and not any(one.startswith("rm_bench") for one in self.benchmarks):
            raise UserError("the property rm_bench needs its rows. Pass --benchmarks rm_bench=FILE.")
        for name in ("max_length", "limit"):
            value, least = getattr(self, name), 8 if name == "max_length" else 1
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}. Pass --{name.replace('_', '-')}.")

    def _check_contrasts(self) -> None:
        names = [text.partition("=")[0] for text in self.contrasts]
        if wrong := [text for text, name in zip(self.contrasts, names, strict=True) if "=" not in text or not _NAME.fullmatch(name)]:  # fmt: skip
            raise UserError(f"contrasts are PROPERTY=FILE, with a property in small letters, got {wrong[0]!r}. Pass --contrasts.")  # fmt: skip
        if repeated := [name for name in names if names.count(name) > 1 or name == "rm_bench"]:
            raise UserError(f"contrasts of {repeated[0]} are given twice. Pass each property to --contrasts once.")
        if unknown := [name for name in names if name not in PROPERTIES and not self.debias.as_given]:
            raise UserError(f"no rule says what {unknown[0]} is, so that nothing can tell whether pairs differ in it alone. Pass --debias.as-given to take them as they are.")  # fmt: skip
        if self.judging.judges and ("paraphrase" not in self.debias.properties or "paraphrase" in names):
            raise UserError("judges write paraphrases here, and none are asked for. Pass --debias.properties paraphrase, or leave --judging.judges out.")  # fmt: skip

    def of_model(self) -> Benchmarking:
        """The model as `jobs/evaluate.py --model` would read it."""
        return Benchmarking(
            run=self.run,
            model=self.model,
            revision=self.revision,
            benchmarks=self.benchmarks or ("pairs=none",),
            head=self.head,
            objectives=self.objectives,
            chat_template=self.chat_template,
            max_length=self.max_length,
            dtype=self.dtype,
            batch_tokens=self.batch_tokens,
            limit=self.limit,
        )
