"""Where a reward head should start: pairwise accuracy of linear heads on frozen activations, by cross-validation over prompts.

Reads the training split of a finished demo (`make demo`); held-out pairs play no part. The dictionary has seen the responses of all
training prompts, without their labels.

    make bench BENCH=head_start
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from sarm.data.activations import ActivationStore
from sarm.data.artifacts import load_sae
from sarm.evaluate.probe import fit_probe
from sarm.nn.sae import dense, standardise
from sarm.runtime.reward_training import load_pairs
from sarm.schema import stable_int

DEMO = Path("outputs/demo")
OUT = Path("outputs/bench/head_start.json")
NUM_FOLDS, SEED = 5, 0

Array = NDArray[np.float32]
Start = Callable[[NDArray[np.intp], NDArray[np.intp]], Array]


def main() -> None:
    pairs = load_pairs(DEMO / "pairs", "train").select(["pair_id", "prompt_id"]).to_pylist()
    prompts = np.array([pair["prompt_id"] for pair in pairs])
    place, h = ActivationStore(DEMO / "activations" / "chat").read_sides()
    chosen, rejected = (
        np.array([place[stable_int(pair["pair_id"]), side] for pair in pairs]) for side in ("chosen", "rejected")
    )
    sae, _ = load_sae(DEMO / "sae")
    x = standardise(h)
    with torch.no_grad():
        codes = sae(x)
        z, x_hat = dense(codes, sae.d_sae).numpy(), sae.decode(codes).numpy()

    def fitted_on(features: Array, read: Array) -> Start:
        """Margins of test pairs: the probe is fitted on `features` and reads `read`."""

        def margins(train: NDArray[np.intp], test: NDArray[np.intp]) -> Array:
            probe = fit_probe(features[chosen[train]], features[rejected[train]], prompts[train], SEED)
            return probe.rewards(read[chosen[test]]) - probe.rewards(read[rejected[test]])

        return margins

    alive = z.any(axis=0)
    starts = {
        "probe on activations": fitted_on(x.numpy(), x.numpy()),
        "the same probe, read through the decoder": fitted_on(x.numpy(), x_hat),
        "fit on reconstructions": fitted_on(x_hat, x_hat),
        "fit on codes": fitted_on(z[:, alive], z[:, alive]),
    }
    accuracy = {}
    for name, start in starts.items():
        right = np.concatenate(
            [start(train, test) > 0 for train, test in GroupKFold(NUM_FOLDS).split(prompts, groups=prompts)]
        )
        accuracy[name] = float(right.mean())
        print(f"{name:42s}{accuracy[name]:8.4f}", flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"cv_accuracy": accuracy, "pairs": len(pairs), "prompts": len(set(prompts))}, indent=1))


if __name__ == "__main__":
    main()
