"""The page of the watch, with texts that would like to run something."""

from html.parser import HTMLParser

import pytest
from tests.report.hostile import STRINGS

from sarm.report.drift_page import drift_page


def content(text: str) -> dict:
    paid = {"latent": 7, "name": text, "baseline": 0.0, "now": 1.0, "shift": 1.0, "rate": 0.5, "strength": 0.5, "evidence": 9.0}  # fmt: skip
    return {
        "run": "a", "split": "train", "variant": "base", "state": "alarm", "steps": 30, "answers": 300, "shift": 1.0,
        "concentration": 1.0, "signals": {"injected": {"baseline": 0.0, "now": 0.5, "evidence": 8.0}}, "paid": [paid],
        "alarms": [{"step": 25, "latents": [paid], "signals": ["injected"], "shift": 1.0, "rollouts": [{"latent": 7, "contribution": 1.0, "reward": 2.0, "text": text}]}],
        "suspects": [{"latent": 7, "name": text, "contexts": [text]}],
        "answer": {"command": "python jobs/steer.py", "path": "/v1", "variant": {"name": "x", "weights": []}},
        "history": [{"step": 0.0, "reward": 1.0}, {"step": 1.0, "reward": 2.0}],
    }  # fmt: skip


def tags(page: str) -> list[str]:
    """Every element of a page in order."""
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(f"{tag} {sorted(name for name, _ in attributes)}")  # type: ignore[method-assign]
    parser.feed(page)
    return found


@pytest.mark.parametrize("number", range(len(STRINGS)))
def test_nothing_that_is_watched_runs_in_the_page(number):
    page = drift_page([content(STRINGS[number])], STRINGS[number])
    assert tags(page) == tags(drift_page([content("plain")], "plain"))
    assert "Alarm at step 25" in page
    assert "rollouts that drive it" in page


def test_a_page_without_streams_says_so():
    assert "Nothing has been watched yet" in drift_page([], "m")
    young = {**content("x"), "shift": None, "alarms": [], "state": "baseline", "history": []}
    assert "the baseline is not complete" in drift_page([young], "m")
