"""The one renderer: what every page has from it, whatever its template shows."""

import html as entities
import re

import pytest

from sarm.report.pages import Page, Section, to_html, to_markdown
from sarm.report.render import TEMPLATES, cell, html, markdown, picture, shown, table

DIRTY = "a\x1b[31mb\u202ec\ud800<b>"


def test_whatever_a_template_shows_is_cleaned_and_escaped():
    row = [DIRTY, DIRTY]
    section = {"title": DIRTY, "text": DIRTY, "dots": None, "columns": row, "rows": [row]}
    page = html("page", title=DIRTY, facts={DIRTY: DIRTY}, notes=[DIRTY], sections=[section], pictures=[picture(DIRTY, "<svg/>")])  # fmt: skip
    assert page.count("abc&lt;b&gt;") == 13
    assert "<b>c" not in page
    assert not re.search("[\x00-\x08\x1b\u202e\ud800]", page)


def test_a_script_is_a_constant_that_stands_as_it_is_and_alone():
    page = html("page", title="t", facts={}, script="a < b && c", sections=[], pictures=[])
    assert re.findall(r"<script>(.*?)</script>", page) == ["a < b && c"]
    assert "<script" not in html("page", title="t", facts={}, sections=[], pictures=[])


def test_a_value_that_a_template_lacks_is_an_error_and_not_an_empty_text():
    with pytest.raises(Exception, match="pictures"):
        html("page", title="t", facts={}, sections=[])


def test_all_pages_share_one_style():
    styles = [path for path in TEMPLATES.glob("*.j2") if ":root" in path.read_text()]
    assert [path.name for path in styles] == ["style.css.j2"]


def test_markdown_has_one_line_for_each_cell_and_leaves_out_what_is_empty():
    text = markdown("a\nb", {"k|": 1234}, ["n"], ["", table(("x", "y"), [[cell("1|2"), cell(None)]])])
    assert text == "# a b\n\nk\\| 1,234\n\n> n\n\n| x | y |\n| --- | --- |\n| 1\\|2 | n/a |\n"


def test_what_is_shown_keeps_its_end_and_numbers_are_for_people():
    assert shown("x" * 500 + " end", 10) == "…xxxxxx end"
    assert (shown(12345), shown(True), entities.unescape(cell("<b>"))) == ("12,345", "True", "<b>")


def test_a_page_keeps_the_beginning_of_its_own_sentences_and_the_end_of_values():
    paragraph = "The audit begins here. " + "It goes on. " * 60 + "It ends here."
    value = "start " + "x" * 500 + " end"
    page = Page(title="A page", facts={}, notes=[paragraph], sections=[Section(title="A section", text=paragraph, columns=("a",), rows=[(value,)])])  # fmt: skip
    for shown_page in (to_html(page), to_markdown(page)):
        assert shown_page.count("The audit begins here.") == shown_page.count("It ends here.") == 2
        assert "start x" not in shown_page
        assert "x end" in shown_page
