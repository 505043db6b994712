"""Benchmarks beside the prompts that a model was trained on, and a report's word on it."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from sarm.contracts.folders import PAIRS_FOLDER, SARM_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import PAIR_SCORES_TABLE
from sarm.data.sources.prepare import prepare_pairs
from sarm.evaluate.benchmarks.sources import Loaded, load_benchmark, parse_source
from sarm.evaluate.benchmarks.suite import measure
from sarm.passes.models import ModelSpec
from sarm.settings.data import DataSettings
from sarm.stages.benchmark import _near_duplicates
from sarm.stages.benchmark_overlap import overlap, training_prompts
from sarm.stages.benchmark_scoring import Scores, items_table, make_items
from sarm.stages.evaluate import without_near_duplicates
from sarm.stages.report_notes import near_duplicates as held_out_note

QUESTION = "Could you tell me, please, what the best way is to reach the town of number {}?"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with pairs, and a model that was trained on them."""
    rows = [{"prompt": QUESTION.format(i * 7919), "chosen": "Yes.", "rejected": "No."} for i in range(40)]
    rows += [{"prompt": f"{word} " * 20, "chosen": "Yes.", "rejected": "No."} for word in ("quartz", "basil", "heron")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    pairs = StageFolder(out / "pairs", PAIRS_FOLDER, {})
    pairs.claim()
    pairs.finish(prepare_pairs(DataSettings(pairs=(str(tmp_path / "pairs.jsonl"),), heldout_share=0.2), pairs.folder))
    model = StageFolder(out / "sarm", SARM_FOLDER, {}, {PAIRS_FOLDER: (pairs.folder, PAIRS_FOLDER)})
    model.claim()
    (model.folder / "config.json").write_text("{}")
    model.finish({})
    return out


def spec_of(place: Path, kind: str = "sarm") -> ModelSpec:
    return ModelSpec(kind, str(place), "", "", "sarm", 64, "float32")


def test_training_prompts_are_known_beside_the_run_and_unknown_elsewhere(run, tmp_path):
    found = training_prompts(spec_of(run / "sarm"))
    assert found.folder == run / "pairs"
    shutil.copytree(run / "sarm", tmp_path / "away" / "sarm")
    assert training_prompts(spec_of(tmp_path / "away" / "sarm")) is None
    assert training_prompts(spec_of(run / "sarm", "classifier")) is None
    shutil.copytree(run / "sarm", run / "cells" / "cell" / "sarm")
    assert training_prompts(spec_of(run / "cells" / "cell" / "sarm")) == found, "a sweep's cells share its pairs"


def test_pairs_that_the_model_was_not_trained_on_say_nothing_about_it(run):
    manifest = run / "pairs" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{", "{ ", 1))
    assert training_prompts(spec_of(run / "sarm")) is None


def loaded(tmp_path: Path) -> Loaded:
    """Ten rows: six ask what training asked, in other spellings or nearly; the model gets only those right."""
    asked = [QUESTION.format(i * 7919).upper() + " " for i in range(3)]
    asked += [QUESTION.format(i * 7919 + 1) for i in range(3)]
    asked += ["Name a river.", "Is glass a liquid?", "What do owls eat at night?", "How long is a fathom?"]
    rows = [{"prompt": q, "chosen": f"good {i}", "rejected": f"bad {i}"} for i, q in enumerate(asked)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_benchmark(parse_source(f"pairs={tmp_path / 'own.jsonl'}"), None, False)


def test_rows_near_training_prompts_are_counted_and_the_figures_without_them_given(run, tmp_path):
    benchmark = loaded(tmp_path)
    items, texts = make_items([benchmark], (), 0)
    right = {key: (text.startswith("good")) == (int(text.split()[1]) < 6) for key, (_, text) in texts.items()}
    scored = {key: {"score": float(value), "num_tokens": 3, "was_truncated": False} for key, value in right.items()}
    table = items_table(items, Scores(scored, 0, len(scored), 0, 0.0))
    assert measure(table, 0)["benchmarks"]["pairs"]["figures"]["overall"]["value"] == pytest.approx(0.6)
    found = overlap(training_prompts(spec_of(run / "sarm")), [benchmark], table, 0)["pairs"]
    assert (found["rows"], found["of_rows"], found["prompts"], found["of_prompts"]) == (6, 10, 6, 10)
    assert found["without"]["overall"]["value"] == 0.0
    assert found["without"]["overall"]["num_rows"] == 4
    said = _near_duplicates("pairs", found)
    assert (
        f"6 of 10 prompts (6 of 10 rows) are near-duplicates of one of the {found['training_prompts']} training" in said
    )
    assert "Without them: overall 0.0 %" in said


def test_a_model_that_was_copied_away_is_said_to_be_unknown(tmp_path):
    benchmark = loaded(tmp_path)
    found = overlap(None, [benchmark], pa.table({}), 0)
    assert found == {"pairs": {"training_prompts": None}}
    assert "is unknown" in _near_duplicates("pairs", found["pairs"])


def test_a_benchmark_in_other_spelling_is_another_benchmark(tmp_path):
    """Its digest decides whether a finished evaluation stands; ids of prompts do not tell spellings apart, models do."""
    digests = []
    for question in ("Name a river.", "NAME A RIVER."):
        (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": question, "chosen": "a", "rejected": "b"}) + "\n")
        digests.append(load_benchmark(parse_source(f"pairs={tmp_path / 'own.jsonl'}"), None, False).digest)
    assert digests[0] != digests[1]


def held_out_scores(run: Path, near_right: bool) -> pa.Table:
    """Pairs of the near-duplicate prompts are right or wrong, all others the opposite."""
    near = json.loads((run / "pairs" / "near_duplicates.json").read_text())["prompts"]
    prompts = [*near, "other 1", "other 2"]
    rows = [
        {
            "pair_id": str(i), "prompt_id": prompt, "subset": None, "rejected_reward": 0.0,
            "chosen_reward": 1.0 if (prompt in near) == near_right else -1.0,
            "chosen_tokens": 2, "rejected_tokens": 2,
        }
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=PAIR_SCORES_TABLE)


def test_held_out_accuracy_is_also_given_without_near_duplicates(run):
    scores = {"sarm": held_out_scores(run, True), "scalar_head": held_out_scores(run, False)}
    found = without_near_duplicates(scores, run / "pairs")
    near = found["prompts"]
    assert near == found["pairs"] > 2
    assert (found["of_prompts"], found["of_pairs"]) == (near + 2, near + 2)
    assert [found["without"][name]["accuracy"] for name in scores] == [0.0, 1.0]
    assert found["without"]["sarm"]["num_pairs"] == 2
    said = held_out_note({"near_duplicates": found})
    assert f"{near} of {near + 2} held-out prompts" in said
    assert "SARM 0.000" in said
    (run / "pairs" / "near_duplicates.json").unlink()
    assert without_near_duplicates(scores, run / "pairs") is None
    assert "is unknown" in held_out_note({"near_duplicates": None})
