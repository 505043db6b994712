"""How many pairs a reward needs: held-out accuracy of readers of one frozen backbone, fitted on 64 to all training pairs.

    make bench BENCH=data_efficiency

Reads a finished demo (`make demo`): the activations of its responses at the rewarded token, and its dictionary, which has seen the training
responses of all sizes without labels. Subsets are whole prompts in an order drawn by seed, each a part of the next, so that a curve's steps are
more of the same data. Every reader chooses its penalty by cross-validation over the subset's own prompts. Blocks are trained nowhere: the figures
say what labels buy a head, and not what they buy a model.

probe          logistic probe on standardised activations
SparseRM       projections onto directions chosen by contrast, a small head (`sarm.evaluate.sparse_rm`)
SARM head      a head on the dictionary's codes, as a SARM's is, penalised like the probe
scalar head    a head on activations as they are, at the weakest penalty of the grid: what training a scalar head to the end comes to

Every piece (size, reader, seed) is written to `data_efficiency.pieces.jsonl` as it is finished. A run that was stopped goes on behind the last one;
pieces of other pairs, activations or dictionaries are not read.
"""

import argparse
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from sarm.contracts.ids import stable_int
from sarm.contracts.manifest import MANIFEST, sha256_of
from sarm.data.formats.sae_folder import load_sae
from sarm.data.store.activations import ActivationStore
from sarm.data.store.pairs import load_pairs
from sarm.evaluate.probe import C_GRID, choose_penalty, fit_head, fit_probe
from sarm.evaluate.sparse_rm import fit_sparse_rm
from sarm.nn.sae import Sae, dense, standardise
from sarm.settings.checks import UserError

DEMO = Path("outputs/demo")
OUT = Path("outputs/bench/data_efficiency.json")
SMALLEST, SEEDS = 64, (0, 1, 2)

Array = NDArray[np.float32]
# Margins of held-out pairs by a reader fitted on some training pairs.
Reader = Callable[["Pairs", NDArray[np.intp], "Pairs", Array, int], NDArray[np.floating]]


class Pairs(NamedTuple):
    """The pairs of a split: activations and codes of each distinct response, and each pair's prompt and rows."""

    x: Array
    """What the SAE takes: standardised activations for one that is trained here."""
    h: Array
    """Activations as they are."""
    z: Array
    prompts: NDArray[np.str_]
    chosen: NDArray[np.intp]
    rejected: NDArray[np.intp]

    def difference(self, kind: str, pairs: NDArray[np.intp]) -> Array:
        """Chosen minus rejected of some pairs."""
        rows: Array = getattr(self, kind)
        return rows[self.chosen[pairs]] - rows[self.rejected[pairs]]


def by_probe(train: Pairs, own: NDArray[np.intp], heldout: Pairs, _: Array, seed: int) -> NDArray[np.floating]:
    probe = fit_probe(train.x[train.chosen[own]], train.x[train.rejected[own]], train.prompts[own], seed)
    return heldout.difference("x", np.arange(len(heldout.prompts))) @ probe.weight


def by_sparse_rm(train: Pairs, own: NDArray[np.intp], heldout: Pairs, W_dec: Array, seed: int) -> NDArray[np.floating]:
    model = fit_sparse_rm(
        chosen_ND=train.x[train.chosen[own]],
        rejected_ND=train.x[train.rejected[own]],
        difference_NS=sparse.csr_array(train.difference("z", own).astype(np.float64)),
        W_dec_SD=W_dec,
        prompt_ids_N=train.prompts[own],
        seed=seed,
    )
    return heldout.difference("x", np.arange(len(heldout.prompts))) @ model.weight


def by_codes(train: Pairs, own: NDArray[np.intp], heldout: Pairs, _: Array, seed: int) -> NDArray[np.floating]:
    z = train.difference("z", own)
    fires = np.flatnonzero(z.any(axis=0))
    if not len(fires):
        return np.zeros(len(heldout.prompts))
    scale = np.sqrt(np.square(z[:, fires]).mean())
    best, _ = choose_penalty(z[:, fires] / scale, train.prompts[own], seed)
    return heldout.difference("z", np.arange(len(heldout.prompts)))[:, fires] / scale @ fit_head(z[:, fires] / scale, best)  # fmt: skip


def by_scalar_head(train: Pairs, own: NDArray[np.intp], heldout: Pairs, _: Array, seed: int) -> NDArray[np.floating]:
    scale = np.maximum(train.h[np.concatenate([train.chosen[own], train.rejected[own]])].std(axis=0), 1e-12)
    weight = fit_head(train.difference("h", own) / scale, max(C_GRID))
    return heldout.difference("h", np.arange(len(heldout.prompts))) / scale @ weight


READERS: dict[str, Reader] = {
    "probe": by_probe,
    "SparseRM": by_sparse_rm,
    "SARM head": by_codes,
    "scalar head": by_scalar_head,
}


def sizes_of(num_pairs: int, smallest: int = SMALLEST) -> list[int]:
    """Doubling from the smallest, then all."""
    sizes = [size for n in range(32) if (size := smallest << n) < num_pairs]
    return [*sizes, num_pairs]


def subsets(prompts: NDArray[np.str_], sizes: Sequence[int], seed: int) -> list[NDArray[np.intp]]:
    """Pairs of whole prompts in a random order, as many as each size at most (at least three prompts), each a part of the next."""
    names, number = np.unique(prompts, return_inverse=True)
    rank = np.random.default_rng(seed).permutation(len(names))[number]
    counts = np.bincount(rank, minlength=len(names)).cumsum()
    return [np.flatnonzero(rank < max(3, int((counts <= size).sum()))) for size in sizes]


class Pieces:
    """Finished pieces (size, reader, seed) in a file of JSON lines, which a run that was stopped goes on with; `of` names the data that they are of."""

    def __init__(self, path: Path | None, of: str):
        self._path, self._of = path, of
        self._done: dict[tuple[int, str, int], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path is not None and path.exists() else ():
            # The last line of a run that was killed may be torn.
            with contextlib.suppress(json.JSONDecodeError):
                one = json.loads(line)
                if one["of"] == of:
                    self._done[one["pairs"], one["reader"], one["seed"]] = one

    def get(self, size: int, reader: str, seed: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The piece, made unless it is there."""
        if (found := self._done.get((size, reader, seed))) is None:
            found = {"of": self._of, "pairs": size, "reader": reader, "seed": seed, **make()}
            self._done[size, reader, seed] = found
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    # On a line of its own, also behind a torn one.
                    file.write(f"\n{json.dumps(found)}\n")
        return found


def measured(reader: Reader, train: Pairs, own: NDArray[np.intp], heldout: Pairs, W_dec: Array, seed: int) -> dict[str, Any]:  # fmt: skip
    """The held-out accuracy of one reader on one subset, None with a `reason` where there can be none."""
    started = time.perf_counter()
    accuracy, reason = None, ""
    try:
        margins = reader(train, own, heldout, W_dec, seed)
        accuracy = float(np.where(margins == 0, 0.5, margins > 0).mean())
    except UserError as error:
        reason = str(error)
    return {"accuracy": accuracy, "reason": reason, "pairs_used": len(own), "seconds": time.perf_counter() - started}


def curves(
    train: Pairs, heldout: Pairs, W_dec: Array, sizes: Sequence[int], seeds: Sequence[int], kept: Pieces | None = None
) -> list[dict[str, object]]:
    """A row for each size and reader: mean held-out accuracy over seeds, its spread, and the pairs that the subsets have."""
    kept = kept or Pieces(None, "")
    rows: list[dict[str, object]] = []
    parts = {seed: subsets(train.prompts, sizes, seed) for seed in seeds}
    for number, size in enumerate(sizes):
        # All pairs are one subset, whatever the seed.
        own_seeds = seeds if size < len(train.prompts) else seeds[:1]
        for name, reader in READERS.items():
            pieces = [
                kept.get(size, name, seed, partial(measured, reader, train, parts[seed][number], heldout, W_dec, seed))
                for seed in own_seeds
            ]
            for one in (one for one in pieces if one["accuracy"] is None):
                print(f"{name} at {size} pairs, seed {one['seed']}: {one['reason']}")
            found = [one["accuracy"] for one in pieces if one["accuracy"] is not None]
            rows.append(
                {
                    "pairs": size,
                    "reader": name,
                    "accuracy": float(np.mean(found)) if found else None,
                    "lowest": min(found, default=None),
                    "highest": max(found, default=None),
                    "seeds": len(found),
                    "pairs_used": [one["pairs_used"] for one in pieces],
                    "seconds": sum(one["seconds"] for one in pieces),
                }
            )
            shown = "n/a" if not found else f"{np.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})"
            print(f"{size:6,d} pairs  {name:12s} {shown}", flush=True)
    return rows


def load(demo: Path, split: str, folder: str, sae: Sae) -> Pairs:
    """The pairs of a split whose responses have activations."""
    pairs = load_pairs(demo / "pairs", split).select(["pair_id", "prompt_id"]).to_pylist()
    place, h = ActivationStore(demo / "activations" / folder).read_sides()
    rows = np.array([[place.get((stable_int(pair["pair_id"]), side), -1) for side in ("chosen", "rejected")] for pair in pairs])  # fmt: skip
    usable = (rows >= 0).all(axis=1)
    x = sae.rows_of(h)
    with torch.no_grad():
        z = torch.cat([dense(sae(part), sae.d_sae) for part in x.split(1024)])
    prompts = np.array([pair["prompt_id"] for pair in pairs])[usable]
    # The probe reads standardised activations, whichever the SAE takes.
    return Pairs(x=(x if sae.standardises else standardise(h)).numpy(), h=h.float().numpy(), z=z.numpy(), prompts=prompts, chosen=rows[usable, 0], rejected=rows[usable, 1])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=DEMO, help="folder of a finished chain")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--smallest", type=int, default=SMALLEST)
    asked = parser.parse_args()
    sae, _ = load_sae(asked.demo / "sae")
    if not sae.standardises:
        raise SystemExit(f"{asked.demo / 'sae'} takes activations as they are; these curves are of standardised ones.")
    train, heldout = load(asked.demo, "train", "chat", sae), load(asked.demo, "heldout", "heldout", sae)
    sizes = sizes_of(len(train.prompts), asked.smallest)
    read = ("pairs", "sae", "activations/chat", "activations/heldout")
    of = hashlib.sha256("".join(sha256_of(asked.demo / name / MANIFEST) for name in read).encode()).hexdigest()[:16]
    kept = Pieces(asked.out.with_suffix(".pieces.jsonl"), of)
    rows = curves(train, heldout, sae.W_dec.detach().numpy(), sizes, SEEDS, kept)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    counts = {"train_pairs": len(train.prompts), "heldout_pairs": len(heldout.prompts)}
    asked.out.write_text(json.dumps({"curves": rows, **counts}, indent=1))


if __name__ == "__main__":
    main()
