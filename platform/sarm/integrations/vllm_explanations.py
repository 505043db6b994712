"""`POST /pooling {"model": ..., "task": "plugin", "data": {"conversations": [messages, ...]}}`: rewards with the latents that they are sums over.

Conversations go through our own tokenizer: what contents spell is text, and what is too long loses its beginning.
"""

import math
from collections.abc import Sequence
from typing import Any

from vllm.plugins.io_processors.interface import IOProcessor

from sarm.data.formats.vllm_layout import check_probe, served_sarm
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.integrations.vllm_pooling import explanation_of, ids_asked_for
from sarm.settings.model import ModelSettings


class SarmExplanations(IOProcessor):  # type: ignore[misc]
    """What a request asks for becomes token ids, and what the pooler gives an answer for each of them, in their order."""

    def __init__(self, vllm_config: Any, renderer: Any):
        super().__init__(vllm_config, renderer)
        folder = vllm_config.model_config.tokenizer
        self._served = served_sarm(vllm_config.model_config.hf_config)
        length = min(self._served.max_length, vllm_config.model_config.max_model_len)
        settings = ModelSettings(name=str(folder), max_length=length, system_prompt=self._served.system_prompt)
        self._chat = load_chat_tokenizer(settings, folder)
        check_probe(self._chat.tokenizer, self._served.probe_ids, folder)

    def parse_data(self, data: object) -> list[list[int]]:
        """Token ids of each conversation. Raises UserError, which vLLM answers with 400."""
        return ids_asked_for(data, self._chat, self._served)

    def pre_process(self, prompt: list[list[int]], request_id: str | None = None, **_: Any) -> list[dict[str, Any]]:
        return [{"prompt_token_ids": ids} for ids in prompt]

    def post_process(
        self, model_output: Sequence[Any], request_id: str | None = None, **_: Any
    ) -> list[dict[str, Any]]:
        """An explanation for each conversation. Raises RuntimeError for a reward that is no number."""
        found = [explanation_of(one.outputs.data) for one in model_output]
        if not all(math.isfinite(one["reward"]) for one in found):
            raise RuntimeError("a reward is no number: the model's weights are broken. Convert it again.")
        return found
