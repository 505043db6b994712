"""Pieces are measured once, and again where their settings changed; the page says no more than they do."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.evidence import page, pieces
from tests.evidence.claims import CLAIMS, TRAININGS
from tests.evidence.pieces import Piece
from tests.evidence.trainings import training_pieces


def counted(calls: list[str], name: str, **settings: Any) -> Piece:
    def measure(work: Path) -> dict[str, Any]:
        calls.append(name)
        return {"number": len(calls)}

    return Piece(name, settings, measure)


def test_a_piece_is_measured_once_and_again_with_other_settings(tmp_path: Path) -> None:
    calls: list[str] = []
    piece = counted(calls, "study/one", k=27, sizes=(1, 2))
    assert pieces.missing([piece], tmp_path) == [piece]
    kept = pieces.measure(piece, tmp_path, tmp_path)
    assert pieces.missing([piece], tmp_path) == []
    assert pieces.read(piece, tmp_path) == json.loads(json.dumps(kept))
    assert kept["found"] == {"number": 1}
    assert kept["command"] == "make evidence PIECES=study/one"
    changed = counted(calls, "study/one", k=14, sizes=(1, 2))
    assert pieces.missing([changed], tmp_path) == [changed], "the code has other settings now"


def test_names_choose_pieces_and_whole_folders_of_them() -> None:
    every = [counted([], name) for name in ("a/one", "a/two", "ab/one")]
    assert [p.name for p in pieces.chosen(every, ["a"])] == ["a/one", "a/two"]
    assert [p.name for p in pieces.chosen(every, ["a/two", "ab/one"])] == ["a/two", "ab/one"]
    assert pieces.chosen(every, []) == every
    with pytest.raises(ValueError, match="no piece 'b'"):
        pieces.chosen(every, ["b"])


def test_every_claim_is_decided_by_pieces_that_there_are() -> None:
    every = training_pieces()
    assert len({piece.name for piece in every}) == len(every) == 27
    for claim in CLAIMS:
        assert pieces.chosen(every, [claim.study])
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


def test_the_page_shows_what_was_measured_and_nothing_else() -> None:
    every = training_pieces()
    empty = page.rows(CLAIMS, every, {})
    assert {row.verdict for row in empty} == {"not measured"}
    kept = {}
    for number, piece in enumerate(every):
        fold, seed, recipe = (piece.settings[name] for name in ("fold", "seed", "recipe"))
        prompts = [f"{fold}-{n}" for n in range(20)]
        right = {"sarm": [1.0] * 20}
        if recipe == "ours":
            right |= {"scalar_head": [0.0] * 15 + [1.0] * 5, "random_encoder": [float(n % 2) for n in range(20)]}
        found = {"fold": fold, "seed": seed, "recipe": recipe, "pairs": prompts, "prompts": prompts, "credits": right}
        machine = {"processor": "a processor", "capability": "AVX2", "threads": 2, "torch": "2"}
        kept[piece.name] = {"found": found, "machine": machine, "seconds": 100 + number}
    made = {row.claim.name: row for row in page.rows(CLAIMS, every, kept)}
    assert made["sarm_above_scalar"].verdict == "shown"
    assert made["pretrained_above_random"].verdict == "shown"
    assert made["turn_ends_above_papers"].verdict == "not shown", "all are right with both"
    assert made["sarm_as_good_as_whole"].verdict == "not measured", "no piece has that model"
    assert made["sarm_above_scalar"].found is not None
    assert made["sarm_above_scalar"].found.prompts == 60
    text = page.page(list(made.values()), kept)
    assert "| A SARM ranks better than a scalar head on the same truncated backbone. | **shown** | +75.0 (" in text
    assert "27 of 27" in text
    assert "a processor (AVX2, 2 threads, torch 2)" in text
    assert f"`{TRAININGS}" not in text
