"""SARMs as vLLM's pooling models: its own backbones, ending in the residual stream, and our head over it.

A class for each family of backbones. vLLM loads this module where it loads a SARM, and nothing else does.
"""

from collections.abc import Iterable, Set
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM, Gemma2Model
from vllm.model_executor.models.gemma3 import Gemma3Model
from vllm.model_executor.models.interfaces_base import VllmModelForPooling, default_pooling_type
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.mistral import MistralModel
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3Model
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from sarm.data.formats.vllm_layout import served_sarm
from sarm.integrations.vllm_pooling import RewardHead, packed


class ResidualStream(nn.Module):
    """In the final norm's place: the residual stream that it would have normalised, which vLLM's blocks leave in two parts."""

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, None]:
        return hidden + residual, None


class SarmPooler(Pooler):  # type: ignore[misc]
    """`classify` gives a reward [1], `plugin` a packed row with its latents."""

    def __init__(self, head: RewardHead):
        super().__init__()
        # No submodule: its weights are the model's.
        self._head = [head]

    def get_supported_tasks(self) -> Set[Any]:
        return {"classify", "plugin"}

    def get_pooling_updates(self, task: Any) -> Any:
        """The rewarded token is found by its id."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor]:
        """Raises RuntimeError where only a part of a conversation was computed, as with prefix caching: its rewarded token may be missing."""
        if pooling_metadata.get_pooling_cursor().is_partial_prefill():
            raise RuntimeError("a SARM needs whole conversations. Leave prefix caching and chunked prefill off.")
        lengths = pooling_metadata.prompt_lens.tolist()
        pooled = self._head[0](hidden_states, pooling_metadata.get_prompt_token_ids_cpu(), lengths)
        rows = packed(pooled)
        return [
            row if task == "plugin" else reward[None]
            for task, reward, row in zip(pooling_metadata.tasks, pooled.rewards.float(), rows, strict=True)
        ]


# With this kind of pooling vLLM by itself neither splits conversations nor skips what it has seen.
@default_pooling_type(seq_pooling_type="MEAN")
class _Sarm(nn.Module, VllmModelForPooling):  # type: ignore[misc]
    is_pooling_model = True
    backbone: ClassVar[Any]
    mapper: ClassVar[Any] = None
    """Of names of weights, for backbones that do not load their own."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = self.backbone(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.model.norm = ResidualStream()
        self.head = RewardHead(served_sarm(config), config.hidden_size)
        self.pooler = SarmPooler(self.head)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """[T, D], the residual stream of every token."""
        hidden_TD: Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden_TD

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        ours = WeightsMapper(orig_to_new_prefix={"sae.": "head.sae.", "score.": "head.score."})
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=ours | (self.mapper or WeightsMapper()))
        return loaded


class SarmOnLlama(_Sarm):
    """Llama, SmolLM 1 and 2, Yi."""

    backbone = LlamaModel


class SarmOnMistral(_Sarm):
    """Mistral."""

    backbone = MistralModel


class SarmOnQwen2(_Sarm):
    """Qwen 2 and 2.5."""

    backbone = Qwen2Model


class SarmOnQwen3(_Sarm):
    """Qwen 3."""

    backbone = Qwen3Model


class SarmOnGemma2(_Sarm):
    """Gemma 2."""

    backbone = Gemma2Model
    mapper = Gemma2ForCausalLM.hf_to_vllm_mapper


class SarmOnGemma3(_Sarm):
    """Gemma 3, its language model."""

    backbone = Gemma3Model
