"""From explanations and ratings to the figures of a run, its page and its metrics.

A mean over latents is given only where enough of them could be measured; the number that could is always beside it.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sarm.contracts.figures import plain_values
from sarm.interpret.agreement import agreement
from sarm.interpret.labels import EXTRACTIVE
from sarm.report.numbers import share, span
from sarm.report.pages import Dots, Page, Section

FIGURES = ("detection", "simulation", "intruder", "baseline_other", "baseline_none", "monosemanticity", "safety")
_SHOWN = 200

Rows = Sequence[Mapping[str, Any]]


def measure(
    rows: Rows, texts: Rows, ratings: Rows, costs: Rows, min_coverage: float, rubrics: Sequence[str]
) -> dict[str, Any]:
    """The content of report.json: figures over latents with their coverage, agreement of judges, costs."""
    alive = [row for row in rows if row["status"] != "dead"]
    judged = [row for row in alive if row["explainer"] != EXTRACTIVE]
    labels = [row for row in alive if row["explainer"] == EXTRACTIVE]
    figures = {name: _mean([row.get(name) for row in judged], min_coverage) for name in FIGURES if judged}
    if judged:
        figures["label_detection"] = _mean([row.get("detection") for row in labels], min_coverage)
    statuses: dict[str, int] = {}
    for row in rows:
        if row["explainer"] != EXTRACTIVE or not judged:
            statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    own = [row for row in texts if row["score"] == "detection" and row["explainer"] != EXTRACTIVE and row["said"] is not None]  # fmt: skip
    kinds = sorted({row["kind"] for row in own})
    failed = sum(row["status"] != "ok" for row in (*texts, *ratings)) + sum(row["status"] not in ("ok", "dead") for row in judged)  # fmt: skip
    return {
        "title": "Explanations of latents",
        "figures": figures,
        "statuses": statuses,
        "failed_answers": failed,
        "min_coverage": min_coverage,
        "above_chance": sum((row.get("detection_low") or 0) > 0.5 for row in judged),
        "by_kind": {kind: statistics.mean(bool(row["said"]) == (kind == "fires") for row in own if row["kind"] == kind) for kind in kinds},
        "agreement": {rubric: plain_values(agreement(ratings, rubric)) for rubric in rubrics} if ratings else {},
        "judges": list(costs),
        "explanations": [dict(row) for row in rows],
    }  # fmt: skip


def _mean(values: Sequence[float | None], min_coverage: float) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    enough = bool(known) and len(known) >= min_coverage * len(values)
    return {"mean": statistics.mean(known) if enough else None, "num": len(known), "of": len(values)}


def metrics(content: Mapping[str, Any]) -> dict[str, float | None]:
    """Stable names for MLflow: `interp/detection`, `interp/coverage_detection`, `interp/alpha_safety`, `cost/usd` ..."""
    found: dict[str, float | None] = {}
    for name, one in content["figures"].items():
        found[f"interp/{name}"] = one["mean"]
        found[f"interp/coverage_{name}"] = one["num"] / one["of"] if one["of"] else None
    for kind, value in content["by_kind"].items():
        found[f"interp/right_{kind}"] = value
    for rubric, one in content["agreement"].items():
        found |= {f"interp/{name}_{rubric}": one["between"][name] for name in ("alpha", "ac2")}
    found |= {f"interp/num_{status}": count for status, count in content["statuses"].items()}
    found["interp/failed_answers"] = content["failed_answers"]
    for name in ("prompt_tokens", "completion_tokens", "requests"):
        found[f"cost/{name}"] = sum(one[name] for one in content["judges"])
    prices = [one["usd"] for one in content["judges"]]
    found["cost/usd"] = sum(prices) if prices and None not in prices else None
    return found


def build_page(content: Mapping[str, Any]) -> Page:
    """The page of `report.json`."""
    facts = {"contexts": content["contexts"], "place": content["place"], **{f"latents {k}": n for k, n in content["statuses"].items()}}  # fmt: skip
    sections = [_figures(content), *(agreement_section(rubric, one) for rubric, one in content["agreement"].items())]
    if content["judges"]:
        names = ("judge", "answers_asked", "answers_cached", "requests", "prompt_tokens", "completion_tokens", "usd")
        rows = [tuple("unknown" if one[name] is None else one[name] for name in names) for one in content["judges"]]
        sections.append(Section(title="Cost", text="Tokens of all answers, those from earlier runs included.", columns=[name.replace("_", " ") for name in names], rows=rows))  # fmt: skip
    sections.append(_table(content["explanations"]))
    return Page(title=content["title"], facts=facts, notes=_notes(content), sections=sections)


def _notes(content: Mapping[str, Any]) -> list[str]:
    notes = ["Every explanation is tested on texts of prompts that it was not written from. What no judge could answer is in no figure."]  # fmt: skip
    if not content["silence_is_known"]:
        notes.append("Silence is presumed: a text counts as silent for a latent that it is no context of. A frequent latent may still fire there, which lowers its scores.")  # fmt: skip
    withheld = [f"{name} ({one['num']} of {one['of']})" for name, one in content["figures"].items() if one["mean"] is None]  # fmt: skip
    if withheld:
        notes.append(f"Not given, since under {share(content['min_coverage'])} of the latents could be measured: {', '.join(withheld)}.")  # fmt: skip
    if content["failed_answers"]:
        notes.append(f"{content['failed_answers']} answers failed; --judging.retry-failed asks for them again.")
    if not content["judges"]:
        notes.append("No judge was named: the labels are terms taken from the contexts, not explanations, and are not tested.")  # fmt: skip
    return notes


def _figures(content: Mapping[str, Any]) -> Section:
    rows = [(name.replace("_", " "), "not given" if one["mean"] is None else f"{one['mean']:.3f}", f"{one['num']} of {one['of']}") for name, one in content["figures"].items()]  # fmt: skip
    rows += [(f"right on texts: {kind}", f"{value:.3f}", "") for kind, value in content["by_kind"].items()]
    judged = [row for row in content["explanations"] if row.get("detection") is not None and row["explainer"] != EXTRACTIVE]  # fmt: skip
    best = sorted(judged, key=lambda row: -row["detection"])[:20]
    dots = [
        {"name": f"{row['latent']}", "value": row["detection"], "ci95": (row["detection_low"], row["detection_high"]), "label": share(row["detection"]), "line": 0.5}
        for row in best
    ]  # fmt: skip
    text = f"Detection is balanced accuracy, 0.5 by chance; {content['above_chance']} latents are above it with their whole interval. Simulation is Pearson's r, intruder a share of one in five by chance."  # fmt: skip
    return Section(title="Figures", text=text, dots=Dots(rows=dots, low=0.0, high=1.0) if dots else None, columns=("figure", "mean", "latents measured"), rows=rows)  # fmt: skip


def agreement_section(rubric: str, one: Mapping[str, Any]) -> Section:
    """Agreement of raters on a rubric, as `agreement` measures it."""

    def shown(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.3f}"

    rows = [(f"between judges: {name}", shown(one["between"][name])) for name in ("alpha", "ac2")]
    rows += [(f"quadratic kappa, {pair}", shown(value)) for pair, value in one["between"]["kappa"].items()]
    rows += [(f"{judge} with itself: {name}", shown(value)) for judge, both in one["within"].items() for name, value in both.items()]  # fmt: skip
    rows += [(f"{judge}: answered", share(value)) for judge, value in one["answered"].items()]
    for judge, numbers in one["selected"]["num"].items():
        rows.append((f"{judge}: latents at 3, 4, 5 or above", ", ".join(map(str, numbers.values()))))
    for threshold, pairs in one["selected"]["shared_by_judges"].items():
        rows += [(f"same latents at {threshold} or above, {pair}", shown(value)) for pair, value in pairs.items()]
    text = f"{one['num_items']} latents. Alpha is Krippendorff's, ordinal; AC2 is Gwet's with quadratic weights, which holds where most ratings are equal."  # fmt: skip
    return Section(title=f"Agreement on {rubric}", text=text, columns=("measure", "value"), rows=rows)


def _table(rows: Rows) -> Section:
    columns = ("latent", "explainer", "explanation", "status", "detection", "95 % interval", "other's", "none", "scored", "mono.", "safety", "reason")  # fmt: skip
    cells = []
    for row in rows[:_SHOWN]:
        interval = "" if row.get("detection") is None else span((row["detection_low"], row["detection_high"]))
        marks = ["" if row.get(name) is None else row[name] for name in ("monosemanticity", "safety")]
        numbers = ["" if row.get(name) is None else share(row[name]) for name in ("detection", "baseline_other", "baseline_none")]  # fmt: skip
        cells.append((row["latent"], row["explainer"], row["explanation"], row["status"], numbers[0], interval, numbers[1], numbers[2], row["num_scored"], *marks, row["reason"]))  # fmt: skip
    more = f" The first {_SHOWN} of {len(rows)} rows; all are in explanations.parquet." if len(rows) > _SHOWN else ""
    text = f"Rows of `{EXTRACTIVE}` are terms that the contexts have more often than other texts, not a judge's words.{more}"  # fmt: skip
    return Section(title="Latents", text=text, columns=columns, rows=cells)
