"""The page of the watch over reward hacking: what pays for a shift of the mean reward, what alarmed, and what would answer it."""

from collections.abc import Mapping, Sequence
from typing import Any

from sarm.report.figures import as_svg, reward_by_step
from sarm.report.numbers import share, signed
from sarm.report.pages import Page, Section, to_html

_NATS = "ln of the highest capital of bets that something changed; over 0 it is against there being no change"
Content = Mapping[str, Any]


def drift_page(streams: Sequence[Content], model: str) -> str:
    """One HTML file of the contents of `GET /v1/drift`, the streams that alarmed first."""
    order = sorted(streams, key=lambda one: {"alarm": 0, "watching": 1, "baseline": 2}[one["state"]])
    sections = [section for one in order for section in _sections(one)] or [
        Section(title="Nothing has been watched yet")
    ]
    notes = ["An alarm says that answers have changed since the first steps, and what pays for it. Whether that is progress or a hack, the texts tell.", "Answers of runs may contain harmful text."]  # fmt: skip
    facts = {"model": model, "streams": len(order), "with alarms": sum(one["state"] == "alarm" for one in order)}
    pictures = {
        f"Mean raw reward of {_name(one)} by step; lines are alarms": as_svg(reward_by_step(one["history"], [alarm["step"] for alarm in one["alarms"]]))
        for one in order
        if len(one["history"]) > 1
    }  # fmt: skip
    return to_html(
        Page(title=f"Reward drift of {model}", facts=facts, notes=notes, sections=sections, pictures=pictures)
    )


def _sections(one: Content) -> list[Section]:
    name = _name(one)
    if one["shift"] is None:
        return [Section(title=name, text=f"{one['steps']} steps so far, the baseline is not complete.")]
    text = f"{one['steps']} steps, {one['answers']:,} answers. The mean reward has moved by {signed(one['shift'])}; the three largest rises are {share(one['concentration'])} of all rises."  # fmt: skip
    found = [Section(title=name, text=text)]
    for alarm in one["alarms"]:
        found += _alarm(alarm)
    if one["answer"] is not None:
        found.append(
            Section(
                title="What would answer it",
                text="Look at the texts first. A variant without these latents can be scored beside the model's own head: post it, or make a folder of it from an audit.",
                columns=("way", "how"),
                rows=[("an edited model", one["answer"]["command"]), (f"POST {one['answer']['path']}", str(one["answer"]["variant"]).replace("'", '"'))],
            )
        )  # fmt: skip
    rows = [(suspect["latent"], suspect["name"] or "", text) for suspect in one["suspects"] for text in suspect["contexts"]]  # fmt: skip
    if rows:
        found.append(Section(title="What the suspects fire on in training", columns=("latent", "name", "text"), rows=rows))  # fmt: skip
    found.append(_paid(one["paid"], "What the shift is paid for", "The largest parts of the shift; over all latents they sum to it."))  # fmt: skip
    signals = [(key.replace("_", " "), f"{value['baseline']:.4g}", f"{value['now']:.4g}", f"{value['evidence']:.1f}") for key, value in one["signals"].items()]  # fmt: skip
    found.append(Section(title="Figures of the steps", text=f"Evidence: {_NATS}.", columns=("figure", "baseline", "now", "evidence"), rows=signals))  # fmt: skip
    return found


def _alarm(alarm: Content) -> list[Section]:
    title = f"Alarm at step {alarm['step']}"
    signals = ", ".join(name.replace("_", " ") for name in alarm["signals"])
    found = [_paid(alarm["latents"], title, f"Figures: {signals}." if signals else "")] if alarm["latents"] else [Section(title=title, text=f"Figures: {signals}.")]  # fmt: skip
    rows = [(one["latent"], signed(one["contribution"]), f"{one['reward']:.3f}", one["text"]) for one in alarm["rollouts"]]  # fmt: skip
    if rows:
        found.append(Section(title=f"{title}: rollouts that drive it", columns=("latent", "adds", "reward", "text"), rows=rows))  # fmt: skip
    return found


def _paid(paid: Sequence[Content], title: str, text: str) -> Section:
    columns = ("latent", "name", "baseline", "now", "shift", "more often", "stronger", "evidence")
    rows = [
        (one["latent"], one["name"] or "", f"{one['baseline']:.4f}", f"{one['now']:.4f}", *(signed(one[name]) for name in ("shift", "rate", "strength")), f"{one['evidence']:.1f}")
        for one in paid
    ]  # fmt: skip
    return Section(title=title, text=text, columns=columns, rows=rows)


def _name(one: Content) -> str:
    return f"{one['run']}, {one['split']}, {one['variant']}"
