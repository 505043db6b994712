"""A page of another site can make a browser ask a server on its visitor's machine. Without a token such requests are refused."""

import pytest
from starlette.testclient import TestClient
from tests.serve.test_operations import BODIES

from sarm.serve.app import make_app
from sarm.serve.other_sites import fault_of, is_own_name

TOKEN = "correct-horse-battery"


@pytest.mark.parametrize(
    ("origins", "hosts", "passes"),
    [
        ([], ["127.0.0.1:8000"], True),
        ([], ["localhost:8000"], True),
        ([], ["[::1]:8000"], True),
        ([], ["reward-server:8000"], True),
        ([], [], True),
        (["http://127.0.0.1:8000"], ["127.0.0.1:8000"], True),
        (["http://LocalHost:8000"], ["localhost:8000"], True),
        (["http://[::1]:8000"], ["[::1]:8000"], True),
        (["https://box"], ["box"], True),
        (["https://evil.example"], ["127.0.0.1:8000"], False),
        # Another port is another server.
        (["http://127.0.0.1:3000"], ["127.0.0.1:8000"], False),
        (["http://localhost:8000"], ["127.0.0.1:8000"], False),
        (["null"], ["127.0.0.1:8000"], False),
        ([""], ["127.0.0.1:8000"], False),
        (["http://[::1"], ["[::1"], False),
        (["http://127.0.0.1:8000", "https://evil.example"], ["127.0.0.1:8000"], False),
        (["http://127.0.0.1:8000"], [], False),
        (["http://127.0.0.1:8000"], ["127.0.0.1:8000", "localhost:8000"], False),
        # A name that its owner has pointed to this machine.
        (["http://evil.example:8000"], ["evil.example:8000"], False),
        ([], ["evil.example:8000"], False),
        ([], ["evil.example.:8000"], False),
        ([], ["127.0.0.1.evil.example"], False),
    ],
)
def test_what_a_browser_says_decides(origins, hosts, passes):
    assert (fault_of(origins, hosts) is None) == passes


@pytest.mark.parametrize("host", ["user@evil.example", "127.0.0.1@evil.example:80", "[::1", "[evil.example]"])
def test_names_that_are_written_strangely_are_none_of_ours(host):
    assert not is_own_name(host)


@pytest.mark.parametrize("host", ["sub.localhost:8000", "localhost.", "10.0.0.7", "[fe80::1]:8000"])
def test_addresses_and_names_of_this_machine_are_ours(host):
    assert is_own_name(host)


def test_a_server_without_a_token_refuses_other_sites_and_answers_its_own_page(service):
    with TestClient(make_app(service), base_url="http://127.0.0.1:8000") as client:
        for path, body in BODIES.items():
            refused = client.post(path, json=body, headers={"Origin": "https://evil.example"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "other_site")
            # A form that no browser asks leave for.
            assert client.post(path, content="{}", headers={"Origin": "null", "Content-Type": "text/plain"}).status_code == 403  # fmt: skip
            assert client.post(path, json=body, headers={"Host": "evil.example"}).status_code == 403
            assert client.post(path, json=body, headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
            assert client.post(path, json=body).status_code == 200
        variants = "/v1/models/sarm/variants"
        assert client.post(variants, json={}, headers={"Origin": "https://evil.example"}).status_code == 403
        assert client.delete(f"{variants}/x", headers={"Origin": "https://evil.example"}).status_code == 403
        assert client.post("/v1/drift/reset", json={}, headers={"Origin": "https://evil.example"}).status_code == 403
        for path in ("/metrics", "/v1/models", "/v1/drift", "/try"):
            assert client.get(path, headers={"Host": "evil.example"}).status_code == 403


def test_with_a_token_names_and_sites_do_not_matter(service):
    with TestClient(make_app(service, TOKEN), base_url="https://rewards.example") as client:
        asked = {"Authorization": f"Bearer {TOKEN}", "Origin": "https://lab.example"}
        path, body = next(iter(BODIES.items()))
        assert client.post(path, json=body, headers=asked).status_code == 200
        assert client.post(path, json=body, headers={"Origin": "https://lab.example"}).status_code == 401
