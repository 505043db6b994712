"""Settings of SAE training."""

import itertools
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from sarm.settings.checks import OPERATIONAL
from sarm.settings.checks import check as _check
from sarm.settings.checks import check_least as _check_least
from sarm.settings.checks import check_rate as _check_rate

# What of the settings is one dictionary's own: SAEs that differ in nothing else learn from one read of the activations.
OF_ONE_DICTIONARY = frozenset(
    {"architecture", "d_sae", "k", "signed", "prefixes", "bandwidth", "l0_penalty"}
    | {"aux_k", "aux_coefficient", "dead_after_rows", "b_dec_init", "cross_entropy_texts"}
)


# Settings that only one recipe reads: what a dictionary of the other is does not depend on them.
OF_RECIPE = {
    "turn_ends": frozenset({"recipe", "steps", "shares", "reward_share", "reward_direction"}),
    "papers": frozenset({"text_epochs", "chat_epochs", "chat_lr"}),
}


@dataclass(frozen=True, kw_only=True)
class SaeSettings:
    """The sparse autoencoder, and by which recipe it is trained."""

    common: ClassVar[tuple[str, ...]] = ("d_sae", "k", "recipe", "lr", "architecture")
    d_sae: int = 9216
    """Dictionary size; the papers use 16 d_in. More than a quarter of the distinct activations leaves latents dead."""
    k: int = 27
    """Active latents per token; the papers use 3/64 d_in."""
    recipe: Literal["papers", "turn_ends"] = "papers"
    """`papers`: first on the sentence ends of the corpus, then on the final tokens of the training responses. `turn_ends`: once, on a
    mixture of turn ends of training responses and of texts (`--extraction.units turn_end`), all moved to where the reward is read."""
    lr: float = 5e-4
    """Adam's peak learning rate; of recipe `papers` that on sentence ends."""
    chat_lr: float = 5e-4
    """Recipe `papers`: Adam's peak learning rate on chat ends."""
    batch_size: int = 512
    """Activations of one step over all workers."""
    text_epochs: int = 1
    """Recipe `papers`: passes over the sentence ends of the corpus; 0 leaves the phase out."""
    chat_epochs: int = 1
    """Recipe `papers`: passes over the final tokens of the training responses; 0 leaves the phase out."""
    steps: int = 560
    """Recipe `turn_ends`: steps of `batch_size` rows."""
    shares: tuple[float, float] = (0.65, 0.35)
    """Recipe `turn_ends`: shares of the responses' and of the texts' turn ends in every step; 0 leaves one out."""
    reward_share: float = 0.0
    """Recipe `turn_ends`: share of all variance that the direction of a probe of the training pairs gets while the dictionary learns, so
    that latents are spent on what decides preferences. It uses training labels, never held-out ones. 0: off; 0.1 is a good value."""
    reward_direction: Literal["probe", "random"] = "probe"
    """Which direction that is; `random` is the control."""
    warmup_share: float = 0.05
    """Share of each phase over which the rate rises from 0."""
    decay_share: float = 0.2
    """Share of each phase over which the rate falls to 0."""
    heldout_share: float = 0.05
    """Share of activations, by hash of the document, kept out of training to measure FVU."""
    cross_entropy_texts: int = 0
    """Texts of the corpus, at most, on which the whole language model is run with the SAE spliced in; 0: not measured."""
    checkpoint_every_seconds: float = field(default=300.0, metadata=OPERATIONAL)
    """Time between two training states on disk; a stopped job that is run again goes on from the last one."""
    checkpoint_every_steps: int = field(default=0, metadata=OPERATIONAL)
    """Steps between two training states instead; 0: by time."""
    # Declared in `nn.architectures` too, and a test holds both equal: its classes load torch, which neither help nor a refused value may
    # wait for, and neither room imports the other.
    architecture: Literal["topk", "batch_topk", "matryoshka", "jumprelu", "abs_topk", "matching_pursuit"] = "topk"
    """k latents of each row; k a row on average over the batch, `matryoshka` in nested dictionaries; learnt thresholds; the k of largest
    absolute value, of either sign; or k greedy steps, each on what those before have left."""
    signed: bool = False
    """TopK without the ReLU, as in the papers' own code: negative latents may be active."""
    prefixes: tuple[int, ...] = ()
    """Sizes of Matryoshka's nested dictionaries below d_sae; empty: d_sae / 16, / 8, / 4 and / 2 as far as they hold k."""
    bandwidth: float = 0.1
    """Width around a JumpReLU threshold within which a pre-activation moves it."""
    l0_penalty: float = 1.0
    """JumpReLU's loss grows by this times (active latents / k - 1)^2."""
    b_dec_init: Literal["mean", "geometric_median"] = "mean"
    """Centre of the activations that the decoder bias starts at."""
    aux_k: int = 0
    """Dead latents that reconstruct the error of each row, so that they come alive (AuxK); 0: none. Papers: d_in / 2."""
    aux_coefficient: float = 1 / 32
    """Weight of AuxK's reconstruction loss."""
    dead_after_rows: int = 1_000_000
    """Rows, over all workers, after which a latent that has not fired is dead."""
    split: Literal["rows", "latents"] = field(default="rows", metadata=OPERATIONAL)
    """How workers share a step: its rows, or the dictionary's latents where one worker cannot hold them all."""

    @property
    def encoder_passes(self) -> int:
        """Products of each row with all latents that its codes take."""
        return self.k if self.architecture == "matching_pursuit" else 1

    def __post_init__(self) -> None:
        _check_least(self, "sae.", d_sae=1, batch_size=1, text_epochs=0, chat_epochs=0, warmup_share=0, decay_share=0)
        _check(self, "sae.k", 1 <= self.k <= self.d_sae, f"between 1 and d_sae={self.d_sae}")
        _check_rate(self, "sae.lr")
        _check_rate(self, "sae.chat_lr")
        self._check_recipe()
        _check(self, "sae.warmup_share", self.warmup_share + self.decay_share <= 1, "at most 1 - decay_share")
        _check(self, "sae.heldout_share", 0 < self.heldout_share < 0.5, "between 0 and 0.5")
        _check_least(self, "sae.", aux_k=0, dead_after_rows=1, checkpoint_every_steps=0, cross_entropy_texts=0)
        _check_rate(self, "sae.checkpoint_every_seconds")
        _check_rate(self, "sae.bandwidth")
        _check_rate(self, "sae.l0_penalty", zero_allowed=True)
        _check_rate(self, "sae.aux_coefficient", zero_allowed=True)
        rising = list(self.prefixes) == sorted(set(self.prefixes)) and all(0 < p < self.d_sae for p in self.prefixes)
        _check(self, "sae.prefixes", rising, f"rising sizes between 1 and {self.d_sae - 1}")
        _check(
            self, "sae.signed", not self.signed or self.architecture == "topk", "off unless the architecture is topk"
        )

    def _check_recipe(self) -> None:
        _check(self, "sae.text_epochs", self.text_epochs + self.chat_epochs > 0, "above 0 where chat_epochs is 0")
        _check_least(self, "sae.", steps=1)
        adds_up = min(self.shares) >= 0 and abs(sum(self.shares) - 1) < 1e-9
        _check(self, "sae.shares", adds_up, "two shares that add up to 1")
        _check(self, "sae.reward_share", 0 <= self.reward_share < 1, "at least 0 and below 1")
        if self.recipe == "papers":
            off = "0 where the recipe is papers (the preset demo-papers is the demo by that recipe)"
            _check(self, "sae.reward_share", self.reward_share == 0, off)
        else:
            no_texts = self.cross_entropy_texts == 0
            _check(self, "sae.cross_entropy_texts", no_texts, "0 where the recipe is turn_ends, which reads no texts")
            is_tied = self.architecture == "matching_pursuit" and self.reward_share > 0
            _check(self, "sae.reward_share", not is_tied, "0 for matching_pursuit, whose encoder is its decoder")


@dataclass(frozen=True, kw_only=True)
class AlsoSaes:
    """SAEs that learn beside the main one, from the same read of the activations: every combination of these and of its own values."""

    d_sae: tuple[int, ...] = ()
    """Further dictionary sizes."""
    k: tuple[int, ...] = ()
    """Further numbers of active latents."""
    seed: tuple[int, ...] = ()
    """Further seeds of the first weights; the order of rows stays that of --seed."""

    def beside(self, sae: SaeSettings, seed: int) -> list[tuple[str, SaeSettings, int]]:
        """Name, settings and seed of each, without the main one; raises UserError for a combination that cannot be."""
        others = []
        for d_sae, k, init_seed in itertools.product(
            *(dict.fromkeys((own, *further)) for own, further in ((sae.d_sae, self.d_sae), (sae.k, self.k), (seed, self.seed)))
        ):  # fmt: skip
            if (d_sae, k, init_seed) != (sae.d_sae, sae.k, seed):
                others.append((f"d{d_sae}-k{k}-seed{init_seed}", replace(sae, d_sae=d_sae, k=k), init_seed))
        return others
