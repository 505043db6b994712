"""A training's pairs are tokenised once, whoever reads them and however often it is started."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.tokens.chat_families import chat_of

from sarm.contracts.ids import prompt_id_of
from sarm.contracts.passes import Spelled
from sarm.contracts.tables import PAIRS_TABLE
from sarm.data.sources.tiny import tiny_pairs
from sarm.data.store.checkpoints import Checkpoints
from sarm.data.tokens.chat import Tokens, load_chat_tokenizer
from sarm.data.tokens.groups import prompt_groups
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.stages import reward_pairs
from sarm.stages.reward_pairs import read_reward_pairs, split_off_validation
from sarm.stages.train_reward_worker import _figures

SHARE = 0.4


@pytest.fixture
def table(tmp_path):
    rows = [
        {**p, "pair_id": f"pair{n}", "prompt_id": prompt_id_of(p["prompt"]), "split": "train"}
        for n, p in zip(range(60), tiny_pairs(), strict=False)
    ]
    table = pa.Table.from_pylist(rows, schema=PAIRS_TABLE)
    (tmp_path / "pairs").mkdir()
    pq.write_table(table, tmp_path / "pairs" / "part-000000.parquet")
    return table


def stored(group):
    """What training needs of it."""
    return group._replace(tokens=[Tokens(t.ids, t.num_truncated) for t in group.tokens], spelled=Spelled())


def test_pairs_are_tokenised_once_and_again_only_for_another_template_or_other_pairs(
    tmp_path, table, tiny_folder, tiny_chat, monkeypatch
):
    tokenised = []
    monkeypatch.setattr(
        reward_pairs,
        "prompt_groups",
        lambda pairs, chat, **kw: tokenised.append(len(pairs)) or prompt_groups(pairs, chat, **kw),
    )
    states = Checkpoints(tmp_path / "states", {})

    def read(chat=tiny_chat, **kwargs):
        return read_reward_pairs(tmp_path / "pairs", chat, SHARE, model="tiny", states=states, **kwargs)

    first = read()
    parts = split_off_validation(table, SHARE)
    assert sum(tokenised) == 60
    assert len(tokenised) == 2
    for found, part in zip((first.groups, first.validation), parts, strict=True):
        assert list(found) == [stored(group) for group in prompt_groups(part, tiny_chat)]
    again, other_worker = read(), read(may_write=False)
    assert len(tokenised) == 2
    assert list(again.groups) == list(other_worker.groups) == list(first.groups)
    assert again.counts == first.counts
    shorter = load_chat_tokenizer(replace(ModelSettings(), max_length=20), tiny_folder)
    assert max(len(tokens.ids) for group in read(shorter).groups for tokens in group.tokens) <= 20
    assert len(tokenised) == 4
    pq.write_table(table.slice(0, 40), tmp_path / "pairs" / "part-000000.parquet")
    read()
    assert len(tokenised) == 6
    monkeypatch.setattr(reward_pairs, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    read()
    assert len(tokenised) == 8, "tokens of other rules are not taken for those of today"


def test_pairs_that_the_template_refuses_are_left_out_of_training_and_counted_by_name(tmp_path, table):
    rows = table.to_pylist()
    for row in rows[:2]:
        row["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    rows[2]["chosen"] = "c" * 5_000_000

    def read(kept):
        pq.write_table(pa.Table.from_pylist(kept, schema=PAIRS_TABLE), tmp_path / "pairs" / "part-000000.parquet")
        states = Checkpoints(tmp_path / "states", {})
        return read_reward_pairs(tmp_path / "pairs", chat_of("gemma"), 0.0, model="tiny", states=states)

    found = read(rows)
    assert found.refused == {"pair0": "template_refuses", "pair1": "template_refuses", "pair2": "too_long"}
    assert sum(found.groups.num_pairs) == len(rows) - 3
    figures = _figures(found, training=None, history=[])
    assert {name: value for name, value in figures.items() if name.startswith("rejected")} == {
        "rejected_pairs": 3,
        "rejected_template_refuses": 2,
        "rejected_too_long": 1,
    }
    with pytest.raises(UserError, match=r"no pair can be encoded: \{'template_refuses': 2\} of 2"):
        read(rows[:2])
