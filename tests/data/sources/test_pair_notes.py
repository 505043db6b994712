"""What is said of pairs before a model learns from them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sarm.contracts.passes import Target
from sarm.data.sources.pair_notes import PairNotes, truncation_note
from sarm.data.sources.prepare import prepare_pairs
from sarm.settings.data import DataSettings
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings
from sarm.stages.extract import _Extraction
from sarm.stages.prepare import _told

ASKED = [{"role": "user", "content": "Hi?"}]


def notes(longer: int, shorter: int, equal: int = 0) -> PairNotes:
    found = PairNotes()
    for number, (chosen, rejected) in ((longer, ("long", "x")), (shorter, ("x", "long")), (equal, ("a", "b"))):
        for _ in range(number):
            found.add(ASKED, chosen, rejected)
    return found


@pytest.mark.parametrize(
    ("longer", "shorter", "said"),
    [
        (100, 0, "longer"),
        (0, 100, "shorter"),
        (96, 4, "longer"),
        (90, 10, None),
        (50, 50, None),
        (29, 0, None),
        (0, 0, None),
    ],
)
def test_a_length_rule_that_explains_the_labels_is_said(longer, shorter, said):
    sentences = notes(longer, shorter, equal=500).sentences()
    assert [said in sentence for sentence in sentences] == ([True] if said else [])


def test_turns_that_some_templates_refuse_are_counted():
    found = PairNotes()
    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}
    for prompt in (ASKED, [system, *ASKED], [*ASKED, *ASKED], [*ASKED, answer, *ASKED], [answer, *ASKED]):
        found.add(prompt, "a", "b")
    (sentence,) = found.sentences()
    assert sentence.startswith("1 pairs have a system turn and in 2 pairs user and assistant do not alternate")
    assert "template_refuses" in sentence


def test_preparing_says_how_many_pairs_there_are_and_what_is_odd(tmp_path, capsys):
    rows = [{"prompt": f"Number {n}?", "chosen": "A long answer.", "rejected": "No."} for n in range(60)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "x", "chosen": "y"}])
    )
    counts = prepare_pairs(DataSettings(pairs=(str(tmp_path / "a.jsonl"),)), tmp_path / "out")
    assert "notes" not in _told(dict(counts))
    said = capsys.readouterr().out
    assert "pairs: 60 of 60 prompts" in said
    assert "rejected rows: 1 no_rejected" in said
    assert "The longer answer is the chosen one in 100.0% of 60 pairs" in said


def test_most_sequences_that_are_cut_are_said():
    assert truncation_note(5, 10, 512) is None
    assert truncation_note(0, 0, 512) is None
    assert "6 of 10 sequences are longer than --model.max-length 512" in str(truncation_note(6, 10, 512))


@pytest.mark.parametrize(("truncated", "is_said"), [(60, True), (40, False)])
def test_extraction_says_when_most_sequences_are_cut(tmp_path, capsys, truncated, is_said):
    moments = [{"rows": 100, "sum": np.zeros(1), "squares": np.ones(1), "norms": 1.0}]
    counts = {"rows": 100, "truncated": truncated, "rejected": {}, "moments": moments}
    this = SimpleNamespace(name="extract", model=ModelSettings(max_length=64), extraction=ExtractionSettings())
    _Extraction._counted(this, Target("chat", 1), counts, tmp_path, SimpleNamespace())
    assert ("60 of 100 sequences are longer than --model.max-length 64" in capsys.readouterr().out) == is_said
