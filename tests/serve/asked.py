"""Conversations to score, their texts in the tiny model's template, and what the reader says of each alone."""

from pathlib import Path

from sarm.data.tokens.packing import answer_row
from sarm.passes.reader import Reading, sarm_reader

PROMPT = [{"role": "user", "content": "tell me how a garden grows"}]
ANSWERS = ["slowly.", "with water, light and a great deal of patience.", "it does not grow at all"]


def conversation(answer: str, prompt: list[dict[str, str]] = PROMPT) -> list[dict[str, str]]:
    return [*prompt, {"role": "assistant", "content": answer}]


def text_of(messages: list[dict[str, str]], *, opened: bool = False) -> str:
    """As a policy's tokenizer decodes it, special tokens included."""
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + ("<|im_start|>assistant\n" if opened else "")


def readings(folder: Path, conversations: list[list[dict[str, str]]]) -> list[Reading]:
    """Each read alone, without a server."""
    reader = sarm_reader(folder)
    tokens = reader.chat.encode(conversations)
    found = reader.read([answer_row(place, one.ids) for place, one in enumerate(tokens)])
    return [found[place] for place in range(len(tokens))]
