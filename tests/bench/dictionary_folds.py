"""The study of dictionaries on a frozen backbone: folds of prompts, dictionaries by recipe, and what each is worth on prompts it did not see.

R distinct responses, N pairs, D d_in, S d_sae.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from sarm.contracts.folders import ACTIVATIONS_FOLDER
from sarm.contracts.ids import hash_share
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import TRUE_END
from sarm.data.store.activations import ActivationStore, write_activation_file
from sarm.data.store.looked_groups import is_heldout
from sarm.data.store.pairs import load_pairs
from sarm.evaluate.intervals import difference_interval
from sarm.evaluate.probe import choose_penalty, fit_head, fit_probe
from sarm.evaluate.readability import ALWAYS_ON, DENSE, Answered, firing_share, latents_carrying, named_latents
from sarm.evaluate.sae_quality import measure, pca_fvu
from sarm.evaluate.sparse_head import fit_sparse_head
from sarm.nn.architectures import OPTIONS, build_sae
from sarm.nn.losses import reward_fidelity
from sarm.nn.sae import Sae, standardise
from sarm.passes.turn_ends import response_ids
from sarm.settings.checks import UserError
from sarm.settings.extraction import TURN_END
from sarm.settings.jobs import ExtractActivations, Pipeline
from sarm.settings.presets import PRESETS
from sarm.settings.sae import SaeSettings
from sarm.stages.plan import MORE_RESPONSES, RESPONSES
from sarm.stages.train_sae_rows import rows_of
from sarm.training.phase_shift import absorb_phase_shift_
from sarm.training.sae import SaeTraining

FOLDS = 3
# No tuning has used folds of this salt.
_SALT = "dictionaries 2026-11"
FEW_LATENTS = 20
_ROWS_AT_ONCE = 1024


class Material(NamedTuple):
    """What a preset's activations say of its training pairs."""

    root: Path
    """The run's activations."""
    rows: Tensor
    """[R, D] true ends of distinct responses, as they are stored."""
    prompts: NDArray[np.str_]
    """[R] ids."""
    texts: list[str]
    pairs: NDArray[np.int64]
    """[N, 2] rows of the chosen and the rejected response."""

    @property
    def pair_prompts(self) -> NDArray[np.str_]:
        found: NDArray[np.str_] = self.prompts[self.pairs[:, 0]]
        return found


def dictionaries() -> dict[str, SaeSettings]:
    """The compared recipes; `turn_ends` is the demo's without the reward, `random_direction` the control of `reward_aware`."""
    new, papers = PRESETS["demo"][1].sae, PRESETS["demo-papers"][1].sae
    return {
        "papers": papers,
        "papers_2304": replace(papers, d_sae=new.d_sae),
        "turn_ends": replace(new, reward_share=0.0),
        "reward_aware": new,
        "reward_aware_k14": replace(new, k=14),
        "random_direction": replace(new, reward_direction="random"),
    }


def extracted(preset: Pipeline, work: Path) -> Material:
    """Texts and pairs of the preset through the platform's own stages, for both recipes; what is there is used again."""
    from sarm.stages.chain import run_chain

    run = replace(preset.run, out=work / "run", cpus_per_worker=1, experiment="dictionaries")
    extraction = replace(preset.extraction, units=("document", TURN_END))
    # Folds are drawn here: nearly all prompts take part.
    data = replace(preset.data, heldout_share=0.01)
    config = replace(preset.part(ExtractActivations), run=run, extraction=extraction, data=data)
    run_chain(config)
    return read_material(run.out)


def read_material(out: Path) -> Material:
    """The distinct training responses of a finished extraction."""
    root = out / "activations"
    table, h_ND = ActivationStore(root / RESPONSES).read(["row_id", "doc_id", "kind"])
    ends = np.flatnonzero(np.array(table["kind"].to_pylist()) == TRUE_END)
    row_of = {row_id: place for place, row_id in enumerate(np.array(table["row_id"].to_pylist())[ends].tolist())}
    pairs = load_pairs(out / "pairs", "train")
    ids = response_ids(pairs)
    texts = [""] * len(ends)
    numbered = []
    for pair in pairs.select(["pair_id", "chosen", "rejected"]).to_pylist():
        rows = [row_of.get(row_id, -1) for row_id in ids[pair["pair_id"]]]
        if min(rows) >= 0:
            numbered.append(rows)
            for row, side in zip(rows, ("chosen", "rejected"), strict=True):
                texts[row] = pair[side]
    prompts = np.array(table["doc_id"].to_pylist())[ends]
    return Material(root, h_ND[torch.from_numpy(ends)], prompts, texts, np.array(numbered))


def fold_of(prompt: str) -> int:
    """Which fold a prompt is held out in."""
    return int(hash_share(f"{_SALT}:{prompt}") * FOLDS)


def without_fold(material: Material, fold: int, work: Path) -> dict[str, Path]:
    """Activations of all streams without the prompts of a fold."""
    places = {"text": material.root / "text", "turn ends of texts": material.root / f"text-{TURN_END}"}
    for name in ("chat", RESPONSES, MORE_RESPONSES):
        folder = work / f"fold{fold}" / name
        places[name] = folder
        if (folder / "manifest.json").exists():
            continue
        source = ActivationStore(material.root / name)
        stage = StageFolder(folder, ACTIVATIONS_FOLDER, {"fold": fold})
        stage.claim()
        num_rows = 0
        for number, path in enumerate(source.files):
            table = pq.read_table(path)
            kept = [fold_of(prompt) != fold for prompt in table["doc_id"].to_pylist()]
            part = table.filter(pa.array(kept)).replace_schema_metadata(pq.read_schema(path).metadata)
            num_rows += part.num_rows
            write_activation_file(part.combine_chunks(), folder / f"part-{number:06}.parquet")
        stage.finish({"rows": num_rows, "activations": source.metadata})
    return places


def trained(settings: SaeSettings, places: Mapping[str, Path], seed: int) -> Sae:
    """A dictionary by the platform's own loop, on this process alone."""
    if settings.recipe == "papers":
        read = {"text": places["text"], "chat": places["chat"]}
    else:
        responses = {name: places[name] for name in ("chat", RESPONSES, MORE_RESPONSES)}
        read = {**responses, "text": places["turn ends of texts"]}
    rows = rows_of(settings, read, seed, torch.device("cpu"))
    options = {name: getattr(settings, name) for name in ("architecture", "d_sae", "k", *OPTIONS)}
    sae = build_sae(d_in=rows.samples[0].shape[1], **options)
    sae.initialise_(rows.samples[0], torch.Generator().manual_seed(seed), settings.b_dec_init)
    for number, phase in enumerate(rows.phases):
        if number:
            absorb_phase_shift_(sae, rows.samples[number - 1], rows.samples[number])
        SaeTraining([sae], phase, [settings], seed + number).run([lambda *_: None])
    if rows.reward_map is not None:
        rows.reward_map.fold_(sae)
    return sae


@dataclass(frozen=True)
class Measured:
    """One dictionary on one fold. `correct` are 1 or 0 for each held-out pair, by head."""

    figures: dict[str, float]
    correct: dict[str, list[float]]
    pairs: list[int]


def measured(material: Material, sae: Sae, fold: int, seed: int) -> Measured:
    """Everything that the study asks of a dictionary, on the prompts of the fold."""
    x_RD = standardise(material.rows)
    unseen_R = np.array([fold_of(prompt) == fold for prompt in material.prompts.tolist()])
    pair_prompts_N = material.pair_prompts
    unseen_N = unseen_R[material.pairs[:, 0]]
    codes_RS, x_hat_RD = _read(sae, x_RD)
    train_N2 = material.pairs[~unseen_N]
    probe = fit_probe(
        *(x_RD[torch.from_numpy(train_N2[:, side])].numpy() for side in (0, 1)), pair_prompts_N[~unseen_N], 0
    )
    weight_D = torch.from_numpy(probe.weight)
    through_S = (sae.W_dec.detach() @ weight_D).double().numpy()
    used = np.flatnonzero(np.diff(sparse.csc_array(codes_RS).indptr))
    differences_NS = sparse.csr_array(codes_RS[material.pairs[:, 0]] - codes_RS[material.pairs[:, 1]])
    dense_NS = differences_NS[:, used].toarray().astype(np.float32)
    C, _ = choose_penalty(dense_NS[~unseen_N], pair_prompts_N[~unseen_N], 0)
    on_codes_S = fit_head(dense_NS[~unseen_N], C)
    choosing_N = np.array([is_heldout(prompt, 0.2) for prompt in pair_prompts_N[~unseen_N].tolist()])
    rewards = {
        "probe": x_RD.numpy() @ probe.weight,
        "probe_through_decoder": x_hat_RD.numpy() @ probe.weight,
        "head_on_codes": codes_RS[:, used] @ on_codes_S,
    }
    num_latents = float("nan")
    try:
        few = fit_sparse_head(differences_NS[~unseen_N], pair_prompts_N[~unseen_N], choosing_N, max_latents=FEW_LATENTS)
        rewards["few_latents"], num_latents = codes_RS @ few.weight, few.num_latents
    except UserError:
        # No head of so few latents: it knows nothing.
        rewards["few_latents"] = np.zeros(len(codes_RS))
    answered = Answered(codes_RS, material.prompts, material.texts, material.pairs)
    split = [(np.flatnonzero(~unseen_R), np.flatnonzero(unseen_R))]
    named = named_latents(answered, through_S, seed=0, splits=split)
    test_R = np.flatnonzero(unseen_R)
    contributions_RS = sparse.csr_array(codes_RS.multiply(through_S[None, :]))
    fires_RS = codes_RS != 0
    margins_NS = contributions_RS[material.pairs[unseen_N][:, 0]] - contributions_RS[material.pairs[unseen_N][:, 1]]
    unseen = torch.from_numpy(unseen_R)
    fidelity = reward_fidelity(x_RD[unseen], x_hat_RD[unseen], weight_D)
    fires_S = np.asarray(fires_RS.sum(axis=0)).ravel()
    figures = {
        "fvu": measure(sae, material.rows[unseen]).fvu,
        "fvu_trained": measure(sae, material.rows[~unseen]).fvu,
        "fvu_pca": pca_fvu(x_RD[~unseen], x_RD[unseen], sae.k),
        "alive_at_reward": float((fires_S > 0).mean()),
        "num_alive_at_reward": float((fires_S > 0).sum()),
        "reward_fidelity": fidelity,
        "always_on_share": firing_share(contributions_RS[test_R], fires_RS[test_R], ALWAYS_ON),
        "dense_share": firing_share(contributions_RS[test_R], fires_RS[test_R], np.nextafter(DENSE, 1)),
        "latents_half_margin": float(latents_carrying(margins_NS, 0.5)),
        "latents_ninety_margin": float(latents_carrying(margins_NS, 0.9)),
        "names_auc": float(np.mean([one.auc for one in named])) if named else float("nan"),
        "named": float(len(named)),
        "few_latents": num_latents,
    }
    margins = {name: reward[material.pairs[unseen_N]] for name, reward in rewards.items()}
    # A tie is half right.
    correct = {name: (0.5 + 0.5 * np.sign(m[:, 0] - m[:, 1])).tolist() for name, m in margins.items()}
    return Measured({k: float("nan") if v is None else float(v) for k, v in figures.items()}, correct, np.flatnonzero(unseen_N).tolist())  # fmt: skip


def _read(sae: Sae, x_RD: Tensor) -> tuple[sparse.csr_array, Tensor]:
    """Codes and reconstructions of standardised rows."""
    found, parts = [], []
    with torch.no_grad():
        for x_BD in x_RD.split(_ROWS_AT_ONCE):
            codes = sae(x_BD)
            parts.append(sae.decode(codes))
            row, place = codes.values.nonzero(as_tuple=True)
            values = codes.values[row, place].double().numpy()
            found.append(
                sparse.coo_array(
                    (values, (row.numpy(), codes.indices[row, place].numpy())), shape=(len(x_BD), sae.d_sae)
                )
            )
    return sparse.csr_array(sparse.vstack(found)), torch.cat(parts)


def summary(material: Material, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By dictionary: means over folds and seeds, and differences from the raw probe and from the papers' recipe with intervals by prompt."""
    names = list(dict.fromkeys(one["name"] for one in results))
    correct = {name: _by_pair(name, results, len(material.pairs)) for name in names}
    table = {}
    for name in names:
        own = [one["figures"] for one in results if one["name"] == name]
        row: dict[str, Any] = {key: float(np.nanmean([figures[key] for figures in own])) for key in own[0]}
        row["fvu_range"] = [min(figures["fvu"] for figures in own), max(figures["fvu"] for figures in own)]
        for head, right_N in correct[name].items():
            row[f"accuracy_{head}"] = float(np.nanmean(right_N))
            if head != "probe":
                row[f"{head}_minus_probe"] = _difference(material, right_N - correct[name]["probe"])
            if name != "papers" and head != "probe" and "papers" in correct:
                row[f"{head}_minus_papers"] = _difference(material, right_N - correct["papers"][head])
        table[name] = row | {"trainings": len(own)}
    return table


def _by_pair(name: str, results: Sequence[Mapping[str, Any]], num_pairs: int) -> dict[str, NDArray[np.float64]]:
    """Mean over seeds of what is right, for each pair in the fold that holds it out; NaN for pairs of folds that were not run."""
    own = [one for one in results if one["name"] == name]
    found = {}
    for head in own[0]["correct"]:
        total, number = np.zeros(num_pairs), np.zeros(num_pairs)
        for one in own:
            total[one["pairs"]] += one["correct"][head]
            number[one["pairs"]] += 1
        found[head] = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return found


def _difference(material: Material, values_N: NDArray[np.float64]) -> list[float]:
    """Mean, and its 95 % interval over prompts."""
    known = np.isfinite(values_N)
    low, high = difference_interval(values_N[known], material.pair_prompts[known])
    return [float(values_N[known].mean()), low, high]


def study(material: Material, work: Path, seeds: int, names: Sequence[str]) -> dict[str, Any]:
    """Every dictionary on every fold and seed, kept line by line, so that an interrupted study goes on."""
    log = work / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(one["name"], one["fold"], one["seed"]) for one in results}
    for seed in range(seeds):
        for fold in range(FOLDS):
            places = without_fold(material, fold, work)
            for name in names:
                if (name, fold, seed) in done:
                    continue
                sae = trained(dictionaries()[name], places, seed)
                found = measured(material, sae, fold, seed)
                one = {"name": name, "fold": fold, "seed": seed, "figures": found.figures, "correct": found.correct, "pairs": found.pairs}  # fmt: skip
                results.append(one)
                with log.open("a") as file:
                    file.write(json.dumps(one) + "\n")
                accuracies = " ".join(f"{head} {np.mean(right):.3f}" for head, right in found.correct.items())
                print(f"{name:18} fold {fold} seed {seed}  fvu {found.figures['fvu']:.3f}  names {found.figures['names_auc']:.3f}  {accuracies}", flush=True)  # fmt: skip
    return summary(material, [one for one in results if one["name"] in names and one["seed"] < seeds])
