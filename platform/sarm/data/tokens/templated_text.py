"""Texts that are rendered conversations already: a template's turns spelled in a content, which would be templated twice.

Scored so, the order of rewards can turn round, and nothing looks wrong. A text that *is* a rendered conversation is refused; one that spells
turns somewhere, as a text about templates does, is scored as it stands and counted.
"""

import re
from typing import NamedTuple


class _Marks(NamedTuple):
    opens: re.Pattern[str]
    """How a turn begins."""
    closes: str
    """What stands in every rendered conversation that begins so."""


_BOS = r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|<\|endoftext\|>)?\s*"
_MARKS = {
    "ChatML": _Marks(re.compile(r"<\|im_start\|>(?:system|user|assistant|tool)\b"), "<|im_end|>"),
    "Llama 3": _Marks(re.compile(r"<\|start_header_id\|>"), "<|end_header_id|>"),
    "Llama 4": _Marks(re.compile(r"<\|header_start\|>"), "<|header_end|>"),
    "Gemma": _Marks(re.compile(r"<start_of_turn>(?:user|model)\b"), "<end_of_turn>"),
    "Mistral or Llama 2": _Marks(re.compile(r"\[INST\]"), "[/INST]"),
    "Phi or Zephyr": _Marks(re.compile(r"<\|(?:system|user|assistant)\|>"), "<|assistant|>"),
    "DeepSeek": _Marks(re.compile(r"<｜(?:User|Assistant)｜>"), "<｜Assistant｜>"),
    "Harmony": _Marks(re.compile(r"<\|start\|>(?:system|developer|user|assistant)\b"), "<|message|>"),
    "HH": _Marks(re.compile(r"(?:^|\n\n)Human: "), "\n\nAssistant:"),
}  # fmt: skip
_CONTROL = re.compile(
    r"<\|[A-Za-z_][\w ]{0,40}\|>|<｜[^｜\n]{1,40}｜>|</?s>|<(?:bos|eos|pad|unk|mask)>|<(?:start|end)_of_(?:turn|image)>|<unused\d{1,4}>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|THINK)\]|\[(?:CLS|SEP|MASK)\]|</?think>|</?tool_\w{1,20}>"
)


def template_spelled_in(text: str) -> str | None:
    """The template whose turns the text spells somewhere, or None."""
    # Most texts have none of these characters.
    if "<" not in text and "[INST]" not in text and "Human: " not in text:
        return None
    return next((name for name, one in _MARKS.items() if one.closes in text and one.opens.search(text)), None)


def is_rendered_conversation(text: str) -> bool:
    """Whether the whole text is a conversation in some template: it begins as one does and has what ends the first of its turns."""
    start = re.match(_BOS, text)
    assert start is not None
    name = template_spelled_in(text)
    return name is not None and _MARKS[name].opens.match(text, start.end()) is not None


def control_spelled_in(text: str) -> bool:
    """Whether the text spells a control token of some tokenizer in use: what can be said without knowing which will read it."""
    return ("<" in text or "[" in text) and _CONTROL.search(text) is not None
