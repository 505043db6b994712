"""The server as a process: what it refuses before it starts, slow clients, and how it ends."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from tests.serve.asked import conversation

from sarm.client import RewardClient
from sarm.serve import http_server
from sarm.serve import server as server_module
from sarm.serve.app import make_app
from sarm.settings.checks import UserError
from sarm.settings.serving import Serving

ROOT = Path(__file__).parents[2]
TOKEN = "correct-horse-battery-staple"


@contextlib.contextmanager
def started(*arguments: object, **environment: str):
    """The process, and where it serves."""
    command = [sys.executable, "jobs/serve.py", "--port", "0", "--threads", "1", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        line = process.stdout.readline()
        assert " on http://" in line, line + process.stderr.read()
        seconds = float(line.partition(", ready ")[2].split()[0])
        assert seconds < 3
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()


def refused(*arguments: object, **environment: str) -> str:
    """What a server says that does not start: one line, within seconds."""
    command = [sys.executable, "jobs/serve.py", "--port", "0", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400, check=False)  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_a_server_scores_with_its_token_and_ends_cleanly(served):
    """All that takes a process, in one: they take seconds each."""
    with started("--model", served, "--token", "env:REWARD_TOKEN", REWARD_TOKEN=TOKEN) as (process, url):
        with urllib.request.urlopen(f"{url}/ready", timeout=10) as ready:
            assert json.load(ready) == {"status": "ready"}
        client = RewardClient(url, token=TOKEN, timeout=30)
        assert client.check()["identity"]
        assert len(client.score([conversation("a"), conversation("b")])) == 2
        with pytest.raises(Exception, match="401"):
            RewardClient(url, timeout=5).score([conversation("a")])
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as half:
            half.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            process.send_signal(signal.SIGTERM)
            out, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert out.splitlines()[-1] == "the server has ended"
        assert TOKEN not in out + said
        assert "Traceback" not in said


def test_ctrl_c_ends_it_too(served):
    with started("--model", served) as (process, _):
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (0, "")
    assert out.splitlines()[-1] == "the server has ended"


def test_a_port_that_is_in_use_is_refused_before_anything_is_loaded(served):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="in use"), server_module.listening(Serving(model=served, port=taken.getsockname()[1])):  # fmt: skip
            pass


@pytest.mark.parametrize("fault", ["no folder", "no model", "a scalar head", "torn weights", "torn config", "another tokenizer", "an edit of features"])  # fmt: skip
def test_a_folder_that_is_torn_or_of_another_kind_is_refused_in_a_line(fault, served, tmp_path):
    from sarm.serve.loading import load_service

    folder = tmp_path / "model"
    if fault != "no folder":
        shutil.copytree(served, folder)
    config = folder / "config.json"
    if fault == "no model":
        config.write_text(json.dumps({"model_type": "llama"}))
    elif fault == "a scalar head":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"head": "scalar"}))
    elif fault == "torn weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "torn config":
        config.write_text(config.read_text()[:-100])
    elif fault == "an edit of features":
        (folder / "feature_edit").mkdir()
    elif fault == "another tokenizer":
        (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text().replace("<|im_end|>", "<|im_end|> "))  # fmt: skip
    with pytest.raises(UserError) as error:
        load_service(Serving(model=folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_the_job_says_in_one_line_what_it_refuses(tmp_path, served):
    assert "no model folder" in refused("--model", tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code = (
        "import sys; from pathlib import Path; from sarm.serve.server import serve; from sarm.settings.serving import Serving\n"
        f"try: serve(Serving(model=Path({str(tmp_path)!r}), port=0))\n"
        "except ValueError as error: print(error, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "without latents" in done.stdout
    assert done.stdout.strip().endswith("set()"), "who is refused does not wait for torch"


def test_other_machines_are_served_with_a_token_alone(served, tmp_path):
    for host in ("0.0.0.0", "192.168.3.4", "::", "example.org"):
        with pytest.raises(UserError, match="token"):
            Serving(model=served, host=host)
        assert Serving(model=served, host=host, token="env:X")
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert Serving(model=served, host=host).read_token() is None
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert Serving(model=served, token=f"file:{tmp_path / 'token'}").read_token() == TOKEN


@pytest.mark.parametrize("place", ["env:NOT_SET_ANYWHERE", "file:/nowhere", "short", "env:SHORT", "env:SLASH"])
def test_a_token_that_cannot_be_read_is_refused_without_being_shown(place, served, monkeypatch):
    monkeypatch.setenv("SHORT", "abc")
    monkeypatch.setenv("SLASH", "a/b" * 20)
    with pytest.raises(UserError, match=r"[Pp]ass|Write") as error:
        Serving(model=served, token=place).read_token()
    assert "a/b" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"port": 70000}, {"max_wait": 0.0}, {"batch_tokens": 1}, {"threads": 0}, {"cached": -1}, {"variants": ("a",)}, {"variants": ("a=b", "a=c")}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(options, served):
    with pytest.raises(UserError):
        Serving(model=served, **options)


@pytest.fixture
def listening(service, monkeypatch):
    """The server in this process, with short times, on a port of its own."""
    monkeypatch.setattr(http_server, "HEADER_SECONDS", 1.0)
    settings = Serving(model=Path("x"), port=0)
    servers = []
    import uvicorn

    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets=None: (servers.append(self), run(self, sockets))[1])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with server_module.listening(settings) as taken:
        app = make_app(service, body_seconds=1.0)
        thread = threading.Thread(target=http_server.run, args=(app, taken, "x"))
        thread.start()
        yield taken.getsockname()
        while not servers:
            time.sleep(0.01)
        servers[0].should_exit = True
        thread.join(30)


def answer_to(address, sent: bytes, seconds: float = 10) -> bytes:
    with socket.create_connection(address) as connection:
        connection.settimeout(seconds)
        connection.sendall(sent)
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(4096):
                found += part
    return found


HEAD = b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n"


def test_a_body_that_does_not_come_is_given_up_and_others_are_served(listening):
    began = time.monotonic()
    assert b" 408 " in answer_to(listening, HEAD + b'{"items"').splitlines()[0]
    assert time.monotonic() - began < 9, "a body has 10 s, unless the app is told otherwise"
    assert answer_to(listening, b"POST /v1/rewards HTTP/1.1\r\nHos") == b"", "headers that do not come"
    assert answer_to(listening, b"") == b"", "nothing that comes"
    assert b" 400 " in answer_to(listening, b"nonsense\r\n\r\n").splitlines()[0]
    client = RewardClient("http://{}:{}".format(*listening[:2]), timeout=20)
    assert client.score([conversation("a")])


def test_a_body_that_ends_before_its_end_is_nobodys(listening):
    with socket.create_connection(listening) as connection:
        connection.sendall(HEAD + b'{"items"')
    client = RewardClient("http://{}:{}".format(*listening[:2]), timeout=20)
    assert client.score([conversation("a")])
