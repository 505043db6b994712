"""Chat templates as models carry them: without today's date, and with the system prompt that the model was trained with."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sarm.settings.chat_template import is_template
from sarm.settings.checks import UserError

# Llama 3.2's template writes today's date, so rewards would drift by the day; 3.1's writes this one.
FIXED_DATE = "26 Jul 2024"
_PIN_DATE = f'{{%- set date_string = "{FIXED_DATE}" %}}{{%- macro strftime_now(format) %}}{FIXED_DATE}{{% endmacro %}}'
_SYSTEM = re.compile(
    r"\{#- system prompt of the training -#\}\{%- set trained_with = (?P<literal>\"[^\"]*\") %\}.*?\{#- end of it -#\}",
    re.S,
)


def chosen_template(tokenizer: Any, given: str, flag: str) -> str:
    """The chat template to render with: the one given, or the tokenizer's of that name, or its own, or of several the one named `default`.

    Raises UserError if there is none, and names those that there are.
    """
    own = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {"default": own} if own else {}
    if is_template(given):
        return given
    if found := named.get(given or "default"):
        return found
    if not named:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it cannot render conversations. Pass an instruct model, or a template to {flag}.")  # fmt: skip
    wanted = f"none of the name {given}" if given else "none of the name default"
    raise UserError(f"the tokenizer of {tokenizer.name_or_path} has the chat templates {', '.join(sorted(named))}, and {wanted}. Pass one of these, or a file, to {flag}.")  # fmt: skip


def check_renders(tokenizer: Any, flag: str) -> None:
    """Raise UserError unless the tokenizer's chat template writes a question and its answer: else all answers would have one reward, or none."""
    turns = [{"role": "user", "content": "one question"}, {"role": "assistant", "content": "one answer"}]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template raises whatever its author chose
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the chat template cannot render a question and its answer: {reason}. Pass another to {flag}.") from error  # fmt: skip
    if lacking := left_out(text, turns):
        raise UserError(f"the chat template leaves out {' and '.join(lacking)}, rendering one of each. Pass another to {flag}.")  # fmt: skip


def left_out(text: str, turns: Sequence[Mapping[str, str]]) -> list[str]:
    """Contents of the turns that their rendered text does not hold."""
    return [turn["content"] for turn in turns if turn["content"] not in text]


def pin_template(template: str) -> str:
    """The template with today's date replaced by a fixed one; pinning twice changes nothing."""
    mentions_date = "date_string" in template or "strftime_now" in template
    return template if not mentions_date or template.startswith(_PIN_DATE) else _PIN_DATE + template


def with_system_prompt(template: str, prompt: str | None) -> str:
    """The template that gives conversations without a system turn this one, as training did; None changes nothing."""
    if prompt is None:
        return template
    # Jinja reads a literal as Python's escapes; quotes and braces are escaped too, so that nothing in it looks like jinja's own.
    escaped = "".join(
        f"\\x{ord(c):02x}" if c in "\"{}%#'" else c for c in prompt.encode("unicode_escape").decode("ascii")
    )
    return (
        f'{{#- system prompt of the training -#}}{{%- set trained_with = "{escaped}" %}}'
        "{%- if messages and messages[0]['role'] != 'system' %}"
        "{%- set messages = [{'role': 'system', 'content': trained_with}] + messages %}{%- endif %}"
        "{#- end of it -#}" + template
    )


def without_system_prompt(template: str) -> tuple[str, str | None]:
    """(the template as it was before `with_system_prompt`, the prompt or None)."""
    found = _SYSTEM.match(template)
    if found is None:
        return template, None
    return template[found.end() :], ast.literal_eval(found["literal"])
