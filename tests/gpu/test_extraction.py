"""Activations from the card: those of the model run alone on the CPU, in both dtypes, packed or alone, split or whole, with flash attention."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tests.gpu.cards import ON_CORES
from tests.stages.random_sarm import random_sarm
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sarm.contracts.passes import Target
from sarm.contracts.tables import activations_table
from sarm.data.store.activations import vectors
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.packing import answer_rows
from sarm.nn.pretrained import load_backbone
from sarm.passes.activations import TextActivations
from sarm.passes.reader import Reader
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings

pytestmark = pytest.mark.gpu
MODEL = ModelSettings(name="tiny:llama", layer=1, max_length=64)
TEXTS = [f"Text {i} has a sentence. " * (1 + i % 5) + "It has another one too!" for i in range(40)]
TARGET = Target("document", 1)


def activations(
    tiny_folder: Path,
    *,
    dtype: str = "float32",
    batch_tokens: int = 4096,
    kind: type[TextActivations] = TextActivations,
) -> Tensor:
    """Of all sentence ends, in order."""
    actor = kind(
        model=dataclasses.replace(MODEL, dtype=dtype),  # type: ignore[arg-type]
        folder=str(tiny_folder),
        extraction=ExtractionSettings(batch_tokens=batch_tokens),
        schemas={TARGET: activations_table(64, {"dtype": "float16", "layer": 1})},
        threads=1,
    )
    table = pa.table({"row_id": list(range(len(TEXTS))), "text": TEXTS})
    tables, cost = actor.compute(actor.prepare(table), lambda: None)
    assert cost.tokens
    return vectors(tables[TARGET], "float16").float()


def alone_on_cpu(tiny_folder: Path, chat: ChatTokenizer) -> Tensor:
    from sarm.data.tokens.windows import text_windows

    backbone, found = load_backbone(str(tiny_folder), 1), []
    for row, text in enumerate(TEXTS):
        for window in text_windows(row, text, ["document"], "rules", chat, MODEL.max_length):
            with torch.no_grad():
                hidden = backbone(torch.tensor([window.ids])).last_hidden_state[0]
            found.append(hidden[torch.from_numpy(window.columns["document"])])
    return torch.cat(found)


def test_float32_is_that_of_the_cpu(tiny_folder: Path, tiny_chat: ChatTokenizer) -> None:
    wanted = alone_on_cpu(tiny_folder, tiny_chat)
    found = activations(tiny_folder)
    assert found.shape == wanted.shape
    # Stored in 16 bits: half a unit in the last place beside the 1e-4 of the products.
    torch.testing.assert_close(found, wanted.half().float(), rtol=2e-3, atol=1e-4)


def test_bfloat16_points_where_float32_does(tiny_folder: Path) -> None:
    exact, rounded = activations(tiny_folder), activations(tiny_folder, dtype="bfloat16")
    assert torch.nn.functional.cosine_similarity(exact, rounded).min() >= 0.999


def test_batches_of_any_size_give_the_same(tiny_folder: Path) -> None:
    torch.testing.assert_close(
        activations(tiny_folder), activations(tiny_folder, batch_tokens=64), rtol=2e-3, atol=1e-4
    )


class _Small(TextActivations):
    """A card on which four windows are too much."""

    def _taken(self, cost: Any, num_tokens: int, **inputs: Tensor) -> Any:
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("no room")
        return super()._taken(cost, num_tokens, **inputs)


def test_what_does_not_fit_is_split(tiny_folder: Path) -> None:
    torch.testing.assert_close(activations(tiny_folder), activations(tiny_folder, kind=_Small), rtol=2e-3, atol=1e-4)


@pytest.mark.skipif(ON_CORES, reason="memory of a machine is not limited")
def test_a_pass_that_a_real_card_does_not_hold_is_split_too(tiny_folder: Path, card: torch.device) -> None:
    whole = activations(tiny_folder)
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved(card) + 24 * 2**20
    torch.cuda.set_per_process_memory_fraction(used / torch.cuda.get_device_properties(card).total_memory, card)
    try:
        split = activations(tiny_folder, batch_tokens=1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)
    torch.testing.assert_close(whole, split, rtol=2e-3, atol=1e-4)


def test_text_runs_with_flash_attention_alone(tiny_folder: Path) -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = activations(tiny_folder, dtype="bfloat16")
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_that_share_their_prompt_are_read_as_alone(
    dtype: str, tiny_folder: Path, tiny_chat: ChatTokenizer, tmp_path: Path
) -> None:
    folder = random_sarm(tmp_path / "sarm", tiny_folder, tiny_chat)
    reader = Reader(folder, ModelSettings(name=str(folder), max_length=128), dtype, 1024)
    prompt = [{"role": "user", "content": "Say something of the weather."}]
    tokens = tiny_chat.encode_responses(prompt, ["Rain.", "It will be dry, and warm.", "No."] * 5)
    answers = [(place, one.ids) for place, one in enumerate(tokens)]
    together = reader.read(answer_rows(answers, reader.row_tokens), residuals=True)
    for place, ids in answers:
        alone = reader.read(answer_rows([(place, ids)], reader.row_tokens), residuals=True)[place]
        ours = together[place].residual
        assert ours is not None
        assert alone.residual is not None
        if dtype == "float32":
            torch.testing.assert_close(ours, alone.residual, rtol=1e-4, atol=1e-4)
        else:
            assert torch.nn.functional.cosine_similarity(ours, alone.residual, dim=0) >= 0.999
