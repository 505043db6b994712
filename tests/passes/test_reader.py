"""The reader of reward models, against the model run on each conversation alone."""

import pickle

import numpy as np
import pytest
import torch
from tests.stages.random_sarm import random_sarm

from sarm.contracts.passes import Cost
from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.tokens.packing import answer_rows
from sarm.nn.backbone import residual_stream
from sarm.passes.reader import Reader, sarm_reader
from sarm.settings.model import ModelSettings

PROMPT = [{"role": "user", "content": "tell me how a garden grows"}]
ANSWERS = ["slowly.", "with water, light and a great deal of patience over many weeks.", "it does not grow at all"]


@pytest.fixture(scope="module")
def reader(tiny_folder, tiny_chat, tmp_path_factory) -> Reader:
    return sarm_reader(random_sarm(tmp_path_factory.mktemp("reader") / "sarm", tiny_folder, tiny_chat), 256)


def test_what_is_read_of_a_shared_prompt_is_what_the_model_says_of_each_answer_alone(reader, tiny_chat):
    tokens = tiny_chat.encode_responses(PROMPT, ANSWERS)
    middle = {place: [len(one.ids) // 2] for place, one in enumerate(tokens)}
    cost, beats = Cost(), []
    rows = answer_rows([(place, one.ids) for place, one in enumerate(tokens)], reader.row_tokens, middle)
    readings = reader.read(rows, cost, lambda: beats.append(1), residuals=True)
    assert readings.keys() == {0, 1, 2} | {(place, column) for place, (column,) in middle.items()}
    assert cost.tokens < sum(len(one.ids) for one in tokens), "the prompt is read once"
    assert cost.padded_tokens >= cost.tokens
    assert len(beats) == 1
    model = load_sarm(reader.folder)
    for place, one in enumerate(tokens):
        for key, ids in ((place, one.ids), ((place, middle[place][0]), one.ids[: middle[place][0] + 1])):
            row = torch.tensor([ids])
            order = torch.arange(len(ids))[None]
            with torch.no_grad():
                last = torch.tensor([len(ids) - 1])
                output = model(input_ids=row, position_ids=order, segment_ids=order * 0, rewarded_rows=last * 0, rewarded_columns=last)  # fmt: skip
                h_D = residual_stream(model.model, row, order, order * 0)[0, -1]
            found = readings[key]
            assert found.reward == pytest.approx(output.logits.item(), abs=1e-5)
            on = output.latent_values[0] != 0
            assert dict(zip(found.latents.tolist(), found.values.tolist(), strict=True)) == pytest.approx(
                dict(zip(output.latent_indices[0][on].tolist(), output.latent_values[0][on].tolist(), strict=True)), abs=1e-5
            )  # fmt: skip
            torch.testing.assert_close(found.residual, h_D)


def test_rows_of_which_nothing_is_wanted_cost_nothing(reader, tiny_chat):
    (tokens,) = tiny_chat.encode_responses(PROMPT, ANSWERS[:1])
    (row,) = answer_rows([("key", tokens.ids)], reader.row_tokens)
    cost = Cost()
    assert reader.read([row._replace(taken=[])], cost) == {}
    assert cost == Cost()


def test_a_reader_goes_to_a_worker_without_what_it_has_loaded(reader):
    reader.ready(1)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy == reader
    assert not {"model", "chat"} & vars(copy).keys()


def test_a_head_without_latents_gives_rewards_alone(tiny_folder, tiny_chat, tmp_path):
    folder = random_sarm(tmp_path / "scalar", tiny_folder, tiny_chat, head="scalar")
    reader = Reader(folder, ModelSettings(name=str(folder), max_length=128))
    tokens = tiny_chat.encode_responses(PROMPT, ANSWERS)
    readings = reader.read(answer_rows([(place, one.ids) for place, one in enumerate(tokens)], reader.row_tokens))
    for place, one in enumerate(tokens):
        with torch.no_grad():
            alone = reader.model(input_ids=torch.tensor([one.ids])).logits.item()
        assert readings[place].reward == pytest.approx(alone, abs=1e-5)
        assert len(readings[place].latents) == len(readings[place].values) == 0
        assert readings[place].residual is None
    assert np.ptp([readings[place].reward for place in range(3)]) > 1e-3
