"""The flags of `jobs/audit_features.py`, `jobs/steer.py` and `jobs/relabel.py`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from sarm.settings.checks import OPERATIONAL, UserError, check_tokens
from sarm.settings.results_root import READ, place_paths
from sarm.settings.run import Flat, RunSettings

SITES = ("reward", "sentence")


@dataclass(frozen=True, kw_only=True)
class AuditFeatures:
    """Find the latents that tell a target's chosen from its rejected responses, and test what they cause."""

    common: ClassVar[tuple[str, ...]] = ("sarm", "select", "target", "off_target", "limit", "fdr", "ratings")
    run: Annotated[RunSettings, Flat] = RunSettings(out=Path("outputs/audit"))
    sarm: Path = field(metadata=READ)
    """SARM folder whose latents are audited."""
    select: tuple[str, ...] = field(metadata=READ)
    """Labelled pairs that features are chosen on: a pairs/v1 folder (`FOLDER` or `FOLDER:train`, `:heldout`, `:all`), or `NAME=SOURCE` as in `--benchmarks`."""
    target: tuple[str, ...] = field(metadata=READ)
    """Held-out pairs of the same kind, on which every effect is measured."""
    off_target: tuple[str, ...] = field(metadata=READ)
    """Other pairs, which should not move; half of the prompts (by hash) choose features, half measure."""
    limit: int | None = None
    """About this many rows of each benchmark of `select` and `target`, chosen by hash of the prompt."""
    limit_off_target: int | None = None
    """The same for `off_target`."""
    batch_tokens: int = field(default=0, metadata=OPERATIONAL)
    """Tokens of one forward pass, padding included; 0: as many as the device has memory for."""
    max_features: int = 8
    """Features that are selected at most (SAFER: 32)."""
    rank: Literal["effect", "score"] = "effect"
    """Which significant features come first: those with the largest part of the margin (head weight times paired difference), or with the purest contrast score (SAFER)."""
    fdr: float = 0.05
    """Share of false discoveries that is accepted among the selected features (Benjamini-Hochberg)."""
    max_off_target: float = 0.5
    """Largest share of off-target responses that a selected feature may fire on."""
    site: Literal["reward", "sentence"] = "reward"
    """Where features are chosen: at the rewarded token, or over the ends of the response's sentences."""
    ratings: Path | None = field(default=None, metadata=READ)
    """Ratings 1-5 on safety: a folder of jobs/interpret.py or jobs/rate.py, or a CSV with `latent` and `rating`, optionally `rater` and `status`. Only latents whose median rating reaches `min_rating` are selected."""
    min_rating: float = 5.0
    """Smallest median rating of a safety feature (SAFER: 5)."""
    permutations: int = 10_000
    """Number of random sign changes for a p-value, where there are too many to try all."""
    controls: int = 100
    """Random sets of latents, matched on density and weight, that every effect is compared with."""
    upstream_controls: int = 20
    """Matched sets for the interventions upstream of TopK, each of which encodes all responses again."""
    deletions: int = 40
    """Target responses of which sentences are deleted; 0: none."""
    redo: bool = field(default=False, metadata=OPERATIONAL)
    """Move the results of an audit with other settings aside (from `--out` to `OUT.aside/TIME`), then choose and test again; the codes stay if they are of the same pairs."""

    def __post_init__(self) -> None:
        place_paths(self)
        _least(self, limit=1, limit_off_target=1, max_features=1, permutations=100, controls=10, upstream_controls=5, deletions=0)  # fmt: skip
        check_tokens(self, "batch_tokens")
        for name in ("select", "target", "off_target"):
            if not getattr(self, name):
                raise UserError(f"there are no pairs to {name}. Pass --{name.replace('_', '-')} FOLDER or NAME=SOURCE.")
        if both := set(self.target) & set(self.off_target):
            raise UserError(f"{sorted(both)[0]} is both target and off-target. Pass other data to --off-target.")
        for name in ("fdr", "max_off_target"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}. Pass --{name.replace('_', '-')}.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Steer:
    """Edit head weights of a SARM, measure what that does on cached codes, and save the edited model."""

    uses_cluster: ClassVar[bool] = False
    run: Annotated[RunSettings, Flat] = RunSettings(out=Path("outputs/audit"))
    """`--out` is the folder that `jobs/audit_features.py` wrote."""
    name: str = "steered"
    """Name of the edit: the edited model goes to `steer/NAME` of that folder."""
    features: tuple[int, ...] = ()
    """Latents to edit; none: the audit's selected features."""
    edit: Literal["scale", "add", "zero", "set", "goal"] = "scale"
    """What happens to their head weights; `goal` looks for the smallest edit of any latents that reaches `goal`."""
    strength: float = 2.0
    """Factor, addend or new weight of the saved model."""
    strengths: tuple[float, ...] = (-2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0)
    """Strengths of the dose-response curves."""
    goal: float | None = None
    """With `--edit goal`: how far the target's mean margin is to rise, in reward units."""
    tolerance: float = 0.1
    """With `--edit goal`: how far the mean margin of any other subset may move."""
    max_change: float = 2.0
    """With `--edit goal`: largest change of a weight, in multiples of the head's largest weight."""
    over_refusal: tuple[str, ...] = ("safety-response",)
    """Subsets in which answering is right, so that a loss there is over-refusal."""
    undo: str | None = None
    """Name of an edit to take back: its model with the weights that it had before goes to `steer/NAME`; no other flag is used."""
    controls: int = 100
    """Random sets of latents, matched on density and weight, that every effect is compared with."""

    def __post_init__(self) -> None:
        _least(self, controls=10)
        for name in (self.name, self.undo):
            if name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", name):
                raise UserError(f"a name is made of letters, digits, dots and dashes, got {name!r}. Pass --name.")
        if self.edit == "goal" and not (self.goal and self.goal > 0 and self.tolerance > 0 and self.max_change > 0):
            raise UserError("an edit by goal needs --goal, --tolerance and --max-change above 0.")
        if not self.strengths:
            raise UserError("there are no strengths. Pass --strengths with numbers.")


@dataclass(frozen=True, kw_only=True)
class Relabel:
    """Poison and denoise the pairs that features were chosen on, by features and by controls, and retrain the head on them."""

    uses_cluster: ClassVar[bool] = False
    run: Annotated[RunSettings, Flat] = RunSettings(out=Path("outputs/audit"))
    """`--out` is the folder that `jobs/audit_features.py` wrote."""
    poison: tuple[float, ...] = (0.005, 0.01, 0.025, 0.05)
    """Shares of the training pairs that are flipped."""
    denoise: tuple[float, ...] = (0.02, 0.04, 0.06, 0.08, 0.1)
    """Shares of the training pairs that are dropped."""
    noise: float = 0.1
    """Share of the labels that are flipped at random, to be found again."""
    write: str | None = None
    """`ACTION:METHOD:SHARE`, e.g. `poison:features:0.05`: also write the selecting pairs so changed as pairs/v1, for full retraining."""
    pairs: Path | None = field(default=None, metadata=READ)
    """With `--write`: the pairs/v1 folder that the selecting pairs came from."""
    seeds: int = 5
    """Repetitions, each on its own nine tenths of the training prompts and with its own noise."""

    def __post_init__(self) -> None:
        _least(self, seeds=2)
        place_paths(self)
        if self.write is not None:
            action, _, rest = self.write.partition(":")
            share = rest.rpartition(":")[2]
            is_number = re.fullmatch(r"0?\.\d+", share) is not None
            if action not in ("poison", "denoise") or not is_number or self.pairs is None:
                raise UserError(f"--write is ACTION:METHOD:SHARE with --pairs FOLDER, got {self.write!r}. Pass e.g. --write poison:features:0.05.")  # fmt: skip
        for name in ("poison", "denoise"):
            if any(not 0 < share < 0.5 for share in getattr(self, name)):
                raise UserError(f"shares must lie between 0 and 0.5, got {getattr(self, name)}. Pass --{name}.")
        if not 0 < self.noise < 0.5:
            raise UserError(f"noise must lie between 0 and 0.5, got {self.noise}. Pass --noise.")


def _least(settings: object, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is not None and value < smallest:
            raise UserError(f"{name} must be at least {smallest}, got {value}. Pass --{name.replace('_', '-')}.")
