"""What requests hold, route by route. Our own route refuses fields that it does not know; those of others pass them over, as theirs do."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sarm.serve.heads import BASE, VARIANT_NAME

MAX_ITEMS, MAX_COMPLETIONS, MAX_TEXTS, MAX_TOP, MAX_VARIANTS = 256, 64, 1024, 64, 16

Messages = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1024)]
Text = str
Scale = Literal["standardised", "raw"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Ids = Annotated[list[int], Field(min_length=1, max_length=1 << 20)]
Texts = Annotated[list[Text], Field(max_length=MAX_TEXTS)]


DEFAULT_RUN, DEFAULT_SPLIT = "default", "train"
Name = Annotated[str, Field(pattern=VARIANT_NAME)]
Step = Annotated[int, Field(ge=0, lt=1 << 53)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class _Foreign(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class Query(_Strict):
    """What may stand in the address of every scoring route."""

    # An address is made of texts.
    model_config = ConfigDict(strict=False, extra="forbid", hide_input_in_errors=True)
    scale: Scale = "standardised"
    variant: Annotated[str, Field(max_length=64)] = BASE
    form: Literal["number", "object"] = "number"
    """Of slime's answer."""
    run: Name = DEFAULT_RUN
    split: Name = DEFAULT_SPLIT
    step: Step | None = None
    """Of the training run that asks, for the watch."""


class Penalty(_Strict):
    """A fixed reward, in the request's scale, for answers that were cut off."""

    penalise: Finite


class Explain(_Strict):
    """How many latents are named, by the size of their contribution, and which others."""

    top: Annotated[int, Field(ge=0, le=MAX_TOP)] = 8
    features: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOP)] = []


Finish = Literal["stop", "length"]


class Item(_Strict):
    """One prompt with its completions, one conversation, one rendered text, or one list of token ids."""

    id: Annotated[str, Field(max_length=256)] | int | None = None
    prompt: Messages | None = None
    completions: Annotated[list[Text], Field(min_length=1, max_length=MAX_COMPLETIONS)] | None = None
    messages: Messages | None = None
    text: Text | None = None
    prompt_text: Text | None = None
    """Of a text, the part that is its prompt: what follows is the answer, whatever it spells."""
    input_ids: Ids | None = None
    finish: Annotated[list[Finish], Field(max_length=MAX_COMPLETIONS)] | None = None
    """Of each completion, or of the conversation: whether it ended by itself. A text shows it by its end of turn, unless this is given."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [self.prompt is not None or self.completions is not None, self.messages is not None]
        given += [self.text is not None, self.input_ids is not None]
        if sum(given) != 1 or (self.prompt is None) != (self.completions is None):
            raise ValueError("an item has prompt and completions, or messages, or text, or input_ids")
        num = len(self.completions) if self.completions is not None else 1
        if self.finish is not None and len(self.finish) != num:
            raise ValueError(f"finish has {len(self.finish)} entries for {num} answers")
        if self.prompt_text is not None and self.text is None:
            raise ValueError("prompt_text belongs to a text")
        if self.finish is not None and self.input_ids is not None:
            raise ValueError("finish is not said of ids, which show it themselves")
        return self


class RewardsRequest(_Strict):
    """`POST /v1/rewards`."""

    model: str | None = None
    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]
    variants: Annotated[list[str], Field(min_length=1, max_length=MAX_VARIANTS)] = [BASE]
    scale: Scale = "standardised"
    explain: Explain | None = None
    on_truncated: Literal["close", "refuse", "penalise"] | Penalty | None = None
    on_too_long: Literal["cut_left", "refuse"] = "cut_left"
    expect_identity: str | None = None
    partial: bool = False
    run: Name = DEFAULT_RUN
    split: Name = DEFAULT_SPLIT
    step: Step | None = None
    """Of the training run that asks, for the watch."""
    timeout_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = None


class CardRequest(_Strict):
    """`POST /v1/card`: a conversation that ends with the answer."""

    messages: Messages


class EditedWeight(_Strict):
    """One latent's weight in the head before and after."""

    latent: Annotated[int, Field(ge=0, lt=1 << 31)]
    before: Finite
    after: Finite


class Variant(_Strict):
    """`POST /v1/models/NAME/variants`: the `weights` of an `edit.json`, under a name."""

    name: Annotated[str, Field(pattern=VARIANT_NAME)]
    weights: Annotated[list[EditedWeight], Field(min_length=1, max_length=1 << 16)]


class DriftQuery(_Strict):
    """Which streams of the watch, all if none are named, and how many latents of each."""

    # An address is made of texts.
    model_config = ConfigDict(strict=False, extra="forbid", hide_input_in_errors=True)
    run: Name | None = None
    split: Name | None = None
    variant: Name | None = None
    top: Annotated[int, Field(ge=1, le=1024)] = 20


class DriftReset(_Strict):
    """`POST /v1/drift/reset`: the streams of a run, or of its split or variant alone."""

    run: Name
    split: Name | None = None
    variant: Name | None = None


class OpenRlhfRequest(_Foreign):
    """OpenRLHF's `remote_url`: texts with their special tokens, in the policy's template."""

    query: Texts | str
    prompts: list[Text | None] | None = None
    labels: list[Any] | None = None


class LlamaFactoryRequest(_Foreign):
    """LLaMA-Factory's `POST /v1/score/evaluation`."""

    model: str = "model"
    messages: Texts
    max_length: int | None = None


class SlimeRequest(_Foreign):
    """slime's `remote_rm`."""

    prompt: Text | Messages
    response: Text
    label: Any = None


class PoolingRequest(_Foreign):
    """vLLM's `/classify` and `/pooling`, SGLang's `/classify` and `/v1/embeddings`."""

    model: str | None = None
    input: Text | Ids | Texts | Annotated[list[Ids], Field(max_length=MAX_TEXTS)] | None = None
    messages: Messages | None = None
    text: Text | Texts | None = None
    input_ids: Ids | Annotated[list[Ids], Field(max_length=MAX_TEXTS)] | None = None
    use_activation: bool | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = False
    truncate_prompt_tokens: int | None = None
    task: str | None = None
    request_id: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [self.input, self.messages, self.text, self.input_ids]
        if sum(one is not None for one in given) != 1:
            raise ValueError("pass one of input, messages, text and input_ids")
        if self.add_generation_prompt:
            raise ValueError(
                "add_generation_prompt opens an answer that is not there; a reward is of an answer that is"
            )
        return self


class TeiRequest(_Foreign):
    """text-embeddings-inference's `POST /predict`: a text, a pair of prompt and answer, or a batch of either."""

    inputs: (
        Text
        | Texts
        | Annotated[list[Annotated[list[Text], Field(min_length=1, max_length=2)]], Field(max_length=MAX_TEXTS)]
    )
    truncate: bool | None = None
    truncation_direction: Literal["left", "Left", "right", "Right"] | None = None
    raw_scores: bool = False
