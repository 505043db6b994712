"""Feature pages from stores that are hostile throughout: nothing of a text becomes part of a page, and the page still works."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.report import browser
from tests.report.hostile import STRINGS, store

from sarm.contracts.folders import EXPLANATIONS_FOLDER
from sarm.contracts.tables import PAIR_SCORES_TABLE, PAIRS_TABLE
from sarm.interpret.attribution import pair_contributions
from sarm.interpret.feature_data import add_explanations, add_pairs, feature_names, features, nearest
from sarm.report.feature_pages import histogram, write_feature_pages
from sarm.report.saedashboard import dashboard
from sarm.settings.checks import UserError
from sarm.settings.contexts import PagesSettings

NUM_LATENTS = 45
SETTINGS = PagesSettings(per_page=20)


class Page(HTMLParser):
    """Tags, attributes and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.names, self.addresses, self.folded, self._open = set(), set(), [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}
        self.addresses += [value for name, value in attributes if name in ("href", "src", "action", "data", "srcdoc")]
        self._open += tag == "details"

    def handle_endtag(self, tag):
        self._open -= tag == "details"

    def handle_data(self, text):
        if "window.hit" in text:
            self.folded.append(self._open > 0)


def explanations(folder, latents, text, status="ok"):
    columns = {
        "latent": pa.array(latents, pa.int32()), "place": ["rewarded"] * len(latents), "explainer": [text] * len(latents),
        "explanation": [text] * len(latents), "status": [status] * len(latents), "detection": [0.82] * len(latents),
        "detection_low": [0.71] * len(latents), "detection_high": [0.9] * len(latents), "monosemanticity": [4.0] * len(latents),
        "reason": [text] * len(latents),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "explanations.parquet")
    manifest = {
        "schema": EXPLANATIONS_FOLDER,
        "created": "",
        "git_commit": "",
        "config": {},
        "inputs": {},
        "counts": {},
        "files": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    weight = np.linspace(-1, 1, NUM_LATENTS)
    found = features(store(NUM_LATENTS, STRINGS), np.eye(NUM_LATENTS), weight, SETTINGS)
    folder = tmp_path_factory.mktemp("explanations")
    add_explanations(found, explanations(folder, list(range(0, NUM_LATENTS, 2)), STRINGS[11]))
    pairs = pa.Table.from_pylist(
        [{"pair_id": "p", "prompt_id": "q", "prompt": [{"role": "user", "content": STRINGS[0]}], "chosen": STRINGS[9], "rejected": STRINGS[13], "source": "s", "split": "heldout"}],
        schema=PAIRS_TABLE,
    )  # fmt: skip
    scores = pa.Table.from_pylist(
        [{"pair_id": "p", "prompt_id": "q", "chosen_reward": 1.0, "rejected_reward": 0.0, "chosen_tokens": 3, "rejected_tokens": 3, "chosen_latents": [0, 1], "chosen_values": [1.0, 2.0], "rejected_latents": [1], "rejected_values": [0.5]}],
        schema=PAIR_SCORES_TABLE,
    )  # fmt: skip
    add_pairs(found, scores, pairs, weight, 3)
    return found


@pytest.fixture(scope="module")
def files(shown, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return write_feature_pages(shown, STRINGS[4], {STRINGS[3]: STRINGS[11]}, [STRINGS[0]], folder)


def test_no_text_becomes_a_tag_an_attribute_or_an_address(files):
    for path in files[:-1]:
        page = Page(path.read_text())
        assert page.tags <= {
            "html", "head", "meta", "title", "style", "body", "header", "main", "h1", "h2", "p", "a", "b", "ul", "ol", "li", "div", "span", "details",
            "summary", "section", "dl", "dt", "dd", "svg", "rect", "line", "text", "mark", "i", "br", "table", "colgroup", "col",
            "thead", "tbody", "tr", "th", "td", "button", "input", "select", "option", "output", "script",
        }  # fmt: skip
        assert not [name for name in page.names if name.startswith("on") or name == "srcdoc"]
        assert all(re.fullmatch(r"features(-\d{3})?\.html(#latent-\d+)?", address) for address in page.addresses)
        assert path.read_text().count("<script") == (1 if path.name == "features.html" else 0)


def test_texts_are_folded_behind_a_notice(files, shown):
    for one in shown:
        one_of = files[one["page"]]
        assert f'id="latent-{one["latent"]}"' in one_of.read_text()
    page = Page(files[-2].read_text())
    # The title, and the labels and explanations, stand open; contexts, prompts and pairs do not.
    assert sum(page.folded) > 10 * sum(not folded for folded in page.folded) / 2
    contexts = re.findall(r"<ol class=\"contexts\">", files[-2].read_text())
    assert contexts
    assert "may contain harmful text" in files[-2].read_text()


def test_the_summary_is_inert_markdown(files):
    text = files[-1].read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert len(re.findall(r"^\| \d+ \|", text, re.MULTILINE)) == min(50, NUM_LATENTS)


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_in_a_browser_no_string_runs_nothing_is_fetched_and_search_and_sort_work(files):
    for found in browser.open_pages(files[:-1]):
        assert found["hit"] is None
        assert found["dialogs"] == []
        assert found["outside"] == []
        assert found["phone"] <= 390, "a phone must not have to scroll sideways"
    index = browser.open_pages(files[:1])[0]
    assert index["scripts"] == 1
    assert index["rows"] == NUM_LATENTS
    assert all("3" in latent for latent in index["searched"][:1])
    assert index["sorted"] == ["0", "1", "2"]


def test_the_figures_of_a_feature_are_those_of_its_latent(shown):
    assert [abs(one["contribution"]) for one in shown] == sorted(
        (abs(one["contribution"]) for one in shown), reverse=True
    )
    one = next(one for one in shown if one["latent"] == 44)
    assert one["weight_rank"] in (1, 2)
    assert one["contribution"] == pytest.approx(1.0 * (0.5 + 44 % 3 + 0.25) / 2)
    assert one["margin"] == pytest.approx(0.5 + 44 % 3 - 0.25)
    assert [
        len(one["contexts"][name]) for name in ("rewarded_top", "rewarded_decile", "sentence_top", "sentence_decile")
    ] == [3] * 4
    assert one["explanations"][0]["detection"] == 0.82
    moved = next(one for one in shown if one["latent"] == 1)["pairs"][0]
    assert moved["contribution"] == pytest.approx(np.linspace(-1, 1, NUM_LATENTS)[1] * 1.5)


def test_pair_contributions_add_up_to_the_margin():
    rows = [
        {"pair_id": "p", "prompt_id": "q", "chosen_reward": 0.0, "rejected_reward": 0.0, "chosen_tokens": 1, "rejected_tokens": 1, "chosen_latents": [3, 0], "chosen_values": [1.0, 2.0], "rejected_latents": [0, 2], "rejected_values": [0.5, 1.0]}
    ]  # fmt: skip
    found = pair_contributions(pa.Table.from_pylist(rows, schema=PAIR_SCORES_TABLE), np.array([1.0, 2.0, -3.0, 4.0]))
    assert found.latent.tolist() == [0, 2, 3]
    assert found.contribution.tolist() == [1.5, 3.0, 4.0]


def test_nearest_latents_are_those_of_the_largest_cosine_among_the_ones_that_fire():
    W_dec = np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    found = nearest(W_dec, [0], [0, 1, 2, 3])[0]
    assert [one["latent"] for one in found] == [1, 2, 3]
    assert found[0]["cosine"] == pytest.approx(1 / np.hypot(1, 0.05))
    assert [one["latent"] for one in nearest(W_dec, [0], [0, 2, 3])[0]] == [2, 3]


def test_names_come_from_explanations_then_from_terms(tmp_path):
    folder = explanations(tmp_path / "e", [0], "mentions locks")
    assert feature_names(None, [0, 1], folder) == {0: "mentions locks"}
    refused = explanations(tmp_path / "r", [0], "x", status="refused")
    assert feature_names(None, [0, 1], refused) == {}
    assert feature_names(store(2, ["a word"]), [0], None)[0].startswith("terms: ")


def test_explanations_that_are_unfinished_or_of_another_kind_are_one_line(tmp_path, shown):
    with pytest.raises(UserError, match="no folder"):
        add_explanations(shown, tmp_path / "nowhere")
    folder = explanations(tmp_path / "e", [0], "x")
    (folder / "explanations.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="damaged"):
        add_explanations(shown, folder)


def test_a_histogram_without_counts_draws_nothing():
    assert histogram({"chosen": [0] * 40, "rejected": None})["bars"] == []
    bars = histogram({"chosen": [0] * 20 + [4] + [0] * 19, "rejected": [0] * 21 + [1] + [0] * 18})["bars"]
    assert [bar["kind"] for bar in bars] == ["up", "down"]
    assert bars[0]["height"] == pytest.approx(2 * bars[1]["height"], abs=0.2)


def test_the_dashboards_json_has_the_names_that_its_readers_expect(shown):
    batch = dashboard(shown, {"model": "m", "layer": 3}, {"model": "f" * 32})
    assert batch.keys() >= {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    feature = json.loads(json.dumps(batch, allow_nan=False))["features"][0]
    assert feature.keys() >= {
        "feature_index", "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "pos_str", "pos_values",
        "neg_str", "neg_values", "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1",
        "decoder_weights_dist", "activations",
    }  # fmt: skip
    assert len(feature["freq_hist_data_bar_values"]) == len(feature["freq_hist_data_bar_heights"])
    for row in feature["activations"]:
        assert len(row["tokens"]) == len(row["values"])
        assert max(row["values"]) == row["values"][row["qualifying_token_index"]]
