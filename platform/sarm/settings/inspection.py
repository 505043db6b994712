"""Options of `jobs/prepare_data.py --inspect`; nothing heavy is imported here, so that `--help` answers at once."""

from dataclasses import dataclass, field

from sarm.settings.chat_template import template_text
from sarm.settings.checks import check, check_least
from sarm.settings.data import DataSettings
from sarm.settings.results_root import READ, place_paths


@dataclass(frozen=True, kw_only=True)
class ColumnNames:
    """How the columns of the source are called."""

    columns: str = ""
    """Columns of preferences under other names, e.g. `prompt=question,chosen=answer_a,rejected=answer_b`."""
    text_field: str = "text"
    """Column that holds the text, or conversations as lists of messages."""

    def __post_init__(self) -> None:
        DataSettings(columns=self.columns)


@dataclass(frozen=True, kw_only=True)
class Template:
    """Whose chat template renders the examples."""

    name: str = field(default="", metadata=READ)
    """Folder, Hugging Face id or built-in model. Its template also says which rows it refuses and which are cut. Empty: a plain ChatML template."""
    revision: str = "main"
    """Branch, tag or commit of a Hugging Face model."""
    max_length: int = 512
    """Tokens of a sequence at most; longer ones lose their beginning."""
    system_prompt: str | None = None
    """System turn put before conversations that have none; unset leaves it to the model's chat template."""
    chat_template: str = ""
    """Chat template of a tokenizer that has none, or several: a file, or the name of one that it has; unset is its own, or `default`."""

    def __post_init__(self) -> None:
        place_paths(self)
        object.__setattr__(self, "chat_template", template_text(self.chat_template, "--model.chat-template"))
        check(
            self,
            "model.name",
            bool(self.name) or not self.chat_template,
            "the model whose template --model.chat-template stands in for",
        )
        check_least(self, "model.", max_length=8)


@dataclass(frozen=True, kw_only=True)
class Inspecting:
    """Show what a source is taken for, and some of its rows as the model would read them. Nothing is written."""

    inspect: str = field(metadata=READ)
    """The source: a file, pattern or folder, `hf:NAME[@REVISION][:CONFIG][:SPLIT]`, or a built-in one."""
    rows: int = 1000
    """Look at this many rows at most."""
    examples: int = 5
    """Show this many rows."""
    data: ColumnNames = ColumnNames()
    model: Template = Template()
    debug: bool = False
    """Show the traceback of an error instead of one line."""

    def __post_init__(self) -> None:
        place_paths(self)
        check(self, "inspect", bool(self.inspect), "a source")
        check_least(self, "", rows=1, examples=0)
