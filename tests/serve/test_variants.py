"""Edited heads that are posted: scored at once, listed, deleted, kept over restarts, and of no other model."""

import json

import pytest
from starlette.testclient import TestClient
from tests.serve.asked import ANSWERS, PROMPT

from sarm.data.formats.sarm_folder import load_sarm
from sarm.serve.app import make_app
from sarm.serve.loading import load_service
from sarm.settings.checks import UserError
from sarm.settings.serving import Serving

PATH = "/v1/models/sarm/variants"


def started(served, folder):
    service = load_service(Serving(model=served, threads=1, variants_folder=folder, variants=(f"even_off={served.parent / 'edit.json'}",)))  # fmt: skip
    return service, TestClient(make_app(service))


def edit_of(served, latents, after=0.0):
    weight_S = load_sarm(served).score.weight[0].detach()
    return [{"latent": n, "before": weight_S[n].item(), "after": after} for n in latents]


def rewards(client, name):
    body = {"items": [{"prompt": PROMPT, "completions": ANSWERS}], "variants": [name], "scale": "raw"}
    response = client.post("/v1/rewards", json=body)
    assert response.status_code == 200, response.text
    return [answer["reward"] for answer in response.json()["items"][0]["answers"]]


def test_a_posted_variant_scores_is_kept_and_can_be_deleted(served, tmp_path):
    service, client = started(served, tmp_path / "kept")
    found = client.post(PATH, json={"name": "odd_off", "weights": edit_of(served, range(1, 96, 2))})
    assert found.status_code == 200, found.text
    assert found.json()["variants"] == [
        {"name": "base", "edited": 0, "fixed": True},
        {"name": "even_off", "edited": 48, "fixed": True},
        {"name": "odd_off", "edited": 48, "fixed": False},
    ]
    own = rewards(client, "odd_off")
    total = [a + b for a, b in zip(own, rewards(client, "even_off"), strict=True)]
    assert total == pytest.approx(rewards(client, "base"), abs=1e-4)
    service.close()

    service, client = started(served, tmp_path / "kept")
    assert rewards(client, "odd_off") == own
    assert client.delete(f"{PATH}/odd_off").status_code == 200
    assert client.post("/v1/rewards", json={"items": [{"messages": [*PROMPT, {"role": "assistant", "content": "a"}]}], "variants": ["odd_off"]}).status_code == 404  # fmt: skip
    service.close()
    service, client = started(served, tmp_path / "kept")
    assert [one["name"] for one in client.get(PATH).json()["variants"]] == ["base", "even_off"]
    service.close()


def test_what_does_not_fit_is_refused_and_nothing_is_kept(served, tmp_path):
    service, client = started(served, tmp_path / "kept")
    good = edit_of(served, [3])
    for body, status in [
        ({"name": "even_off", "weights": good}, 409),
        ({"name": "base", "weights": good}, 409),
        ({"name": "x", "weights": [{**good[0], "before": 123.0}]}, 422),
        ({"name": "x", "weights": [{**good[0], "latent": 96}]}, 422),
        ({"name": "x", "weights": []}, 422),
        ({"name": "../x", "weights": good}, 422),
        ({"name": "x\n", "weights": good}, 422),
        ({"name": "x", "weights": [{**good[0], "after": "1"}]}, 422),
        ({"name": "x"}, 422),
    ]:
        assert client.post(PATH, json=body).status_code == status, body
    assert client.post(PATH, content=b"{").status_code == 400
    assert client.post("/v1/models/other/variants", json={"name": "x", "weights": good}).status_code == 404
    assert client.delete(f"{PATH}/base").status_code == client.delete(f"{PATH}/even_off").status_code == 409
    assert client.delete(f"{PATH}/nobody").status_code == 404
    assert not (tmp_path / "kept").exists()
    service.close()


def test_a_variant_that_cannot_be_kept_is_not_there(served, tmp_path):
    (tmp_path / "file").write_text("")
    service, client = started(served, tmp_path / "file" / "kept")
    assert client.post(PATH, json={"name": "x", "weights": edit_of(served, [3])}).status_code == 507
    assert len(client.get(PATH).json()["variants"]) == 2
    service.close()


def test_a_kept_edit_of_another_head_is_refused_at_the_start(served, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"weights": [{"latent": 0, "before": 123.0, "after": 0.0}]}))
    with pytest.raises(UserError, match="not those that this edit was made for"):
        started(served, tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="holds no edit"):
        started(served, tmp_path)


def test_variants_are_behind_the_token(service):
    client = TestClient(make_app(service, "correct-horse-battery"))
    assert client.post(PATH, json={}).status_code == 401
    assert client.get(PATH).status_code == 401
    assert client.delete(f"{PATH}/x").status_code == 401


def test_a_broken_file_is_no_variant_and_costs_nobody_else_an_answer(served, tmp_path, caplog):
    service, client = started(served, tmp_path)
    assert client.post(PATH, json={"name": "good", "weights": edit_of(served, range(1, 96, 2))}).status_code == 200
    (tmp_path / "bad.json").write_text('{"weights": [{"latent"')
    (tmp_path / "no name.json").write_text(json.dumps({"weights": edit_of(served, [3])}))
    (tmp_path / "other.json").write_text(json.dumps({"weights": [{"latent": 0, "before": 123.0, "after": 0.0}]}))
    body = {"items": [{"prompt": PROMPT, "completions": ANSWERS}], "variants": ["bad"]}
    assert client.post("/v1/rewards", json=body).status_code == 404
    assert rewards(client, "good") != rewards(client, "base")
    assert [one["name"] for one in client.get(PATH).json()["variants"]] == ["base", "even_off", "good"]
    assert client.delete(f"{PATH}/bad").status_code == 200
    assert client.post(PATH, json={"name": "other", "weights": edit_of(served, range(96))}).status_code == 200
    assert rewards(client, "other") != rewards(client, "base")
    service.close()


def test_a_variant_that_another_server_exchanged_is_read_again(served, tmp_path):
    (one, first), (other, second) = started(served, tmp_path), started(served, tmp_path)
    assert first.post(PATH, json={"name": "x", "weights": edit_of(served, range(1, 96, 2))}).status_code == 200
    assert rewards(first, "x") == rewards(second, "x")
    assert first.delete(f"{PATH}/x").status_code == 200
    assert first.post(PATH, json={"name": "x", "weights": edit_of(served, [3])}).status_code == 200
    assert rewards(first, "x") == rewards(second, "x")
    one.close()
    other.close()
