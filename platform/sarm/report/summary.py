"""The end of a run on the terminal: stages, held-out accuracy beside its baselines, features with a context, where to look next.

Everything is printed as plain text objects, so brackets in a text are never read as markup, and what could move the cursor is gone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sarm.data.sources.shown_text import one_line
from sarm.report.numbers import seconds, share, signed, span

FEATURES_SHOWN = 5
# Below it, words are not shown: they would tell a reader something that is not so.
_LEAST_AUC = 0.6
# Frame, padding and the three columns of numbers: what is left of a line is for the context.
OTHER_COLUMNS = 37


def print_summary(report: Mapping[str, Any], html_path: Path, console: Console | None = None) -> None:
    """Print what `report.as_dict` (or a report.json that was read back) says, and where its page is."""
    console = console or Console()
    parts: list[RenderableType] = []
    if report["stages"]:
        parts += [_stages(report["stages"]), Text()]
    if report["accuracies"]:
        parts += [_accuracies(report["accuracies"]), Text()]
    if report["raising"] or report["lowering"]:
        parts += [_features(report["raising"], report["lowering"], console.width - OTHER_COLUMNS)]
        parts += [_intercept(report), Text()] if report.get("intercept") is not None else [Text()]
    console.print(Panel(Group(*parts[:-1]), title=_text(report["title"]), border_style="dim", padding=(1, 2)))
    # Outside the frame and never wrapped, so that the path and the command can be copied whole.
    console.print(Text.assemble(("report   ", "dim"), one_line(str(html_path))), soft_wrap=True)
    if report["ui_command"]:
        console.print(Text.assemble(("compare  ", "dim"), one_line(report["ui_command"])), soft_wrap=True)


def _stages(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table()
    table.add_column("stage", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("key figures", ratio=1, overflow="fold")
    for row in rows:
        table.add_row(_text(row["stage"]), seconds(row["seconds"]), _text(row["figures"]))
    # Of folders that one pass made, each has its time, which counts once.
    times = [row["own_seconds"] for row in rows if row["own_seconds"] is not None]
    table.add_row(Text("total", style="bold"), Text(seconds(sum(times)), style="bold"), "")
    return table


def _accuracies(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(expand=False)
    table.add_column("held-out accuracy", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    for position, row in enumerate(rows):
        style = "bold" if position == 0 else ""
        ends = row.get("ci95")
        interval = span(ends) if ends else ""
        table.add_row(_text(row["name"], style), Text(share(row["accuracy"]), style=style), Text(interval, style=style))
    return table


def _features(raising: Sequence[Mapping[str, Any]], lowering: Sequence[Mapping[str, Any]], room: int) -> Table:
    """Words above, a context below. A context keeps its end, where the rewarded token is, so it is cut here and not by the table."""
    table = _table()
    table.add_column("latent", justify="right", no_wrap=True)
    table.add_column("w·z mean", justify="right", no_wrap=True)
    table.add_column("fires", justify="right", no_wrap=True)
    table.add_column("words (AUC); end of its strongest context", ratio=1, no_wrap=True, overflow="crop")
    for title, rows, style in (("raise the reward", raising, "blue"), ("lower the reward", lowering, "yellow")):
        table.add_row("", "", "", Text(title, style="bold"))
        for row in rows[:FEATURES_SHOWN]:
            context = one_line(row["contexts"][0]["text"]) if row["contexts"] else ""
            shown = context if len(context) <= room else "…" + context[1 - room :].lstrip()
            table.add_row(
                str(row["latent"]),
                Text(signed(row["mean_contribution"]), style=style),
                share(row["frequency"]),
                Text.assemble(_words(row.get("names"), room), (shown, "dim")),
            )
    return table


def _intercept(report: Mapping[str, Any]) -> Text:
    """What no comparison sees, so that the features above are those that tell answers apart."""
    number = report["num_always_on"]
    fire = "latent fires" if number == 1 else "latents fire"
    told = f" in every reward: {number} {fire} on nearly every answer. No comparison of answers sees it."
    return Text.assemble("intercept ", signed(report["intercept"]), (told, "dim"))


def _words(names: Mapping[str, Any] | None, room: int) -> str:
    """The words that tell best where a latent fires, with how well they do on other prompts; a line of its own."""
    if not names or not names["terms"]:
        return ""
    told = f" ({names['auc']:.2f})"
    words = one_line(", ".join(names["terms"])) if names["auc"] >= _LEAST_AUC else "no word tells where it fires"
    return f"{words if len(words) + len(told) <= room else words[: room - len(told) - 1] + '…'}{told}\n"


def _table(*, expand: bool = True) -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), expand=expand, header_style="dim", show_edge=False)


def _text(text: str, style: str = "") -> Text:
    return Text(one_line(text), style=style)
