"""audit.html: one self-contained page from whatever stages of an audit are finished."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.contracts.manifest import MANIFEST, write_atomically
from sarm.report.audit_sections import relabelling_sections, signed, signed_span, steering_sections, terms_section
from sarm.report.judges_page import agreement_section
from sarm.report.numbers import share
from sarm.report.pages import Page, Section, to_html, to_markdown

_SHOWN = 32


def write_audit_page(out: Path) -> Path:
    """Write audit.html and audit.md into the audit's folder; returns the page."""
    sections: list[Section] = []
    pictures: dict[str, str] = {}
    facts: dict[str, Any] = {}
    exact = [
        "A reward is the sum of its latents' contributions, so every figure marked exact follows from arithmetic: that an edit of the head moves rewards is no evidence. Evidence is what could have come out otherwise: effects on pairs of other prompts beside matched random latents, and interventions before TopK.",
    ]
    notes: list[str] = []
    if (out / "features" / MANIFEST).exists():
        sections += _features(out, facts)
        counts = json.loads((out / "codes" / MANIFEST).read_text())["counts"]
        notes += counts.get("notes", [])
        if num := counts.get("contents_with_control_tokens"):
            notes.append(f"{num:,} contents spell control tokens, which are read as text.")
    if "completeness" not in facts or facts["completeness"] is not None:
        notes = exact + notes
    facts = {name: value for name, value in facts.items() if value is not None}
    if (out / "causal" / MANIFEST).exists():
        sections += _causal(json.loads((out / "causal" / "causal.json").read_text()))
    for path in sorted((out / "steer").glob("*/steering.json")):
        if (path.parent / MANIFEST).exists():
            sections += steering_sections(path.parent.name, json.loads(path.read_text()))
            pictures |= _pictures(path.parent, f"{path.parent.name}: ")
    if (out / "relabel" / MANIFEST).exists():
        sections += relabelling_sections(json.loads((out / "relabel" / "relabel.json").read_text()))
        pictures |= _pictures(out / "relabel", "")
    page = Page(
        title=f"Audit of {facts.get('model', out.name)}", facts=facts, notes=notes, sections=sections, pictures=pictures
    )
    write_atomically(out / "audit.md", to_markdown(page))
    write_atomically(out / "audit.html", to_html(page))
    return out / "audit.html"


def _pictures(folder: Path, prefix: str) -> dict[str, str]:
    return {f"{prefix}{path.stem.replace('_', ' ')}": path.read_text() for path in sorted(folder.glob("*.svg"))}


def _features(out: Path, facts: dict[str, Any]) -> Iterable[Section]:
    content = json.loads((out / "features" / "selection.json").read_text())
    codes = json.loads((out / "codes" / MANIFEST).read_text())
    facts |= {
        "model": codes["config"]["place"],
        "responses": codes["counts"]["responses"],
        "pairs": codes["counts"]["pairs"],
        "completeness": None if content["completeness"] is None else f"{content['completeness']:.1e}",
        "explained by the linear head": None if (r2 := content.get("linear_head_explains")) is None else share(r2),
        "features": len(content["selected"]),
        "protocol version": codes["config"].get("protocol_version"),
    }
    site = content["site"]
    table = pq.read_table(out / "features" / "latents.parquet")
    table = table.filter(pc.and_(pc.equal(table["site"], site), pc.not_equal(table["sign"], 0)))
    where = "the rewarded token" if site == "reward" else "sentence ends"
    own = content["sites"][site]
    rated = "no ratings were given, so features are chosen by contrast alone" if content["rated"] is None else f"{content['rated']} latents have a valid rating"  # fmt: skip
    yield Section(
        title="Safety features",
        text=f"Of {own['num_latents']} latents that fire at {where} of {content['num_select_pairs']:,} pairs ({own['num_prompts']} prompts), {own['num_significant']} tell chosen from rejected with the accepted share of false discoveries when prompts are swapped whole ({own['num_significant_pairs']} if pairs were independent, which they are not); {rated}. s is the reference's score; paired is the difference within pairs at equal length; effect is head weight times that difference, in reward units; off target is the share of other responses it fires on.",
        columns=(
            "latent",
            "speaks for",
            "weight",
            "s",
            "paired",
            "95 % interval",
            "q",
            "effect",
            "fires",
            "off target",
        ),
        rows=[
            (
                row["latent"],
                "chosen" if row["sign"] > 0 else "rejected",
                signed(row["weight"]),
                signed(row["score"], 2),
                signed(row["paired"], 2),
                signed_span((row["low"], row["high"]), 2),
                f"{row['q']:.2g}",
                signed(row["effect"]),
                share(row["density"]),
                share(row["off_target"]),
            )
            for row in table.slice(0, _SHOWN).to_pylist()
        ],
    )
    if content.get("agreement"):
        yield agreement_section("safety", content["agreement"])
    yield Section(
        title="Other thresholds",
        text="How many features would be selected, and how far they overlap with those in use (Jaccard).",
        columns=("threshold", "features", "overlap"),
        rows=[(row["threshold"], row["features"], f"{row['jaccard']:.2f}") for row in content["thresholds"]],
    )


def _causal(content: Mapping[str, Any]) -> Iterable[Section]:
    if inside := content.get("inside"):
        yield _inside(content, inside)
        if terms := content.get("terms"):
            yield terms_section(terms)
        if cut := content.get("sentences"):
            yield _sentences_cut(cut)
        return
    yield _effects(content)
    yield _before_topk(content["upstream"])
    yield _curves(content["curves"])
    if cut := content.get("sentences"):
        yield _sentences_cut(cut)


def _effects(content: Mapping[str, Any]) -> Section:
    """Every intervention beside its controls."""
    zero, swap, up = content["zeroed"], content["swap"], content["upstream"]
    tests = [
        ("head weights set to zero", "exact", zero, zero.get("ratio_ci95")),
        (
            f"head weight of latent {content['strongest']['latent']} alone set to zero",
            "exact",
            content["strongest"],
            content["strongest"]["ratio_ci95"],
        ),
        ("latents swapped between chosen and rejected", "exact", swap, None),
        ("directions removed before TopK", "evidence", up["removed"], None),
        ("directions added before TopK", "evidence", up["added"], None),
    ]
    return Section(
        title="What the features cause",
        text=f"Mean change of the margin of {content['num_pairs']:,} target pairs of {content['num_prompts']} prompts that had no part in choosing the {content['num_features']} features, beside {content['num_controls']} sets of as many random latents matched on density and weight ({content['num_upstream_controls']} before TopK; {content['strongest']['num_controls']} nearest latents for the strongest feature alone). The change itself is exact in the first two rows (closed form and rerun differ by {zero['rerun_gap']:.1e}); that it exceeds the controls is evidence in all.",
        columns=("intervention", "the change is", "margin", "controls: median size", "95th percentile", "ratio", "p"),
        rows=[
            (
                name,
                kind,
                signed(effect["value"]),
                f"{effect['control_median']:.3f}",
                f"{effect['control_95']:.3f}",
                _ratio(effect, ends),
                f"{effect['p']:.3g}",
            )
            for name, kind, effect, ends in tests
        ],
    )


def _inside(content: Mapping[str, Any], inside: Mapping[str, Any]) -> Section:
    """Features removed inside a classifier, by patching and to first order."""
    names = {"all": "at all tokens", "rewarded": "at the rewarded token"}
    return Section(
        title="What the features cause",
        text=f"Evidence. The codes of the {content['num_features']} features are set to 0 at the dictionary's layer, what the dictionary does not explain is passed on, and the blocks behind run again (patching). Mean change of the margin of {content['num_pairs']:,} target pairs of {content['num_prompts']} prompts that had no part in choosing them, beside {content['num_controls']} sets of as many random latents matched on density and linear weight. A deep model's reward has no exact terms; linear is what the gradient foresees. Its error is the mean distance from patching over the mean size of the patched change of a reward: where it is large, the linear figures say little. Correlations are over responses, and over the sets.",
        columns=(
            "removed",
            "margin",
            "95 % interval",
            "controls: median size",
            "95th percentile",
            "ratio",
            "p",
            "linear",
            "its error",
            "correlation",
            "over sets",
            "accuracy before",
            "after",
        ),
        rows=[
            (
                names[scope],
                signed(own["value"]),
                signed_span(own["patched_ci95"]),
                f"{own['control_median']:.3f}",
                f"{own['control_95']:.3f}",
                _ratio(own, None),
                f"{own['p']:.3g}",
                signed(own["linear"]),
                "n/a" if own["error"] is None else share(own["error"]),
                signed(own["correlation"], 2),
                signed(own["correlation_sets"], 2),
                share(own["accuracy_before"]),
                share(own["accuracy_after"]),
            )
            for scope, own in inside.items()
        ],
    )


def _before_topk(upstream: Mapping[str, Any]) -> Section:
    """What of a change of the residual is left after TopK."""
    return Section(
        title="Before TopK against the head alone",
        text="Where a direction is taken from the residual, latents that had lost against it come in. The realised share is what is left of the change that the head alone would give.",
        columns=(
            "intervention",
            "realised",
            "95 % interval",
            "head alone",
            "realised share",
            "accuracy before",
            "after",
        ),
        rows=[
            (
                name,
                signed(upstream[name]["value"]),
                signed_span(upstream[name]["realised_ci95"]),
                signed(upstream[name]["linear"]),
                "n/a" if upstream[name]["realised_share"] is None else share(upstream[name]["realised_share"]),
                share(upstream[name]["accuracy_before"]),
                share(upstream[name]["accuracy_after"]),
            )
            for name in ("removed", "added")
        ],
    )


def _curves(curves: Mapping[str, Any]) -> Section:
    """Comprehensiveness and sufficiency of growing sets of latents."""
    own, random = curves["ordered"], curves["random"]
    return Section(
        title="Comprehensiveness and sufficiency",
        text=f"Latents in the order of their mean contribution on the selecting pairs, against random orders. AOPC {curves['aopc']['value']:.3f}, random median {curves['aopc']['control_median']:.3f} (p {curves['aopc']['p']:.3g}). The share of the margin that is lost without them is the share that they keep alone, exactly, since the head is linear. Accuracy with all latents {share(curves['accuracy'])}.",
        columns=(
            "latents",
            "share of the margin",
            "random",
            "accuracy without",
            "random",
            "accuracy with them alone",
            "random",
        ),
        rows=[
            (
                m,
                *(
                    share(side[name][i])
                    for name in ("margin_share", "accuracy_without", "accuracy_only")
                    for side in (own, random)
                ),
            )
            for i, m in enumerate(curves["sizes"])
        ],
    )


def _sentences_cut(cut: Mapping[str, Any]) -> Section:
    """Responses without the sentence that the features fire most at, beside a placebo."""
    title = "Sentences cut out"
    if not cut["num_responses"]:
        return Section(title=title, text="No target response has two sentences that the features tell apart.")
    return Section(
        title=title,
        text=f"Evidence: {cut['num_responses']} target responses without the sentence that the features fire most at, run through the model again; the placebo lacks another sentence. Change of the features' |w| z at the rewarded token.",
        columns=("cut", "change", "95 % interval"),
        rows=[
            (name.replace("_", " "), signed(cut[name]["value"]), signed_span(cut[name]["ci95"]))
            for name in ("own_sentence", "placebo", "difference")
        ],
    )


def _ratio(effect: Mapping[str, Any], ends: Sequence[float | None] | None) -> str:
    # No number: half of the controls do nothing at all.
    shown = "n/a" if effect["ratio"] is None else f"{effect['ratio']:.2f}"
    return shown if ends is None or None in ends else f"{shown} ({ends[0]:.2f} to {ends[1]:.2f})"
