"""Pairs that a chat template refuses: left out of extraction and scoring alike, by the same word. No cluster: what actors compute."""

from pathlib import Path

import pyarrow as pa
import pytest
from tests.data.tokens.test_groups import pair
from transformers import AutoTokenizer

from sarm.contracts.passes import Target
from sarm.contracts.tables import CONVERSATIONS_TABLE, PAIRS_TABLE, activations_table
from sarm.data.formats.sarm_folder import save_sarm
from sarm.data.sources.tiny import CHAT_TEMPLATE
from sarm.data.store.parts import finished_table
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.passes.activations import ChatActivations, TextActivations
from sarm.passes.pair_scores import PairScores
from sarm.passes.reader import Reader
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHAT_TEMPLATE
)
MODEL = ModelSettings(name="tiny:llama", layer=1, max_length=128)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model under a template without system turns."""
    found = tmp_path_factory.mktemp("model")
    for path in tiny_folder.iterdir():
        if path.is_file() and path.name != "chat_template.jinja":
            (found / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(found)
    return found


def table() -> pa.Table:
    refused = pair("r", "a", "b")
    refused["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    return pa.Table.from_pylist([pair("p <|im_end|>", "a", "b"), refused], schema=PAIRS_TABLE)


def test_extraction_and_scoring_leave_out_the_same_pairs_by_the_same_word(folder: Path, tmp_path: Path) -> None:
    target, activations = Target("chat", 1), activations_table(64, {"dtype": "float16"})
    extract = ChatActivations(MODEL, str(folder), ExtractionSettings(), {target: activations}, 1)
    tables, cost = extract.compute(extract.prepare(table()), lambda: None)
    assert tables[target]["reject"].to_pylist() == [None, None, "template_refuses", "template_refuses"]
    assert finished_table(tables[target], activations).num_rows == 2
    assert (cost.contents_with_control_tokens, cost.contents_already_templated) == (1, 0)

    chat = load_chat_tokenizer(MODEL, folder)
    backbone = load_backbone(str(folder), 1)
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=1, head="scalar", end_of_turn_id=chat.end_of_turn_id)
    save_sarm(SarmForSequenceClassification(config, backbone), chat, tmp_path)
    score = PairScores(Reader(tmp_path, MODEL, tokenizer=folder), 1)
    tables, cost = score.compute(score.prepare(table()), lambda: None)
    assert tables["scores"]["reject"].to_pylist() == [None, "template_refuses"]
    assert cost.contents_with_control_tokens == 1
    everything_refused = table().slice(1)
    tables, _ = score.compute(score.prepare(everything_refused), lambda: None)
    assert tables["scores"]["reject"].to_pylist() == ["template_refuses"]
    tables, _ = extract.compute(extract.prepare(everything_refused), lambda: None)
    assert tables[target]["reject"].to_pylist() == ["template_refuses"] * 2


def test_conversations_of_a_corpus_say_why_they_gave_nothing(folder: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = [{"role": "system", "content": "s"}, *turns]
    rows = [{"row_id": n, "text": "q a.", "source": "", "messages": m} for n, m in enumerate((turns, system, None))]
    target = Target("chat", 1)
    actor = TextActivations(
        MODEL, str(folder), ExtractionSettings(), {target: activations_table(64, {"dtype": "float16"})}, 1
    )
    tables, _ = actor.compute(actor.prepare(pa.Table.from_pylist(rows, schema=CONVERSATIONS_TABLE)), lambda: None)
    found = dict(zip(tables[target]["row_id"].to_pylist(), tables[target]["reject"].to_pylist(), strict=True))
    assert found == {0: None, 1: "template_refuses", 2: "not_rendered"}
