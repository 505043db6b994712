"""What latents add to a reward to first order, against the rewards of edited models; and that a SARM read row by row is the SARM that shares prompts."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tests.passes.attached import D_SAE, random_sae
from tests.passes.foreign_checkpoints import COMPLETIONS, LAYOUTS, PROMPT, checkpoint
from tests.stages.random_sarm import random_sarm

from sarm.data.formats.sae_folder import save_sae
from sarm.nn.splice import LatentEdit, Splice, edited
from sarm.passes.completions import REQUESTS
from sarm.passes.edited_scores import Dictionary, StyleCodes
from sarm.passes.models import ModelSpec, find_model
from sarm.passes.row_scorer import TorchScorer
from sarm.passes.scorers import load_scorer
from sarm.passes.scoring import Request
from sarm.settings.benchmarks import Benchmarking

STEP = 5e-4


@pytest.fixture(scope="module", params=["transformers", "armo", "sarm"])
def spec(request, tiny_folder, tiny_chat, tmp_path_factory) -> ModelSpec:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sarm":
        random_sarm(folder, tiny_folder, tiny_chat, layer=2)
    else:
        checkpoint(folder, tiny_folder, LAYOUTS[request.param])
    return find_model(Benchmarking(model=str(folder), benchmarks=("pairs=x",)))


def saved(folder: Path, *, standardises: bool) -> Path:
    sae = random_sae()
    sae.standardises = standardises
    folder.mkdir()
    save_sae(sae, folder, {})
    return folder


def codes_of(spec: ModelSpec, dictionaries: list[Dictionary], effects_at: Any) -> list[dict[str, Any]]:
    rows = [{"prompt": json.dumps(PROMPT), "completions": COMPLETIONS, "ids": ["a", "b", "c"], "alone": False}]
    worker = StyleCodes(spec, 256, dictionaries, effects_at, torch.get_num_threads())
    tables, _ = worker.compute(worker.prepare(pa.Table.from_pylist(rows, schema=REQUESTS)), lambda: None)
    return tables["codes"].to_pylist()


@pytest.mark.parametrize("positions", ["answer", "rewarded"])
@pytest.mark.parametrize("standardises", [True, False])
def test_effects_are_the_slopes_of_the_reward_by_each_latent_s_factor(spec, positions, standardises, tmp_path):
    """Central differences of the rewards of the model whose latent is scaled a little up and a little down at these tokens."""
    if spec.kind == "sarm" and not standardises:
        pytest.skip("the reward of a SARM jumps where its own TopK changes, and here a step crosses such a place")
    dictionary = Dictionary(saved(tmp_path / "sae", standardises=standardises), 1, 0)
    rows = codes_of(spec, [dictionary], positions)
    scorer, sae = TorchScorer(spec, 256), random_sae()
    sae.standardises = standardises
    largest = max(abs(effect) for row in rows for effect in row["effects"])
    assert largest > 0.01
    latents = sorted({latent for row in rows for latent in row["latents"]})
    for latent in latents[::4]:
        high, low = (
            rewards(scorer, Splice(sae, 1, [LatentEdit(latent, "scale", factor)]), positions)
            for factor in (1 + STEP, 1 - STEP)
        )
        for n, row in enumerate(rows):
            effect = dict(zip(row["latents"], row["effects"], strict=True)).get(latent, 0.0)
            assert effect == pytest.approx((high[n] - low[n]) / (2 * STEP), rel=0.01, abs=2e-3 * largest)


@torch.no_grad()
def rewards(scorer: TorchScorer, splice: Splice, positions: str) -> list[float]:
    """Of each completion alone, with the splice at these tokens; a SARM's own scorer edits all tokens."""
    found = []
    for text in COMPLETIONS:
        asked = [Request(PROMPT, [text], alone=False)]
        sequences = scorer.encode(asked)
        (batch,) = scorer._batches(asked, sequences)
        inputs = scorer._inputs(batch, sequences)
        places = scorer._answers(batch, sequences, inputs["attention_mask"])
        places[:, : -1 if positions == "rewarded" else 0] = False
        with edited(scorer._body, [splice], places):
            found.append(float(scorer._rewards(**inputs)))
    return found


def test_codes_are_the_same_with_effects_and_without_and_a_lower_layer_counts_what_it_does_through_a_higher_one(spec, tmp_path):  # fmt: skip
    folder = saved(tmp_path / "sae", standardises=True)
    both = [Dictionary(folder, 1, 0), Dictionary(folder, 2, D_SAE)]
    plain, with_effects, alone = (codes_of(spec, own, at) for own, at in ((both, None), (both, "answer"), (both[:1], "answer")))  # fmt: skip
    for one, other, first in zip(plain, with_effects, alone, strict=True):
        assert one["effects"] == []
        assert one["latents"] == other["latents"]
        assert one["means"] == pytest.approx(other["means"], abs=1e-4)
        assert len(other["effects"]) == len(other["latents"]) > len(first["latents"])
        assert other["effects"][: len(first["effects"])] == pytest.approx(first["effects"], abs=1e-4)


def test_a_sarm_read_row_by_row_is_the_sarm_that_shares_prompts(tiny_folder, tiny_chat, tmp_path):
    """`jobs/debias.py` reads it in the one way, `jobs/evaluate.py` in the other."""
    random_sarm(tmp_path, tiny_folder, tiny_chat, layer=2)
    for length in (None, 24):
        spec = find_model(Benchmarking(model=str(tmp_path), benchmarks=("pairs=x",), max_length=length))
        asked = [Request(PROMPT, COMPLETIONS, alone=False)]
        found = [[one.score for one in score(asked)[0][0]] for score in (load_scorer(spec, 256), TorchScorer(spec, 256))]  # fmt: skip
        assert found[0] == pytest.approx(found[1], abs=1e-4), length
