"""Reward models that others trained, as workers load them: token ids in, rewards out; every weight comes from the files.

A causal language model is read up to its last hidden state, and its head (`reward_heads`) at the last token that the mask shows. Anything else that
`transformers` has a sequence classifier for is loaded as that.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sarm.contracts.untrusted import read_json
from sarm.data.formats.model_files import weight_files
from sarm.data.formats.tensor_files import shapes_in, tensors_in
from sarm.data.store.finite import not_finite
from sarm.nn.loading_report import faults
from sarm.nn.pretrained import is_derived, quiet_transformers
from sarm.nn.splice import Editing
from sarm.passes.reward_heads import HeadLayout, build_head, find_head
from sarm.settings.checks import UserError


class ForeignModel(nn.Module):
    """Rewards [N] of rows of token ids, padded on the right. `vocabulary` is the number of its embeddings."""

    objectives: Tensor

    def __init__(self, body: Any, head: nn.Module | None, objectives: Sequence[float] = ()):
        super().__init__()
        self.body, self.head = body, head
        # Of a classifier's own outputs.
        self.register_buffer("objectives", torch.tensor(list(objectives) or [1.0]))
        self.vocabulary: int = body.get_input_embeddings().weight.shape[0]
        self.editing: Editing | None = None

    def forward(
        self,
        input_ids: Int[Tensor, "rows columns"],
        attention_mask: Int[Tensor, "rows columns"],
        gates: Int[Tensor, " rows"] | None = None,
        places: Bool[Tensor, "rows columns"] | None = None,
    ) -> Float[Tensor, " rows"]:
        """`gates` are the columns at which a gate reads the prompt, for a head that has one; `places` are the tokens whose features are edited."""
        if self.editing is not None:
            self.editing.places = places
        if self.head is None:
            logits_BO: Tensor = self.body(input_ids=input_ids, attention_mask=attention_mask).logits.float()
            return logits_BO @ self.objectives
        hidden_BLD: Tensor = self.body(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        last = (attention_mask * (torch.arange(input_ids.shape[1], device=input_ids.device) + 1)).argmax(-1)
        rewards: Tensor = self.head(hidden_BLD[rows, last], None if gates is None else hidden_BLD[rows, gates])
        return rewards


def layout_of(folder: Path, config: dict[str, Any], asked: str) -> HeadLayout | None:
    """The head of the model in a folder, None for one that is no causal language model. Raises UserError as `find_head` does."""
    return find_head(shapes_in(folder, pickles=True), config, asked, str(folder))


def load_foreign(folder: Path, dtype: torch.dtype, head: str = "", objectives: Sequence[float] = ()) -> ForeignModel:
    """The model in a folder, in evaluation mode; its head computes in float32.

    Raises UserError unless every weight comes from the files, fits the config and is a number.
    """
    config = dict(read_json(folder / "config.json"))
    layout = layout_of(folder, config, head)
    if layout is None:
        model = ForeignModel(_classifier(folder, dtype), None, objectives)
    else:
        weights = dict(tensors_in(folder, layout.keys, pickles=True))
        model = ForeignModel(_body(folder, layout, dtype), build_head(layout, weights, config, objectives))
    if broken := not_finite(model.named_parameters()):
        raise UserError(f"{folder} holds NaN or infinite values in {broken}. The weights are broken; get another copy.")
    return model.eval()


def check_foreign(folder: Path, layout: HeadLayout | None) -> None:
    """Raise UserError unless the files have every weight of the model; reads their names and shapes alone."""
    if layout is None:
        _classifier(folder, torch.float32, device_map="meta")
    else:
        _body(folder, layout, torch.float32, device_map="meta")


def _body(folder: Path, layout: HeadLayout, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModel

    own = set(layout.keys)

    def is_head(key: str) -> bool:
        # Names in the report have lost the beginning that the body's have.
        return key in own or is_derived(key) or not _is_inside(key)

    with _one_line(folder):
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = getattr(whole, "text_config", None) or whole
        mapping = {f"^{layout.body.replace('.', chr(92) + '.')}": ""} if layout.body else {}
        model, report = AutoModel.from_pretrained(
            folder, config=config, dtype=dtype, key_mapping=mapping, **_strictly(folder), **options
        )
    if wrong := faults(report, may_hold=is_head):
        raise UserError(f"{folder} {wrong}. The download may be incomplete, or the config another model's.")
    return model


def _classifier(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    with _one_line(folder):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, **_strictly(folder), **options
        )
    if wrong := faults(report, may_hold=is_derived):
        raise UserError(f"{folder}, read as {type(model).__name__}, {wrong}. The download may be incomplete, or the head under another name.")  # fmt: skip
    _float32_head(model, dtype)
    return model


def _is_inside(key: str) -> bool:
    return key.split(".")[0] in ("embed_tokens", "layers", "norm")


def _strictly(folder: Path) -> dict[str, Any]:
    is_safe = weight_files(folder, pickles=True)[0].suffix == ".safetensors"
    return {
        "trust_remote_code": False,
        "use_safetensors": is_safe,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """What the library raises about files becomes a UserError."""
    with quiet_transformers():
        try:
            yield
        # Configs and weights are read by dozens of classes, which raise what they like.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder} cannot be loaded: {reason} Pass another --model.") from error


def _float32_head(model: Any, dtype: torch.dtype) -> None:
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if dtype != torch.float32 and isinstance(head, nn.Linear):
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
