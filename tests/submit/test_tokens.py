"""Who may submit to a cluster, and what is said to those who cannot."""

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from tests.ray_head import Head, asked, free_ports


@pytest.fixture
def stranger() -> Iterator[Callable[[str], str]]:
    """Servers that answer every request with a text; called with it, gives the address."""
    servers = []

    def serve(text: str) -> str:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()


def test_what_cannot_be_submitted_is_one_line(
    head: Head, clone: Path, tmp_path: Path, stranger: Callable[[str], str]
) -> None:
    (free,) = free_ports(1)
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 32)
    version = f"this project Ray {ray.__version__}"
    cases = [
        (f"http://127.0.0.1:{free}", {}, "no Ray cluster answers at"),
        (head.address, {"RAY_AUTH_TOKEN_PATH": str(wrong)}, "does not accept the token"),
        (head.address, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, "this process has no token"),
        (stranger('{"ray_version": "2.9.0"}'), {}, f"runs Ray 2.9.0, and {version}"),
        (stranger("hello"), {}, "is no Ray dashboard"),
    ]
    for address, environment, said in cases:
        line = f"python jobs/prepare_data.py tiny --submit {address}"
        done = head.run(line, clone, **environment)
        assert done.returncode == 2, (said, done.stderr)
        assert said in done.stderr
        assert done.stdout + done.stderr.strip().partition("\n")[2] == "", "one line"


def mutating_endpoints() -> list[tuple[str, str]]:
    """Every route of the dashboard's head that changes something, as Ray's own source declares them."""
    folder = Path(ray.__file__).parent / "dashboard"
    found = []
    for path in sorted(folder.rglob("*.py")):
        if "agent" in path.name or "/tests/" in str(path):
            continue
        declared = re.findall(r"routes\.(post|put|delete|patch)\(\s*\"([^\"]+)\"", path.read_text())
        found += [(method.upper(), re.sub(r"\{\w+\}", "gcs", route)) for method, route in declared]
    return sorted(set(found))


def test_no_endpoint_that_changes_something_answers_without_the_token(head: Head) -> None:
    endpoints = mutating_endpoints()
    assert {("POST", "/api/jobs/"), ("POST", "/api/jobs/gcs/stop"), ("DELETE", "/api/jobs/gcs")} <= set(endpoints)
    # Where a browser hands in the token it has; it answers 401 to none and 403 to a wrong one as well.
    for method, route in endpoints:
        assert asked(method, head.address + route, None) == 401, (method, route)
        assert asked(method, head.address + route, "wrong") == 403, (method, route)
    assert asked("GET", f"{head.address}/api/jobs/", None) == 401
    assert asked("GET", f"{head.address}/api/jobs/", "wrong") == 403
    assert asked("POST", f"{head.address}/api/jobs/", head.token) not in (0, 401, 403), "the right one is let in"
    # These tests come last of those on the cluster, so that the jobs before have left what they leave.
    leaked = [path for path in head.temporary.rglob("*") if path.is_file() and head.token.encode() in path.read_bytes()]
    assert leaked == []
