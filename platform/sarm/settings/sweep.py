"""Settings of the ablation: which cells, in which order of trust, and how the trials share the cluster."""

from dataclasses import dataclass, field
from typing import Literal

from sarm.settings.axes import Axis, axes_of
from sarm.settings.checks import OPERATIONAL, check, check_least
from sarm.settings.jobs import Pipeline

Component = Literal[
    "sarm", "random_encoder", "random_directions", "random_linear", "token_sae", "scalar", "scalar_full", "sparse_rm"
]
WITHOUT_SAE = ("scalar", "scalar_full")
FROZEN = ("sparse_rm",)
"""Components that are fitted on stored activations: no block is trained, and no setting of reward training makes a difference."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """The cells (layer, width, k, component, seed, and the settings of `axes`), and how they are searched."""

    layers: tuple[int, ...] = (1,)
    """Positions of the SAE: numbers of blocks that are kept."""
    widths: tuple[int, ...] = (16,)
    """Dictionary sizes as multiples of d_in."""
    ks: tuple[int, ...] = (8,)
    """Active latents."""
    components: tuple[Component, ...] = ("sarm",)
    """`sarm`, and what stands in its place: its encoder at random (`random_encoder`, `random_directions`, `random_linear`), an SAE of all tokens
    (`token_sae`), no SAE at all on the same blocks (`scalar`) or on the whole backbone (`scalar_full`), or a small head on
    directions of the SAE with nothing else trained (`sparse_rm`)."""
    token_rows: int = 50_000_000
    """Tokens of text, at most, that the SAEs of `token_sae` learn from; the papers' sentence ends are as many."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the SAE's first weights and of reward training; intervals over several are Student's t."""
    axes: tuple[str, ...] = ()
    """Further axes: settings of model, extraction, sae, reward or evaluation with their values, as in `sae.architecture=topk,jumprelu
    reward.lr=1e-6,5e-6`. A value of several items has spaces between them: `'sae.prefixes=32 64,64 128'`."""
    design: Literal["grid", "axes"] = "grid"
    """Every combination, or one axis at a time through the centre (SARM tables 2 and 3)."""
    centre: tuple[int, int, int] | None = None
    """(layer, width, k) that `axes` goes through, and that the components other than `sarm` are compared at; unset, the components
    are compared everywhere. On each of `axes` the centre is the job's own value, or the first one where that is not among them."""
    centre_seeds: tuple[int, ...] = ()
    """Seeds that only the cells at the centre have besides: how much chance there is in a difference, without paying for it everywhere."""
    search: Literal["grid", "asha", "random", "optuna"] = "grid"
    """All cells; all, but the worse ones stopped early (`asha`); `num_samples` of them drawn at random; or as many as Optuna proposes."""
    num_samples: int = 8
    """Cells that `random` and `optuna` try."""
    report_steps: int = field(default=10, metadata=OPERATIONAL)
    """Steps between two reports of a trial to Ray Tune."""
    grace_percent: int = 25
    """Share of its training that `asha` lets every trial have."""
    reduction_factor: int = 3
    """`asha` lets one in this many trials go on at each rung."""
    retries: int = field(default=1, metadata=OPERATIONAL)
    """How often a trial that fails is started again, from its last training state, before it is marked as failed."""
    trials_at_once: int = field(default=0, metadata=OPERATIONAL)
    """Trials that run side by side; 0: as many as the cluster has room for."""
    cpus_per_trial: int = field(default=0, metadata=OPERATIONAL)
    """Cores of each worker and actor of a trial, so that several fit beside each other; 0: as `--cpus-per-worker`, which the shared stages go by."""
    saes_at_once: int = field(default=8, metadata=OPERATIONAL)
    """SAEs of one layer that learn from one read at most; each takes its own memory."""
    register_best: bool = field(default=True, metadata=OPERATIONAL)
    """Register the best model in MLflow, as `--mlflow-models` says."""

    @property
    def settings_axes(self) -> tuple[Axis, ...]:
        """The axes of `axes`, their values read."""
        return axes_of(self.axes)

    def __post_init__(self) -> None:
        axes_of(self.axes)
        for name in ("layers", "widths", "ks", "components", "seeds"):
            values = getattr(self, name)
            check(self, f"sweep.{name}", len(values) > 0, "one or more values: the grid would be empty")
            check(self, f"sweep.{name}", len(values) == len(set(values)), "different values: cells would be repeated")
        for name in ("layers", "widths", "ks"):
            check(self, f"sweep.{name}", min(getattr(self, name)) >= 1, "1 or more")
        check(self, "sweep.seeds", min(self.seeds + self.centre_seeds) >= 0, "0 or more")
        both = self.seeds + self.centre_seeds
        check(
            self, "sweep.centre_seeds", len(both) == len(set(both)), "seeds that are not among --sweep.seeds, each once"
        )
        check(self, "sweep.centre", self.centre is not None or not self.centre_seeds, "given for --sweep.centre-seeds")
        check(self, "sweep.centre", self.design == "grid" or self.centre is not None, "given for --sweep.design axes")
        if self.centre is not None:
            for value, name in zip(self.centre, ("layers", "widths", "ks"), strict=True):
                check(self, "sweep.centre", value in getattr(self, name), f"among --sweep.{name}")
        check_least(
            self,
            "sweep.",
            num_samples=1,
            token_rows=1,
            report_steps=1,
            retries=0,
            cpus_per_trial=0,
            trials_at_once=0,
            saes_at_once=1,
            reduction_factor=2,
        )
        check(self, "sweep.grace_percent", 1 <= self.grace_percent < 100, "between 1 and 99")


@dataclass(frozen=True, kw_only=True)
class Ablation(Pipeline):
    """SAE and reward model of every cell of a grid, each measured on held-out pairs."""

    sweep: SweepSettings = SweepSettings()
