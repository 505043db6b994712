"""A dictionary attached to a reward model that others trained: checked against it, with the linear head that approximates its rewards."""

import itertools
from pathlib import Path
from typing import Any

import torch

from sarm.contracts.folders import PAIRS_FOLDER, SARM_FOLDER
from sarm.contracts.ids import stable_id
from sarm.contracts.manifest import StageFolder, read_manifest
from sarm.contracts.untrusted import read_json
from sarm.data.formats.attached_folder import Attached, save_attached
from sarm.data.formats.sae_weights import SaeWeights, sae_of
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.data.tokens.groups import prompt_groups
from sarm.data.tokens.packing import Row, answer_row, row_batches
from sarm.engine.terminal import say
from sarm.nn.abs_topk import AbsTopKSae
from sarm.passes.attached_model import attach
from sarm.passes.edited_rewards import conversations
from sarm.passes.models import ModelSpec, find_model
from sarm.passes.reward_gradients import linear_head
from sarm.passes.reward_heads import gate_opening
from sarm.passes.usage import device_of_worker
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSae
from sarm.settings.model import ModelSettings

_BATCH_TOKENS = 2048


def attach_sae(weights: SaeWeights, config: ConvertSae) -> None:
    """Write the folder of the model with this SAE at the layer that it is for.

    Raises UserError for an SAE of another model, layer or width, a model that no reward of one number is known of, or pairs without a training
    response that can be read.
    """
    assert config.pairs is not None
    said = weights.metadata.get("activations", {})
    layer = said.get("layer")
    if not config.model or not layer:
        raise UserError(f"{config.source} does not say which model and layer its SAE is for. Pass --model and --layer.")
    read_manifest(config.pairs, PAIRS_FOLDER)
    spec = find_model(Benchmarking(model=config.model, head=config.head, benchmarks=("reward_bench_2",)))
    if spec.kind != "classifier":
        raise UserError(f"{config.model} is a {spec.kind}, and a dictionary is attached to a reward model with a head of its own. Pass another --model.")  # fmt: skip
    if spec.edit:
        raise UserError(f"{config.model} is read with the edit in {spec.edit} already, and a dictionary is attached to the model as it is. Move the edit away.")  # fmt: skip
    place = Path(spec.place)
    settings = ModelSettings(name=str(place), max_length=config.max_length, rewarded_token="last")
    chat = load_chat_tokenizer(settings, place)
    sae = sae_of(weights)
    sae = sae.unfolded() if isinstance(sae, AbsTopKSae) else sae
    attached = Attached(
        classifier=place,
        identity=spec.identity,
        head=spec.head,
        layer=layer,
        sae=sae,
        weight=torch.zeros(sae.d_sae),
        provenance={"model": config.model, "max_length": config.max_length},
    )
    weight_S, about = _linear_head(attached, spec, chat, config)
    provenance = {**attached.provenance, "attached": {"layer": layer, **about}}
    finished = Attached(**{**vars(attached), "weight": weight_S, "provenance": provenance})
    architectures = [str(name) for name in read_json(place / "config.json").get("architectures") or []]
    folder = StageFolder(config.target, SARM_FOLDER, {"attached": config.model, "layer": layer, "d_sae": sae.d_sae, "k": sae.k})  # fmt: skip
    folder.write(lambda: _write(finished, architectures, chat, config.target))
    say(f"linear head: {about['alive']:,} latents fire at the rewarded token of {about['responses']:,} responses")


def _linear_head(
    attached: Attached, spec: ModelSpec, chat: ChatTokenizer, config: ConvertSae
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The weight of every latent, and what it was measured on."""
    assert config.pairs is not None
    model = attach(attached, torch.float32).to(device_of_worker())
    opening = gate_opening(chat.tokenizer, spec.place) if model.reads_gate else []
    rows = _rows(config.pairs, chat, config.responses)
    if not rows:
        raise UserError(f"{config.pairs} has no training pair that the model can read. Pass other --pairs.")
    batches = [conversations(part, chat.pad_id, opening, model.device) for part in row_batches(rows, _BATCH_TOKENS)]
    if any(batch.gates is not None and bool((batch.gates < 0).any()) for batch in batches):
        raise UserError(f"a prompt's end is cut off at {config.max_length} tokens, where the model's gate reads it. Pass a larger --max-length.")  # fmt: skip
    weight_S, counts_S = linear_head(model, batches)
    if not bool((weight_S != 0).any()):
        raise UserError(f"no latent of {config.source} fires at a rewarded token of {config.model}. Pass an SAE that was trained on such tokens.")  # fmt: skip
    return weight_S, {"responses": len(rows), "alive": int((counts_S > 0).sum())}


def _rows(folder: Path, chat: ChatTokenizer, limit: int) -> list[Row]:
    """Conversations of about `limit` training responses, chosen by hash of their prompt."""
    pairs = load_pairs(folder, "train")
    order = sorted(range(pairs.num_rows), key=lambda row: stable_id("linear head", pairs["prompt_id"][row].as_py()))
    refused: dict[str, str] = {}
    groups = prompt_groups(pairs.take(order[:limit]), chat, refused=refused)
    answers = ((f"{group.prompt_id} {n}", tokens.ids) for group in groups for n, tokens in enumerate(group.tokens))
    return [answer_row(key, ids) for key, ids in itertools.islice(answers, limit)]


def _write(attached: Attached, architectures: list[str], chat: ChatTokenizer, folder: Path) -> None:
    save_attached(attached, architectures, folder)
    chat.tokenizer.chat_template = chat.exported_template
    chat.tokenizer.model_max_length = chat.max_length
    chat.tokenizer.save_pretrained(folder)
