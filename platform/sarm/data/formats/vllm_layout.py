"""SARMs as vLLM loads them: the backbone's config at the top of config.json, where vLLM reads it, and beside it an object `sarm` (`ServedSarm`).

Weights are named as everywhere: `model.*`, `sae.*`, `score.weight`. `sarm.integrations.vllm` registers the classes that `architectures` names.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from sarm.data.formats.sarm_folder import save_tokenizer
from sarm.data.tokens.chat import ChatTokenizer
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.checks import UserError
from sarm.settings.started import called

CutOff = Literal["refuse", "penalise"]
Scale = Literal["standardised", "raw"]

ARCHITECTURES = {
    "llama": "SarmOnLlama",
    "mistral": "SarmOnMistral",
    "qwen2": "SarmOnQwen2",
    "qwen3": "SarmOnQwen3",
    "gemma2": "SarmOnGemma2",
    "gemma3_text": "SarmOnGemma3",
}
"""The backbone's `model_type`, and what the class inside vLLM is called."""
PLUGIN = "sarm"
"""The name of the IO processor that explains rewards."""
_PROBE = "In 1990 it's  12,345.6 (or so)?\n\n  Ça va: 天気 «don't»"
_LABELS = {"standardised": "reward", "raw": "raw_reward"}


@dataclass(frozen=True, kw_only=True)
class ServedSarm:
    """What stands under `sarm` in config.json: all that turns a residual stream and token ids into a reward.

    `reward_mean` and `reward_std` are what standardised rewards are made with. `penalty` is a raw reward.
    """

    d_sae: int
    k: int
    sae: dict[str, Any]
    standardise: bool
    end_of_turn_id: int
    answer_place: dict[str, Any]
    on_cut_off: CutOff
    penalty: float
    scale: Scale
    reward_mean: float
    reward_std: float
    max_length: int
    system_prompt: str | None
    protocol_version: int
    probe_ids: list[int]
    """What the tokenizer makes of a fixed text: `transformers` may take another class of tokenizer for a folder than it was written with."""


def served_sarm(config: Any) -> ServedSarm:
    """What a config that vLLM has read says of its SARM. Raises UserError if it says nothing, or what this version does not know."""
    fields = getattr(config, "sarm", None)
    try:
        return ServedSarm(**fields)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(f"config.json has no object `sarm` that this version of sarm can read ({error}). Write the folder again: {called('convert_sarm')} IN OUT --format vllm.") from error  # fmt: skip


def check_probe(tokenizer: Any, expected: list[int], where: object) -> None:
    """Raise UserError if a tokenizer is not the one that the model was trained with."""
    if probed(tokenizer) != expected:
        raise UserError(f"{where}: transformers reads a {type(tokenizer).__name__} there, which splits texts otherwise than the model's own tokenizer. Rewards would be of other tokens. Serve the model with {called('serve')}.")  # fmt: skip


def probed(tokenizer: Any) -> list[int]:
    """Token ids of the fixed text."""
    ids: list[int] = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return ids


def write_vllm_sarm(
    model: SarmForSequenceClassification, chat: ChatTokenizer, folder: Path, *, on_cut_off: CutOff | None, scale: Scale
) -> None:
    """Config, one safetensors file and the tokenizer. `on_cut_off` None takes what the model does.

    Raises UserError for a scalar head, for a family that no class is for, for a tokenizer that would be read as another, and for a model that closes answers: vLLM computes the tokens
    that it is given, so no end of turn can be added to an answer that lacks it.
    """
    config, family = model.config, model.model.config.model_type
    if config.head != "sae":
        raise UserError("a scalar head has no latents to serve. Pass a SARM.")
    if family not in ARCHITECTURES:
        raise UserError(f"inside vLLM a SARM runs on {', '.join(ARCHITECTURES)}, this one's backbone is {family}. Serve it with {called('serve')}.")  # fmt: skip
    how = on_cut_off or config.on_cut_off
    if how not in ("refuse", "penalise"):
        raise UserError("this SARM closes an answer that was cut off, and vLLM cannot: it computes the tokens that it is given. Pass --on-cut-off refuse or penalise, which is what then happens to such answers.")  # fmt: skip
    served = ServedSarm(
        d_sae=model.sae.d_sae,
        k=model.sae.k,
        sae=model.sae.describe(),
        standardise=config.standardise,
        end_of_turn_id=chat.end_of_turn_id,
        answer_place=chat.answer_place,
        on_cut_off=how,
        penalty=config.penalty,
        scale=scale,
        reward_mean=config.reward_mean,
        reward_std=config.reward_std if config.reward_std > 0 else 1.0,
        max_length=chat.max_length,
        system_prompt=chat.system_prompt,
        protocol_version=PROTOCOL_VERSION,
        probe_ids=probed(chat.tokenizer),
    )
    _check_as_read(chat, family, served.probe_ids)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    flat = {key: value for key, value in config.backbone.items() if not key.startswith("_")}
    flat |= {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "dtype": str(model.model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "num_labels": 1,
        "id2label": {"0": _LABELS[scale]},
        "label2id": {_LABELS[scale]: 0},
        # Or vLLM puts a sigmoid over rewards.
        "problem_type": "regression",
        "io_processor_plugin": PLUGIN,
        "sarm": asdict(served),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(chat, folder)
    (folder / "config.json").write_text(json.dumps(flat, indent=2))


def _check_as_read(chat: ChatTokenizer, family: str, expected: list[int]) -> None:
    """What decides on the tokenizer's class is the backbone's family, which stands at the top of the config."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="sarm-") as folder:
        save_tokenizer(chat, Path(folder))
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": family}))
        check_probe(AutoTokenizer.from_pretrained(folder), expected, f"a folder with a {family} backbone")
