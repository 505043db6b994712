"""A chat template that the user gives: settings hold its text, so that it is part of what identifies a run, and no worker needs the file."""

from pathlib import Path

from sarm.settings.checks import UserError
from sarm.settings.results_root import absolute_in

_MAX_BYTES = 1 << 20


def template_text(given: str, flag: str) -> str:
    """The text of a file; a template's text, a name and "" as they are.

    Raises UserError for what looks like a file and is none, or holds no template.
    """
    if not given or is_template(given):
        return given
    path = absolute_in(Path(given))
    if not path.is_file():
        if "/" in given or path.suffix:
            raise UserError(
                f"{flag}: there is no file {given}. Pass a jinja file, or the name of a template that the tokenizer has."
            )
        return given
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too long for one")
        text = path.read_text(encoding="utf-8")
        if not is_template(text):
            raise ValueError("it has no jinja in it")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{flag}: {given} is no chat template: {error}. Pass a jinja file that renders `messages`."
        ) from error
    return text


def is_template(text: str) -> bool:
    """Whether a text is a template itself, and no name of one."""
    return "{%" in text or "{{" in text
