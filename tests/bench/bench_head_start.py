"""Where a reward head should start, and what the dictionary costs: pairwise accuracy of linear heads on frozen activations.

Reads a finished demo (`make demo`). Cross-validation over training prompts is what a start is chosen by; the dictionary has seen the
responses of all of them (without labels), so it flatters what reads through it. The held-out column shows that; nothing is chosen
by it. FVU is that of the reconstruction on the same rows.

    make bench BENCH=head_start
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from sarm.contracts.ids import stable_int
from sarm.data.formats.sae_folder import load_sae
from sarm.data.store.activations import ActivationStore
from sarm.data.store.pairs import load_pairs
from sarm.evaluate.probe import fit_probe
from sarm.nn.sae import dense, standardise

DEMO = Path("outputs/demo")
OUT = Path("outputs/bench/head_start.json")
NUM_FOLDS, SEED = 5, 0

Array = NDArray[np.float32]


class Split(NamedTuple):
    """One split's distinct rows as activations, reconstructions and codes; each pair's prompt and rows."""

    x: Array
    x_hat: Array
    z: Array
    prompts: NDArray[np.str_]
    chosen: NDArray[np.intp]
    rejected: NDArray[np.intp]

    def part(self, kind: str, pairs: NDArray[np.intp]) -> tuple[Array, Array]:
        """Chosen and rejected rows of some pairs."""
        rows = getattr(self, kind)
        return rows[self.chosen[pairs]], rows[self.rejected[pairs]]

    def fvu(self) -> float:
        return float(((self.x - self.x_hat) ** 2).sum() / ((self.x - self.x.mean(0)) ** 2).sum())


# What the probe is fitted on, and what it reads.
STARTS = {
    "probe on activations": ("x", "x"),
    "the same probe, read through the decoder": ("x", "x_hat"),
    "fit on reconstructions": ("x_hat", "x_hat"),
    "fit on codes": ("z", "z"),
}


def main() -> None:
    train, heldout = load("train", "chat"), load("heldout", "heldout")
    everything = np.arange(len(train.prompts))
    figures: dict[str, dict[str, float]] = {}
    print(f"{'':42s}{'cross-val.':>11s}{'held out':>10s}")
    for name, (fitted, read) in STARTS.items():
        folds = GroupKFold(NUM_FOLDS).split(train.prompts, groups=train.prompts)
        right = np.concatenate([margins(train, fit, train, test, fitted, read) > 0 for fit, test in folds])
        unseen = margins(train, everything, heldout, np.arange(len(heldout.prompts)), fitted, read) > 0
        figures[name] = {"cross_validated": float(right.mean()), "heldout": float(unseen.mean())}
        print(f"{name:42s}{right.mean():11.4f}{unseen.mean():10.4f}", flush=True)
    fvu = {"train": train.fvu(), "heldout": heldout.fvu()}
    print(f"{'FVU of the reconstructions':42s}{fvu['train']:11.4f}{fvu['heldout']:10.4f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    sizes = {"train_pairs": len(train.prompts), "heldout_pairs": len(heldout.prompts)}
    OUT.write_text(json.dumps({"accuracy": figures, "fvu": fvu, **sizes}, indent=1))


def load(split: str, folder: str) -> Split:
    """The pairs of a split with what the dictionary makes of their activations."""
    pairs = load_pairs(DEMO / "pairs", split).select(["pair_id", "prompt_id"]).to_pylist()
    place, h = ActivationStore(DEMO / "activations" / folder).read_sides()
    chosen, rejected = (
        np.array([place[stable_int(pair["pair_id"]), side] for pair in pairs]) for side in ("chosen", "rejected")
    )
    sae, _ = load_sae(DEMO / "sae")
    x = standardise(h)
    with torch.no_grad():
        codes = sae(x)
        z, x_hat = dense(codes, sae.d_sae).numpy(), sae.decode(codes).numpy()
    return Split(x.numpy(), x_hat, z, np.array([pair["prompt_id"] for pair in pairs]), chosen, rejected)


def margins(
    source: Split, fit: NDArray[np.intp], target: Split, test: NDArray[np.intp], fitted: str, read: str
) -> Array:
    """Margins of the target's test pairs by a probe fitted on the source's."""
    probe = fit_probe(*source.part(fitted, fit), source.prompts[fit], SEED)
    chosen, rejected = target.part(read, test)
    return probe.rewards(chosen) - probe.rewards(rejected)


if __name__ == "__main__":
    main()
