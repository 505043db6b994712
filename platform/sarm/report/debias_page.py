"""The page of `jobs/debias.py`: what each property costs, which features carry it, what suppressing them repairs and what it costs."""

from collections.abc import Mapping
from typing import Any

from sarm.report.numbers import share, span
from sarm.report.pages import Dots, Page, Section

_FEATURES_SHOWN = 16
_MORE = {"strength": "fire more", "effect": "add more to the reward (to first order)"}
_LEVELS = {
    "hard": "hard: the rejected answer has it",
    "normal": "normal: both or neither have it",
    "easy": "easy: the chosen answer has it",
    "clean": "clean: neither has it",
}


def build_page(content: Mapping[str, Any]) -> Page:
    """The page of `debias.json`."""
    sections: list[Section] = []
    for own in content["properties"].values():
        sections += [_outcome(own), *_features(own), _doses(own)]
        sections += _controls(own) + _benchmarks(own)
    notes = ["Features and doses are chosen on one half of the prompts. Every figure of an outcome is of the other half, with its 95 % interval over prompts."]  # fmt: skip
    return Page(title=f"Biases of {content['facts']['model']}", facts=content["facts"], notes=notes, sections=sections)


def _outcome(own: Mapping[str, Any]) -> Section:
    found, chosen = own["repair"], own["chosen"]
    text = f"It costs {share(found['lost'])} of accuracy ({span(found['lost_ci95'])}), clean minus hard, on {found['num_pairs']:,} pairs of {found['num_prompts']:,} prompts. "  # fmt: skip
    if chosen is None:
        text += "No dose gained hard accuracy within the allowed cost on the half that it is chosen on, so nothing is edited."
    else:
        text += f"Chosen: {chosen['features']} features by {chosen['rank']}, of which {share(chosen['share'])} is taken away. "  # fmt: skip
        if found["repaired"] is not None:
            text += f"That repairs {share(found['repaired']['value'])} of the cost ({span(found['repaired']['ci95'])}). "  # fmt: skip
        if found["flips_repaired"] is not None:
            text += f"Of {found['flips']:,} pairs that it flips, {share(found['flips_repaired']['value'])} are right again ({span(found['flips_repaired']['ci95'])})."  # fmt: skip
    rows = [
        (
            label,
            f"{share(found['before'][level]['value'])} ({span(found['before'][level]['ci95'])})",
            f"{share(found['after'][level]['value'])} ({span(found['after'][level]['ci95'])})",
            f"{share(found['change'][level]['value'])} ({span(found['change'][level]['ci95'])})",
        )
        for level, label in _LEVELS.items()
    ]
    dots = Dots(
        rows=[
            {"name": f"{level}, {when}", "value": found[when][level]["value"], "ci95": found[when][level]["ci95"], "label": share(found[when][level]["value"])}
            for level in _LEVELS
            for when in ("before", "after")
        ],
        low=0.0,
        high=1.0,
        zero=0.5,
    )  # fmt: skip
    return Section(title=own["title"].capitalize(), text=text, dots=dots, columns=("accuracy", "before", "after", "change"), rows=rows)  # fmt: skip


def _features(own: Mapping[str, Any]) -> list[Section]:
    """A table for each order."""
    sections: list[Section] = []
    for rank, listed in own["features"].items():
        text = f"{own['num_candidates'][rank]:,} features {_MORE[rank]} with it, in most of {own['num_prompts']:,} prompts. "
        if not sections:
            text += f"{own['left_out']:,} pairs are left out: the rule does not apply to them, or their versions would differ in more."
            if own["differ_in_more"]:
                text += f" {own['differ_in_more']:,} pairs are taken as given, although their versions differ in more than this property."
        rows = [
            (row["layer"], row["latent"], f"{row['strength']:.3g}", share(row["stability"]))
            for row in listed[:_FEATURES_SHOWN]
        ]
        sections.append(Section(title=f"{own['title'].capitalize()}: features by {rank}", text=text, columns=("layer", "latent", rank, "prompts in which it is more"), rows=rows))  # fmt: skip
    return sections


def _doses(own: Mapping[str, Any]) -> Section:
    rows = [
        (
            dose["features"] or "none",
            dose["rank"],
            share(dose["share"]) if dose["features"] else "",
            *(share(dose["accuracy"][level]) for level in _LEVELS),
        )
        for dose in [own["plain"], *own["doses"]]
    ]
    text = f"Accuracies on the half that doses are chosen on, {own['num_pairs']:,} pairs. The chosen dose has the largest hard accuracy of those that cost next to nothing on {' and '.join(own['spared'])}."
    return Section(title=f"{own['title'].capitalize()}: doses", text=text, columns=("features", "by", "taken away", *_LEVELS), rows=rows)  # fmt: skip


def _controls(own: Mapping[str, Any]) -> list[Section]:
    if not own["controls"]:
        return []
    names = {"random": "random features", "matched": "features of equal frequency and size"}
    rows = [
        (names[kind], found["sets"], share(found["repaired_median"]), share(found["repaired_largest"]))
        for kind, found in own["controls"].items()
    ]
    text = "The same number of other features, suppressed as much."
    return [Section(title=f"{own['title'].capitalize()}: controls", text=text, columns=("features", "sets", "repaired, median", "repaired, largest"), rows=rows)]  # fmt: skip


def _benchmarks(own: Mapping[str, Any]) -> list[Section]:
    sections: list[Section] = []
    for found in own["benchmarks"].values():
        rows = [
            (name, share(row["b"]), share(row["a"]), share(row["difference"]), span(row["difference_ci95"]))
            for name, row in found["figures"].items()
        ]
        text = f"{found['num_rows']:,} rows of the reporting half."
        sections.append(Section(title=f"{own['title'].capitalize()}: {found['title']}", text=text, columns=("figure", "before", "after", "change", "95 % interval"), rows=rows))  # fmt: skip
    return sections
