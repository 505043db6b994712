"""The first stages of `jobs/debias.py`: codes of answers with and without a property, the features that carry it, and accuracies under doses.

They look at the half of the prompts that features and doses are chosen on.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy import sparse

from sarm.audit.repair import Rewards, Tried, choose, tried
from sarm.audit.style_features import StyleFeatures, control_pool, most_with_controls, style_features
from sarm.contracts.figures import plain_values
from sarm.contracts.folders import DOSES_FOLDER, STYLE_CODES_FOLDER
from sarm.contracts.manifest import StageFolder, finite_or_null, write_atomically
from sarm.contracts.tables import EDITED_SCORES_TABLE, STYLE_CODES_TABLE
from sarm.contracts.untrusted import read_json
from sarm.data.formats.feature_edit import sae_identity
from sarm.data.store.blocks import table_blocks
from sarm.data.store.parts import read_parts
from sarm.data.tokens.contents import count_spelled_texts
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.passes import Pass
from sarm.engine.ray.block_actor import Output
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.completions import REQUESTS
from sarm.passes.edited_scores import Dictionary, Dose, EditedScores, StyleCodes
from sarm.passes.models import ModelSpec
from sarm.settings.checks import UserError
from sarm.settings.debias import Debias, DebiasSettings
from sarm.settings.identity import identity
from sarm.stages.completion_scores import BLOCK_PROMPTS, ids_of, requests_of
from sarm.stages.debias_dictionaries import norms_of
from sarm.stages.debias_texts import Contrast, Quad, Texts

DOSES = "doses.json"
Scores = Mapping[str, Sequence[float]]


class Job(NamedTuple):
    """What the stages of one job share."""

    session: Session
    settings: Debias
    spec: ModelSpec
    batch_tokens: int
    dictionaries: list[Dictionary]
    texts: Texts

    @property
    def out(self) -> Path:
        return self.session.run.out

    def identity(self) -> dict[str, Any]:
        """What decides which texts are read by what: contents rather than places."""
        digest = hashlib.sha256()
        for one, (prompt, text) in sorted(self.texts.by_id.items()):
            digest.update(f"{one}\x1f{prompt}\x1f{text}\x1e".encode())
        return {
            "model": self.spec.identity,
            "saes": [[one.layer, sae_identity(one.folder)] for one in self.dictionaries],
            "template": self.spec.template,
            "max_length": self.spec.max_length,
            "dtype": self.spec.dtype,
            "texts": digest.hexdigest()[:16],
            "protocol_version": PROTOCOL_VERSION,
            # By name: the texts alone do not say of which property they are.
            **({"contrasts": sorted(self.texts.contrasts)} if self.settings.contrasts else {}),
        }


def read_codes(job: Job) -> None:
    """The mean codes of all answers of the choosing half, in `codes` of the run's folder."""
    asked = job.settings.debias
    effects_at = asked.positions if "effect" in asked.ranks else None
    folder = StageFolder(job.out / "codes", STYLE_CODES_FOLDER, {**job.identity(), "effects_at": effects_at})

    def body(_: StageRun) -> Mapping[str, Any]:
        quads = [quad for contrast in job.texts.contrasts.values() for quad in contrast.half(chooses_half=True)]
        work = _pass(
            job=job,
            name="read codes",
            ids=dict.fromkeys(one for quad in quads for one in quad.ids),
            folder=folder.folder,
            actor=StyleCodes,
            arguments={"effects_at": effects_at},
            output=Output(folder.folder / "codes", STYLE_CODES_TABLE),
        )
        counts = job.session.run_pass(work)["codes"]
        spelled = count_spelled_texts(job.texts.by_id.values())
        return {
            **counts,
            **spelled,
            "figures": {"answers": counts["rows"], "rejected": sum(counts["rejected"].values())},
        }

    job.session.stage("read codes", folder, body, resume=True)


def try_doses(job: Job) -> None:
    """The features of every property, and accuracies under every dose on the choosing half, in `doses`."""
    fields = identity(job.settings.debias) | {"seed": job.session.run.seed}
    folder = StageFolder(
        job.out / "doses",
        DOSES_FOLDER,
        {**job.identity(), **fields},
        {STYLE_CODES_FOLDER: (job.out / "codes", STYLE_CODES_FOLDER)},
    )

    def body(child: StageRun) -> Mapping[str, Any]:
        codes = {row["completion_id"]: row for row in read_parts(job.out / "codes" / "codes").to_pylist()}
        norm_S = norms_of(job.dictionaries)
        found = {}
        for name, contrast in job.texts.contrasts.items():
            features = _features(contrast.half(chooses_half=True), codes, norm_S, job.settings.debias)
            found[name] = _tried_on(job, contrast, features, folder.folder / name)
        write_atomically(folder.folder / DOSES, json.dumps(finite_or_null(plain_values(found)), indent=2, allow_nan=False))  # fmt: skip
        child.log_artifact(folder.folder / DOSES)
        return {"figures": {f"candidates_{name}": len(own["candidates"]) for name, own in found.items()}}

    job.session.stage("try doses", folder, body, resume=True)


def read_doses(job: Job) -> dict[str, Any]:
    """What `try_doses` found, by property."""
    return dict(read_json(job.out / "doses" / DOSES))


def _features(
    quads: Sequence[Quad], codes: Mapping[str, Mapping[str, Any]], norm_S: np.ndarray, asked: DebiasSettings
) -> dict[str, StyleFeatures]:
    """Features by each order, from the two versions of the chosen answer and of the rejected one, of all pairs whose four texts could be read."""
    # One answer may be in several pairs.
    versions = {
        quad.ids[side : side + 2]: quad.prompt_id
        for quad in quads
        for side in (0, 2)
        if all(one in codes for one in quad.ids[side : side + 2])
    }
    if not versions:
        raise UserError("no answer could be read in both versions. Look at the reasons in codes/manifest.json.")
    plain, styled = ([both[place] for both in versions] for place in (0, 1))
    columns = {"strength": ("means", norm_S), "effect": ("effects", np.ones_like(norm_S))}
    return {
        rank: style_features(
            plain_TS=_matrix(plain, codes, name, len(norm_S)),
            styled_TS=_matrix(styled, codes, name, len(norm_S)),
            shares_TS=_matrix([*plain, *styled], codes, "shares", len(norm_S)),
            prompts_T=np.array(list(versions.values())),
            norm_S=scale_S,
            min_stability=asked.min_stability,
        )
        for rank, (name, scale_S) in columns.items()
        # How often and how strongly latents fire is told by their codes, whichever order is asked for.
        if rank == "strength" or rank in asked.ranks
    }


def _matrix(ids: Sequence[str], codes: Mapping[str, Mapping[str, Any]], name: str, width: int) -> sparse.csr_array:
    lengths = [len(codes[one]["latents"]) for one in ids]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    values, latents = (np.concatenate([np.asarray(codes[one][key], float) for one in ids]) for key in (name, "latents"))
    return sparse.csr_array((values, latents.astype(np.int64), starts), shape=(len(ids), width))


def _tried_on(job: Job, contrast: Contrast, features: Mapping[str, StyleFeatures], folder: Path) -> dict[str, Any]:
    asked, quads = job.settings.debias, contrast.half(chooses_half=True)
    doses, ranks = [Dose()], [""]
    known = features["strength"]
    candidates = sorted({latent for rank in asked.ranks for latent in features[rank].latent.tolist()})
    numbers = _with_controls(contrast.own.name, asked, known, candidates)
    for rank in asked.ranks:
        latents = features[rank].latent.tolist()
        own = [Dose(tuple(latents[:number]), share) for number in numbers if number <= len(latents) for share in asked.strengths]  # fmt: skip
        say(f"{contrast.own.name}: {len(latents)} features by {rank}, {len(own)} doses are tried")
        doses, ranks = [*doses, *own], [*ranks, *[rank] * len(own)]
    scores = score_doses(job, f"doses of {contrast.own.name}", doses, [one for quad in quads for one in quad.ids], folder)  # fmt: skip
    by_dose = [
        tried(len(dose.latents), dose.share, rewards_of(quads, scores, place), ranks[place])
        for place, dose in enumerate(doses)
    ]
    chosen: Tried | None = choose(by_dose[0], by_dose[1:], asked.max_cost, contrast.own.spared)
    return {
        "num_candidates": {rank: len(features[rank].latent) for rank in asked.ranks},
        "num_prompts": known.num_prompts,
        "num_pairs": len(quads),
        "left_out": contrast.left_out,
        "differ_in_more": contrast.differ_in_more,
        "spared": contrast.own.spared,
        "features": {rank: _listed(job.dictionaries, features[rank], max(asked.features)) for rank in asked.ranks},
        "candidates": candidates,
        "plain": by_dose[0]._asdict(),
        "doses": [dose._asdict() for dose in by_dose[1:]],
        "chosen": None if chosen is None else chosen._asdict(),
        "density": known.density.tolist(),
        "size": known.size.tolist(),
    }


def _with_controls(name: str, asked: DebiasSettings, known: StyleFeatures, candidates: Sequence[int]) -> list[int]:
    """The numbers of features that leave enough others to compare them with. Raises UserError if none does: nothing could be reported of a dose."""
    most = most_with_controls(control_pool(known.density, np.array(candidates, np.int64)))
    numbers = [number for number in asked.features if number <= most]
    if not numbers:
        raise UserError(f"{name}: {len(candidates)} of the latents that fire carry it, and the others are too few to compare {min(asked.features)} features with. Pass a larger SAE, or a larger --debias.min-stability.")  # fmt: skip
    if left := [number for number in asked.features if number > most]:
        say(f"{name}: not tried are {', '.join(map(str, left))} features, as too few others fire to compare so many with")  # fmt: skip
    return numbers


def _listed(dictionaries: Sequence[Dictionary], features: StyleFeatures, most: int) -> list[dict[str, Any]]:
    """The first features of an order, with where they are."""
    rows = zip(features.latent.tolist(), features.strength.tolist(), features.stability.tolist(), strict=True)
    return [
        {**place_of(dictionaries, latent), "joint": latent, "strength": strength, "stability": stability}
        for latent, strength, stability in itertools.islice(rows, most)
    ]


def place_of(dictionaries: Sequence[Dictionary], joint: int) -> dict[str, int]:
    """The layer and the number in its own dictionary of a latent that is numbered through."""
    own = max((one for one in dictionaries if one.first <= joint), key=lambda one: one.first)
    return {"layer": own.layer, "latent": joint - own.first}


def rewards_of(quads: Sequence[Quad], scores: Scores, place: int) -> Rewards:
    """The rewards under dose number `place` of all pairs whose four texts have one under every dose. Raises UserError if there is no such pair."""
    kept = [quad for quad in quads if all(np.isfinite(scores.get(one, [np.nan])).all() for one in quad.ids)]
    if not kept:
        raise UserError(f"none of {len(quads)} pairs has a reward for all four of its texts. Look at the reasons of the rejected rows, and pass a larger --max-length or other --pairs.")  # fmt: skip
    rewards = np.array([[scores[one][place] for one in quad.ids] for quad in kept], float).reshape(-1, 4)
    return Rewards(rewards, np.array([quad.prompt_id for quad in kept]))


def score_doses(job: Job, name: str, doses: Sequence[Dose], ids: Sequence[str], folder: Path) -> Scores:
    """The scores of these completions under every dose, in their order; what a run that was killed has left in `folder` is gone on with."""
    work = _pass(
        job=job,
        name=name,
        ids=dict.fromkeys(ids),
        folder=folder,
        actor=EditedScores,
        arguments={"doses": list(doses), "positions": job.settings.debias.positions},
        output=Output(folder / "scores", EDITED_SCORES_TABLE),
    )
    job.session.run_pass(work)
    table: pa.Table = read_parts(folder / "scores")
    scored = zip(table["completion_id"].to_pylist(), table["scores"].to_pylist(), strict=True)
    return {one: [np.nan if score is None else score for score in own] for one, own in scored}


def _pass(
    job: Job,
    name: str,
    ids: Mapping[str, None],
    folder: Path,
    actor: Any,
    arguments: Mapping[str, Any],
    output: Output,
) -> Pass:
    wanted = [(*job.texts.by_id[one], one) for one in ids]
    shared = {"spec": job.spec, "batch_tokens": job.batch_tokens, "dictionaries": job.dictionaries}
    return Pass(
        name=name,
        blocks=table_blocks(requests_of(wanted), folder / "requests.parquet", BLOCK_PROMPTS),
        columns=REQUESTS.names,
        keep=None,
        actor=actor,
        arguments={**shared, **arguments},
        outputs={output.folder.name: output},
        id_columns=("ids",),
        input_ids=ids_of,
        output_id="completion_id",
    )
