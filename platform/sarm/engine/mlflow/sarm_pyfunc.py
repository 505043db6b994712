"""How `mlflow.pyfunc` loads a registered reward model: conversations in, rewards out.

A copy of this file lies in every registered model, and beside it, as `sarm_model`, the code of the model and of its encoder. It needs torch and transformers,
and not the package that trained the model; so it imports nothing of that package, and runs no code that it finds beside the weights.
"""

import json
from pathlib import Path
from typing import Any


def _load_pyfunc(path: str) -> "Rewards":
    """What MLflow calls with the folder of the model."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no reward model. It was registered by reference, and the folder is not there (any more): "
            "mount or copy it to that place, or register with --mlflow-models copy."
        )
    return Rewards(folder)


class Rewards:
    """The reward of conversations, each rendered and tokenised as in training."""

    def __init__(self, folder: Path):
        from sarm_model.control_tokens import ControlTokens
        from sarm_model.modeling_sarm import SarmForSequenceClassification
        from transformers import PreTrainedTokenizerFast

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = config.get("provenance") or {}
        self._system_prompt: str | None = known.get("system_prompt")
        # Named, since `AutoTokenizer` would ask whether to run the model's own code.
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self._control = ControlTokens(self.tokenizer)
        self._max_length = int(known.get("max_length") or self.tokenizer.model_max_length)
        self.model = SarmForSequenceClassification.from_pretrained(folder).eval()

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[float]:
        """Rewards of a table or list with `messages` (role and content of each turn, the last one the answer), or of such lists themselves."""
        return [self._reward(messages) for messages in _conversations(model_input)]

    def _reward(self, messages: list[dict[str, str]]) -> float:
        import torch

        ids = self._token_ids(messages)
        device = next(self.model.parameters()).device
        with torch.no_grad():
            return float(self.model(input_ids=torch.tensor([ids], device=device)).logits[0, 0])

    def _token_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """One BOS where the tokenizer has one, and the end of the answer's turn last; what is too long loses its beginning."""
        turns = list(messages)
        if self._system_prompt is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self._system_prompt})
        # As in training, control tokens that a content spells are text.
        rendered = self._control.render(turns, self._apply, self.tokenizer.chat_template)
        ids = self._control.encode([rendered])[0].ids
        while len(ids) > 1 and not self.tokenizer.decode([ids[-1]]).strip():
            ids.pop()
        bos = self.tokenizer.bos_token_id
        has_bos = bos is not None and self.tokenizer("a").input_ids[:1] == [bos]
        while has_bos and ids and ids[0] == bos:
            ids.pop(0)
        kept = self._max_length - has_bos
        kept_ids: list[int] = [bos] * has_bos + ids[-kept:]
        return kept_ids

    def _apply(self, turns: Any) -> str:
        return str(self.tokenizer.apply_chat_template(list(turns), tokenize=False))


def _conversations(given: Any) -> list[list[dict[str, str]]]:
    """The conversations of a pandas table, a list of rows or of conversations, or one row."""
    if hasattr(given, "columns"):
        if "messages" not in given.columns:
            raise ValueError(f"the table has the columns {', '.join(map(str, given.columns))}, expected `messages`.")
        rows = list(given["messages"])
    elif isinstance(given, dict):
        rows = (
            [given["messages"]] if given["messages"] and isinstance(given["messages"][0], dict) else given["messages"]
        )
    else:
        rows = [row["messages"] if isinstance(row, dict) and "messages" in row else row for row in given]
    if any(dict(turn).get("tool_calls") for row in rows for turn in row):
        raise ValueError("a message calls tools, which a registered model has no field for. Ask the folder of the model, or its server.")  # fmt: skip
    return [[{"role": str(turn["role"]), "content": str(turn["content"])} for turn in row] for row in rows]
