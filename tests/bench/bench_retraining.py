"""Poison by full retraining: the demo's SARM trained anew, blocks included, on its pairs with some labels flipped by features and by controls.

Reads a finished demo (`make demo`) and the audit of it that `make bench BENCH=audit` leaves. What is trained and scored stays in
outputs/bench/retraining, so that the same command goes on after a stop. A training takes minutes on 2 cores, one for each method and seed.
Settings are the demo's: the head starts at a probe of the relabelled pairs, whose chat ends are extracted anew. The dictionary, which saw
no labels, is the demo's.

    make bench BENCH=retraining

Two processes of one core each do more than one of two; `--pieces` names what one does, none to make the relabelled pairs alone:

    OMP_NUM_THREADS=1 python tests/bench/bench_retraining.py --cpus-per-worker 1 --pieces features-0 loss-0
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from bench_audit import DEMO, asked
from bench_audit import OUT as AUDIT

from sarm.audit.pairs import ROLES, audit_pairs
from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.data.tokens.groups import prompt_groups
from sarm.data.tokens.packing import token_batches
from sarm.engine.session import open_session
from sarm.evaluate.intervals import difference_interval
from sarm.evaluate.statistics import pair_credit
from sarm.settings.audit import Relabel
from sarm.settings.presets import PRESETS
from sarm.settings.run import RunSettings
from sarm.stages.extract import extract
from sarm.stages.relabel import relabel, relabelled
from sarm.stages.train_sarm import train_sarm

OUT = Path("outputs/bench/retraining").absolute()
# SAFER's score (and the better site of the features in the head-only study), the best control there, and the one that knows nothing.
METHODS = {"features": "features, sentence ends", "loss": "loss", "random": "random"}
CONTROLS = ("loss", "random")
CLEAN, SHARE = "unchanged", 0.05
_BATCH_TOKENS = 4096


def main() -> None:
    """Train what is not trained yet, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--cpus-per-worker", type=int, default=0, help="cores of a training; 0: all")
    parser.add_argument("--pieces", nargs="*", help="do these trainings (METHOD-SEED) alone, and compare nothing")
    arguments = parser.parse_args()
    run = RunSettings(out=AUDIT)
    with open_session(asked()) as session:
        for method in METHODS.values():
            relabel(session, Relabel(run=run, write=f"poison:{method}:{SHARE}", pairs=DEMO / "pairs"))
    settings = asked()
    limits = {"select": settings.limit, "target": settings.limit, "off_target": settings.limit_off_target}
    pairs = audit_pairs({role: getattr(settings, role) for role in ROLES}, limits)
    is_scored = np.array([role != "select" for role in pairs["role"].to_pylist()])
    pairs = pairs.filter(pa.array(is_scored))
    wanted = [f"{method}-{seed}" for seed in arguments.seeds for method in (CLEAN, *METHODS)]
    credits: dict[str, list[np.ndarray]] = {}
    for piece in wanted if arguments.pieces is None else arguments.pieces:
        method, _, seed = piece.rpartition("-")
        credits.setdefault(method, []).append(credit_of(train(method, int(seed), arguments.cpus_per_worker), pairs))
    if arguments.pieces is not None:
        return
    means = {name: np.mean(found, axis=0) for name, found in credits.items()}
    figures = compared(means, pairs) | {"seeds": arguments.seeds}
    (OUT.parent / "retraining.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


def train(method: str, seed: int, cpus: int) -> Path:
    """The model that one method's labels gave: the demo's stages from extraction on, over its own dictionary."""
    out, demo = OUT / f"{method}-{seed}", PRESETS["demo"][1]
    source = DEMO if method == CLEAN else relabelled(AUDIT, f"poison:{METHODS[method]}:{SHARE}")
    # Seeds differ in the order of pairs alone; the residuals of the same labels are there after the first.
    extracted = DEMO if method == CLEAN else OUT / f"{method}-0"
    for name, place in {
        "sae": DEMO / "sae",
        "pairs": source / "pairs",
        "activations": extracted / "activations",
    }.items():
        if place.exists() and not (out / name).exists():
            shutil.copytree(place, out / name)
    config = replace(
        demo, run=RunSettings(out=out, seed=seed, cpus_per_worker=cpus), reward=replace(demo.reward, baselines=())
    )
    with open_session(config) as session:
        extract(session, config.model, config.extraction)
        train_sarm(session, config.model, config.reward)
    return out / "sarm"


def credit_of(folder: Path, pairs: pa.Table) -> np.ndarray:
    """1 for each pair in the right order."""
    # Beside the folder, which belongs to its stage.
    known = folder.parent / "credit.npy"
    if known.exists():
        return np.load(known)
    model, chat = load_sarm(folder), load_chat_tokenizer(PRESETS["demo"][1].model, folder)
    groups = list(prompt_groups(pairs, chat))
    rewards: dict[Any, float] = {}
    rows = [row for group in groups for row in group.rows(PRESETS["demo"][1].model.max_length)]
    for batch in token_batches(rows, _BATCH_TOKENS, chat.pad_id):
        with torch.inference_mode():
            rewards.update(zip(batch.keys, model(**batch.model_inputs("cpu")).logits.squeeze(-1).tolist(), strict=True))
    margin = {
        pair.pair_id: rewards[group.prompt_id, pair.chosen] - rewards[group.prompt_id, pair.rejected]
        for group in groups for pair in group.pairs
    }  # fmt: skip
    credit_N = pair_credit(np.array([margin[pair_id] for pair_id in pairs["pair_id"].to_pylist()]))
    np.save(known, credit_N)
    return credit_N


def compared(credit: dict[str, np.ndarray], pairs: pa.Table) -> dict[str, Any]:
    """Accuracy of every method on the target and on each off-target subset, and its change, with intervals over prompts."""
    roles, subsets = np.array(pairs["role"].to_pylist()), np.array(pairs["subset"].to_pylist())
    prompts = np.array(pairs["prompt_id"].to_pylist())
    places = {"target": roles == "target"}
    places |= {f"off target, {name}": (roles == "off_target") & (subsets == name) for name in sorted(set(subsets[roles == "off_target"]))}  # fmt: skip
    found: dict[str, Any] = {}
    for place, is_in in places.items():
        rows = {}
        for method, own_N in credit.items():
            rows[method] = {"accuracy": float(own_N[is_in].mean())}
            for other in (CLEAN, *CONTROLS) if method == "features" else (CLEAN,):
                if other != method:
                    rows[method][f"minus_{other}"] = _difference((own_N - credit[other])[is_in], prompts[is_in])
        found[place] = rows
    return found


def _difference(gap_N: np.ndarray, prompts: Sequence[Any]) -> list[float]:
    return [float(gap_N.mean()), *difference_interval(gap_N, np.array(prompts))]


if __name__ == "__main__":
    main()
