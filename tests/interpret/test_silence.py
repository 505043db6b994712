"""Texts whose silence is known: every active latent of the scored answers, and no other data."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sarm.contracts.folders import EVALUATION_FOLDER, PAIRS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import CONTEXT_POOL_TABLE, PAIR_SCORES_TABLE, PAIRS_TABLE
from sarm.interpret.sampling import Pool
from sarm.interpret.silence import scored_texts
from sarm.settings.checks import UserError

PROMPT = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "last"},
]
HASH = hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in PROMPT]).encode()).hexdigest()
CONTEXT = {"text_id": "p1/chosen", "prompt_hash": HASH, "text": "abcdef"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    pair = {
        "pair_id": "p1",
        "prompt_id": "q",
        "prompt": PROMPT,
        "chosen": "0123456789",
        "rejected": "no",
        "source": "s",
        "split": "heldout",
    }
    score = {"pair_id": "p1", "prompt_id": "q", "chosen_reward": 1.0, "rejected_reward": 0.0, "chosen_tokens": 3, "rejected_tokens": 2,
             "chosen_latents": [4, 7, 9], "chosen_values": [1.5, 0.0, 2.0], "rejected_latents": [7], "rejected_values": [0.5]}  # fmt: skip
    for name, kind, file, row, columns in (
        ("pairs", PAIRS_FOLDER, "part-0.parquet", pair, PAIRS_TABLE),
        ("evaluation", EVALUATION_FOLDER, "sarm_scores/part-0.parquet", score, PAIR_SCORES_TABLE),
    ):
        folder = StageFolder(tmp_path / name, kind, {})
        folder.claim()
        path = tmp_path / name / file
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row], schema=columns), path)
        folder.finish({})
    return tmp_path


def test_both_answers_with_every_latent_that_fires(run):
    chosen, rejected = scored_texts(run, [CONTEXT])
    assert (chosen["text_id"], chosen["latents"], chosen["values"]) == ("p1/chosen", [4, 9], [1.5, 2.0])
    assert (rejected["text_id"], rejected["latents"]) == ("p1/rejected", [7])
    assert chosen["prompt"] == "last"
    assert chosen["prompt_hash"] == rejected["prompt_hash"] == HASH
    # Cut as the contexts are, which keep the end.
    assert chosen["text"] == "456789"
    assert pa.Table.from_pylist([chosen, rejected], schema=CONTEXT_POOL_TABLE).num_rows == 2
    assert Pool([chosen, rejected], silence_is_known=True).silence_is_known


@pytest.mark.parametrize("context", [{**CONTEXT, "text_id": "other/chosen"}, {**CONTEXT, "prompt_hash": "0"}])
def test_contexts_of_other_data_are_refused(run, context):
    with pytest.raises(UserError, match="none of the contexts' texts"):
        scored_texts(run, [context])


def test_an_unfinished_run_is_refused(run):
    (run / "evaluation" / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        scored_texts(run, [CONTEXT])
