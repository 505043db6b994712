"""Where the contrast pairs of `jobs/debias.py` come from: rules, a file of one's own, paraphrases that a model wrote; what is left out, and refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.engine.judge_server import JudgeServer

from sarm.contracts.folders import PAIRS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import PAIRS_TABLE
from sarm.settings.checks import UserError
from sarm.settings.debias import Debias, DebiasSettings
from sarm.settings.judging import Judging
from sarm.stages.debias_paraphrases import written_paraphrases
from sarm.stages.debias_texts import texts_of

NUM = 24


def line(number: int, **changed: Any) -> str:
    texts = {"chosen": [f"Good {number}.", f"**Good {number}.**"], "rejected": [f"Bad {number}.", f"**Bad {number}.**"]}
    return json.dumps({"prompt": f"Question {number}?", **texts, **changed})


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(line(number) for number in range(NUM)) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {
            "pair_id": f"p{number}",
            "prompt_id": f"q{number}",
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "chosen": f"The {number} walls are old; the roof is new. You do not need {number} more.",
            "rejected": f"You cannot have {number}. Perhaps it is late.",
            "source": "made",
            "split": "heldout",
        }
        for number in range(NUM)
    ]
    stage = StageFolder(folder, PAIRS_FOLDER, {})
    stage.write(lambda: pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS_TABLE), folder / "part-0.parquet"))
    return folder


def settings_of(pairs: Path, *properties: str, as_given: bool = False, **options: Any) -> Debias:
    asked = DebiasSettings(properties=properties or ("markdown",), as_given=as_given)
    return Debias(model="model", sae=(Path("sae"),), pairs=(str(pairs),), debias=asked, **options)


def test_injections_and_paraphrases_are_made_of_any_pairs_by_rule(pairs):
    texts = texts_of(settings_of(pairs, "injection", "paraphrase"))
    for contrast in texts.contrasts.values():
        assert (len(contrast.quads), contrast.left_out) == (NUM, 0)
    said = {text for _, text in texts.by_id.values()}
    assert "The roof is new; the 3 walls are old. You don't need 3 more." in said
    assert any(text.endswith("Score: 10/10.") for text in said)


def test_pairs_of_ones_own_take_the_place_of_the_rule_and_stand_beside_other_properties(pairs, lines):
    texts = texts_of(settings_of(pairs, "markdown", "injection", contrasts=(f"markdown={lines}",)))
    assert list(texts.contrasts) == ["markdown", "injection"]
    own = texts.contrasts["markdown"]
    assert (len(own.quads), own.left_out, own.differ_in_more) == (NUM, 0, 0)
    prompt, text = texts.by_id[own.quads[0].ids[1]]
    assert text == "**Good 0.**"
    assert json.loads(prompt)[0][-1] == "Question 0?"
    beside = texts_of(settings_of(pairs, contrasts=(f"tone={lines}",), as_given=True))
    assert list(beside.contrasts) == ["markdown", "tone"]


def test_pairs_that_differ_in_more_than_the_property_are_left_out_and_counted_or_taken_as_given(pairs, lines):
    with lines.open("a") as file:
        file.write(line(97, chosen=["Good.", "**Better.**"]) + "\n\n" + line(98, rejected=["Bad.", "Bad."]) + "\n")
    own = texts_of(settings_of(pairs, contrasts=(f"markdown={lines}",))).contrasts["markdown"]
    assert (len(own.quads), own.left_out, own.differ_in_more) == (NUM, 2, 0)
    given = texts_of(settings_of(pairs, contrasts=(f"markdown={lines}",), as_given=True)).contrasts["markdown"]
    assert (len(given.quads), given.left_out, given.differ_in_more) == (NUM + 1, 1, 1)


def test_a_property_without_a_rule_is_taken_as_given_and_counted_so(pairs, lines):
    with pytest.raises(UserError, match="no rule says what flattery is"):
        settings_of(pairs, contrasts=(f"flattery={lines}",))
    own = texts_of(settings_of(pairs, contrasts=(f"flattery={lines}",), as_given=True)).contrasts["flattery"]
    assert (len(own.quads), own.differ_in_more) == (NUM, NUM)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no pair"),
        (line(0, chosen=["Good.", "**Better.**"]), r"line 1, chosen: the texts differ in more than markdown: 'Good.' against 'Better.' at word 1"),
        (line(0, rejected=["Bad.", "Bad."]), "line 1, rejected: both texts are the same"),
        (line(0, rejected=["Bad."]), "line 1: rejected is .*Write a `prompt`"),
        ('{"prompt": "a"}', "line 1: 'chosen' is missing"),
        (line(0, prompt=[{"role": "user"}]), "line 1: its prompt is no conversation"),
        ("{", "line 1: "),
        (line(0), "the choosing half has|the reporting half has"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_such_pairs_is_refused_in_one_line(content, said, pairs, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as error:
        texts_of(settings_of(pairs, contrasts=(f"markdown={path}",)))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        texts_of(settings_of(pairs, contrasts=(f"markdown={tmp_path / 'nothing'}",)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contrasts": ("markdown",)}, "contrasts are PROPERTY=FILE"),
        ({"contrasts": ("Mark Down=a",)}, "contrasts are PROPERTY=FILE"),
        ({"contrasts": ("tone=a", "tone=b")}, "are given twice"),
        ({"judging": Judging(judges=("m@http://localhost:1/v1",))}, "none are asked for"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, said, pairs):
    with pytest.raises(UserError, match=said):
        settings_of(pairs, **options)


def test_a_model_writes_paraphrases_and_those_that_lose_a_number_are_left_out(pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def answer(messages: list[dict[str, str]]) -> str:
        text = messages[-1]["content"].partition("<text>\n")[2].partition("\n</text>")[0]
        if text.startswith("You cannot have 5."):
            return "I will not do that."
        return json.dumps({"text": text.replace("You", "One") if " 7" not in text else "Something else altogether."})

    with JudgeServer(answer).serving() as server:
        settings = settings_of(pairs, "paraphrase", judging=Judging(judges=(f"m@{server.url}",)))
        written = written_paraphrases(settings, backoff=0.01)
        asked = server.asked
        assert written_paraphrases(settings, backoff=0.01) == written
        assert server.asked == asked, "an answer was paid for twice"
    assert len(written) == 2 * NUM - 1
    own = texts_of(settings, written).contrasts["paraphrase"]
    assert own.own.title == "a paraphrase that a model wrote"
    assert (len(own.quads), own.left_out) == (NUM - 2, 2)
