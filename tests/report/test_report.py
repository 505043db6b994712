import dataclasses
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from sarm.contracts.tables import CONTEXTS_TABLE, FEATURES_TABLE
from sarm.data.sources.shown_text import clean_text, escape_markdown
from sarm.interpret.attribution import LatentShare, PairExplanation
from sarm.report.citation import Citation
from sarm.report.numbers import number, seconds, share, signed, span
from sarm.report.report import (
    Report,
    as_dict,
    describe_features,
    describe_pair,
    to_html,
    to_json,
    to_markdown,
    write_report,
)
from sarm.report.summary import print_summary

PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</title></head><body onload=alert(1)>",
    "<svg/onload=alert(1)>",
    "<!--<script>-->",
    "]]><iframe src=javascript:alert(1)>",
    "</details></p><a href='javascript:alert(1)'>x</a>",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "<\x00script>alert(1)</script>",
    "&lt;script&gt;&#x3c;script&#x3e;",
]


def citation(text):
    return Citation(
        title=text,
        date="2026-03-01",
        version="1.2.3",
        commits=("a" * 40, "b" * 40),
        sources={"preferences": text},
        seed=0,
        manifests={"model": "c" * 64, "preferences": "d" * 64},
        command=text,
    )


def report_with(text="plain text", **changes):
    feature = {
        "latent": 7,
        "weight": 0.5,
        "mean_contribution": 0.25,
        "frequency": 0.125,
        "names": {"terms": [text, "word"], "auc": 0.91},
        "contexts": [{"value": 2.5, "side": text, "text": text}],
    }
    explanation = PairExplanation("id " + text, 1.5, 0.5, 1.0, (LatentShare(7, 0.5, 2.0, 0.0, 1.0),), 0.0, 2)
    values = {
        "title": text,
        "facts": {"model": text, "k": 8},
        "headline": {
            "heldout_accuracy": 0.75,
            "fvu": float("nan"),
            "peak_rss_gb": np.float32(3.5),
            "name " + text: text,
        },
        "accuracies": [
            {"name": "SARM " + text, "accuracy": 0.75, "ci95": [0.7, 0.8]},
            {"name": "random", "accuracy": 0.5, "ci95": None},
        ],
        "stages": [{"stage": text, "seconds": 61.0, "own_seconds": 61.0, "figures": text}],
        "subsets": {
            text: {"num_pairs": 4, "num_prompts": 2, "accuracy": 0.75, "accuracy_ci95": [0.7, 0.8], "ece": np.nan},
            "none " + text: {"num_pairs": 0, "note": text},
        },
        "calibration": {"nll": 0.6, "brier": 0.2, "ece": 0.1},
        "raising": [feature],
        "lowering": [{**feature, "mean_contribution": -0.25}],
        "pairs": [describe_pair(explanation, text, text, text)],
        "rejected_rows": {text: 3},
        "figures": {text: "<svg viewBox='0 0 1 1'><script>alert(1)</script></svg>"},
        "notes": [text],
        "citation": citation(text),
        "ui_command": text,
    }
    return Report(**{**values, **changes})


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.images = Counter(), Counter(), []
        self.ids, self.links = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements[tag] += 1
        self.attributes.update((tag, name) for name, _ in attrs)
        self.images += [value for name, value in attrs if name == "src"]
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name == "href"]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_texts_add_no_element_and_no_attribute(payload):
    harmless, hostile = Elements(to_html(report_with())), Elements(to_html(report_with(payload)))
    assert hostile.elements == harmless.elements
    assert hostile.attributes == harmless.attributes


def test_hostile_texts_are_shown_as_they_are():
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in to_html(report_with(PAYLOADS[0]))
    assert "{{ 7 * 7 }}" in to_html(report_with("{{ 7 * 7 }}"))


def test_page_asks_the_network_for_nothing_and_runs_nothing():
    html = to_html(report_with())
    parsed = Elements(html)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert not parsed.elements.keys() & {"script", "link", "iframe", "object", "form"}
    assert all(link.startswith("#") for link in parsed.links)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in parsed.images)
    assert "url(" not in html
    assert "@import" not in html


def test_contexts_and_responses_are_folded_behind_a_notice():
    html = to_html(report_with("unique harmful sentence", title="t", facts={}, notes=[]))
    outside = re.sub(r"<details>.*?</details>", "", html, flags=re.DOTALL)
    assert html.count('<span class="notice">may contain harmful text</span>') == 3
    assert not re.search(r'<p (class="text" )?dir="auto">', outside)


def test_headline_accuracy_stands_before_features_pairs_curves_and_details():
    html = to_html(report_with())
    marks = ["Held-out pairwise accuracy", "Features behind", "Pairs explained", "Curves and", ">Details<"]
    places = [html.index(mark) for mark in marks]
    assert places == sorted(places)


def test_every_section_figure_and_table_has_an_anchor_of_its_own_that_stands_in_the_page():
    svg = "<svg viewBox='0 0 1 1'></svg>"
    html = to_html(report_with(figures={"Held-out accuracy": svg, "SAE training": svg}))
    parsed = Elements(html)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert set(parsed.links) <= {f"#{one}" for one in parsed.ids}
    tables = ["pair-1", "table-stages", "table-subsets", "table-calibration", "table-refused"]
    sections = ["features", "pairs", "figures", "details", "cite"]
    assert {"accuracy", "key-figures", *sections, *tables, "figure-held-out-accuracy", "figure-sae-training"} == set(parsed.ids)  # fmt: skip
    numbered = dict(re.findall(r'href="#([^"]+)">((?:Table|Figure) \d)</a>', html))
    assert [numbered[anchor] for anchor in tables] == [f"Table {number}" for number in range(1, 6)]
    assert [numbered["figure-held-out-accuracy"], numbered["figure-sae-training"]] == ["Figure 1", "Figure 2"]
    # A figure that is missing moves numbers, and no anchor.
    assert "figure-sae-training" in Elements(to_html(report_with(figures={"SAE training": svg}))).ids


def test_a_report_says_how_it_is_cited_in_all_three_of_its_files():
    report = report_with("run 1")
    rows = report.citation.rows()
    assert list(rows) == ["report", "evaluated (UTC)", "written by", "code", "preferences", "seed", "model: manifest (SHA-256)", "preferences: manifest (SHA-256)", "command"]  # fmt: skip
    html, markdown, content = to_html(report), to_markdown(report), as_dict(report)
    for text in ("2026-03-01", "sarm 1.2.3", "a" * 40, "c" * 64):
        assert text in html
        assert text in markdown
        assert text in json.dumps(content["citation"])
    assert content["citation"]["bibtex"] == (
        "@misc{sarm-run-1-cccccccc,\n  title = {Reward model report: run 1},\n  year = {2026},\n  month = {03},\n"
        f"  howpublished = {{sarm 1.2.3, code {'b' * 12}}},\n"
        f"  note = {{SHA-256 of the manifests begins with: model {'c' * 16}, preferences {'d' * 16}}},\n}}"
    )
    assert f"<pre>{content['citation']['bibtex']}</pre>" in html
    assert 'id="cite"' not in to_html(report_with(citation=None))


@pytest.mark.parametrize("payload", [*PAYLOADS, "}\n}\n@misc{x, title={", r"\input{/etc/passwd} 100% #1 $x$ a_b ~^"])
def test_no_title_leaves_its_field_of_the_bibtex_entry(payload):
    entry = citation(payload).entry()
    lines = entry.splitlines()
    assert [line.partition(" = ")[0].strip() for line in lines[1:-1]] == ["title", "year", "month", "howpublished", "note"]  # fmt: skip
    assert re.fullmatch(r"@misc\{[a-z0-9-]+,", lines[0])
    assert entry.count("{") == entry.count("}")
    assert not re.search(r"\\(?!textbackslash|textbrace|textascii|[#$%&_])", entry)


def test_json_is_strict_and_has_the_headline_at_the_top():
    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(to_json(report_with()), parse_constant=refuse)
    assert (content["heldout_accuracy"], content["fvu"], content["peak_rss_gb"]) == (0.75, None, 3.5)
    assert content["figures"] == ["plain text"]
    assert content["subsets"]["plain text"]["ece"] is None


def test_headline_names_that_would_hide_a_section_are_refused():
    with pytest.raises(ValueError, match="stages"):
        as_dict(report_with(headline={"stages": 3}))


def test_a_report_with_a_title_only_is_a_report():
    report = Report(title="empty")
    assert "empty" in to_html(report)
    assert to_markdown(report) == "# empty\n"
    assert as_dict(report)["raising"] == []


def test_markdown_tables_keep_their_columns_whatever_the_text():
    text = "a | b\n| c ![x](http://example.org/x.png) <img src=x>"
    markdown = to_markdown(report_with(text))
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    by_width = Counter(len(re.findall(r"(?<!\\)\|", line)) for line in table)
    assert set(by_width) == {3, 4, 5, 6}
    assert "![" not in markdown
    assert "<img" not in markdown


def test_escape_markdown_leaves_one_harmless_line():
    assert escape_markdown("# a\n*b* <c> | `d` & [e](f)") == r"\# a \*b\* &lt;c&gt; \| \`d\` &amp; \[e\]\(f\)"


def test_long_texts_keep_their_end():
    text = clean_text("start " + "x" * 400 + " the end", 300)
    assert text.startswith("…")
    assert text.endswith("the end")
    assert len(text) <= 301
    (context,) = as_dict(report_with("y" * 999))["raising"][0]["contexts"]
    assert len(context["text"]) == 301


def test_clean_text_removes_what_moves_cursors_and_keeps_line_breaks():
    dirty = "a\x1b[31mred\x1b[0m\x1b]0;title\x07\x00\x9bb\u202ec\ud800\r\nd\te"
    assert clean_text(dirty) == "aredbc\nd\te"


def test_files_with_lone_surrogates_and_nulls_can_be_written(tmp_path):
    files = write_report(report_with("a\ud800\x00b"), tmp_path)
    assert json.loads(files.json.read_text(encoding="utf-8"))["title"] == "ab"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_features_are_described_with_their_own_strongest_contexts():
    features = pa.Table.from_pylist(
        [{f.name: i if f.name == "latent" else 0.5 for f in FEATURES_TABLE} for i in (9, 2)], schema=FEATURES_TABLE
    )
    contexts = pa.Table.from_pylist(
        [
            {"latent": i, "rank": rank, "value": 9.0 - rank, "side": "chosen", "doc_id": "d", "text": f"{i}/{rank}"}
            for i, rank in ((2, 2), (2, 1), (2, 3), (5, 1))
        ],
        schema=CONTEXTS_TABLE,
    )
    first, second = describe_features(features, contexts, 2)
    assert (first["latent"], first["contexts"], first["mean_contribution"]) == (9, [], 0.5)
    assert [c["text"] for c in second["contexts"]] == ["2/1", "2/2"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(None), "n/a"),
        (number(12345), "12,345"),
        (number(0.123456), "0.1235"),
        (signed(-0.5), "−0.500"),
        (signed(None), "n/a"),
        (seconds(8.44), "8.4 s"),
        (seconds(187), "3 min 07 s"),
        (seconds(7500), "2 h 05 min"),
        (share(-0.123), "−12.3 %"),
        (share(None), "n/a"),
        (span((0.5, 0.625)), "50.0 % to 62.5 %"),
    ],
)
def test_numbers_are_written_for_people(shown, expected):
    assert shown == expected


def printed(report, width):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_summary(json.loads(to_json(report)), Path("/runs/a/" + "long/" * 20 + "report.html"), console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_summary_fits_the_terminal_and_says_what_matters(width):
    output = printed(report_with(title="run", ui_command="mlflow ui"), width)
    framed = [line for line in output.splitlines() if line.startswith(("│", "╭", "╰"))]
    assert {len(line) for line in framed} == {width}
    for expected in ("75.0 %", "70.0 % to 80.0 %", "1 min 01 s", "+0.250", "−0.250", "plain text", "mlflow ui"):
        assert expected in output
    # Whole, so that it can be copied.
    assert "/runs/a/" + "long/" * 20 + "report.html" in output


def test_summary_shows_the_end_of_a_context_and_obeys_none_of_it():
    output = printed(report_with("start [bold red]\x1b[2J " + "x" * 300 + " [/bold] the end", title="run"), 80)
    assert "[/bold] the end" in output
    assert "\x1b" not in output


def test_summary_names_features_by_words_and_says_how_well_they_tell():
    report = report_with("the last words", title="run")
    names = {"auc": 0.874, "terms": ["sorry", "cannot", "w" * 90]}
    report = dataclasses.replace(report, raising=[{**report.raising[0], "names": names}])
    output = printed(report, 80)
    assert "sorry, cannot, w" in output
    assert "… (0.87)" in output
    assert {len(line) for line in output.splitlines() if line.startswith("│")} == {80}


def test_summary_of_an_empty_report_prints_its_path():
    assert "report.html" in printed(Report(title="empty"), 80)


def test_the_time_of_a_pass_that_made_two_folders_is_in_the_total_once():
    rows = [{"stage": name, "seconds": 62.0, "own_seconds": 31.0, "figures": ""} for name in ("chat", "turn ends")]
    output = printed(report_with(title="run", stages=rows), 120)
    (total,) = [line for line in output.splitlines() if "total" in line]
    assert "1 min 02 s" in total
