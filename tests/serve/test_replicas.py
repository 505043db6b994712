"""The server in several replicas: one address, edits that reach all, and a replica that is killed while it computes."""

import asyncio
import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from tests.serve.asked import conversation, readings
from tests.serve.conftest import MEAN, STD
from tests.serve.test_drift import answers_of, opened, post, stream_of

from sarm.client import RewardClient, RewardError
from sarm.engine.ray.replicas import COMMON, NAME
from sarm.serve.heads import Heads, read_edit
from sarm.serve.variant_routes import Variants
from sarm.settings.checks import UserError
from sarm.settings.serving import Serving

ROOT = Path(__file__).parents[2]
NUM = 400
WITH_SERVE = pytest.mark.skipif(
    importlib.util.find_spec("grpc_reflection") is None, reason="Ray Serve (ray[serve]) is not installed here"
)


@contextlib.contextmanager
def replicated(served: Path, variants: Path):
    """The process of two replicas, and where they serve."""
    command = [sys.executable, "jobs/serve.py", "--model", str(served), "--port", "0", "--replicas", "2", "--threads", "1", "--variants-folder", str(variants), "--drift-folder", str(variants.parent / "drift"), "--cached", "0"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next((line for line in process.stdout if " on http://" in line), "")
        assert line, process.wait(60)
        yield process, line.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def replicas_of(process: subprocess.Popen, name: str = NAME) -> list[psutil.Process]:
    """Processes of a deployment: of the replicas, or of what they have in common."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any(f"ServeReplica:{NAME}:{name}" in part for part in child.cmdline())]


def settled(check, seconds: float = 30.0, pause: float = 0.2) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(pause)
    return False


@WITH_SERVE
def test_a_killed_replica_loses_nothing_and_edits_reach_all(served, tmp_path):
    """All that takes replicas, in one: they take half a minute."""
    conversations = [conversation(f"{number} seeds grow slowly " * (1 + number % 5)) for number in range(NUM)]
    expected = [(one.reward - MEAN) / STD for one in readings(served, conversations)]
    with replicated(served, tmp_path / "variants") as (process, url):
        client = RewardClient(url, timeout=120)
        before = replicas_of(process)
        assert len(before) == 2
        found: list[float] = []
        answered: list[float] = []

        async def all_of_them() -> list[float]:
            own = RewardClient(url, timeout=120)

            async def one(messages):
                (value,) = await own.ascore([messages])
                answered.append(value)
                return value

            each = await asyncio.gather(*map(one, conversations))
            await own.aclose()
            return list(each)

        thread = threading.Thread(target=lambda: found.extend(asyncio.run(all_of_them())))
        thread.start()
        assert settled(lambda: len(answered) >= 20, pause=0.005)
        assert len(answered) < NUM / 2, "requests are under way"
        before[0].send_signal(signal.SIGKILL)
        thread.join(180)
        assert found == pytest.approx(expected, abs=1e-4)
        assert settled(lambda: len([one for one in replicas_of(process) if one.is_running()]) == 2, 60)
        # An edit that one of them is sent can be scored on both, the new one included, and is gone on both.
        edit = json.loads((served.parent / "edit.json").read_text())["weights"]
        import httpx2

        with httpx2.Client(base_url=url, trust_env=False) as http:
            assert http.post("/v1/models/sarm/variants", json={"name": "posted", "weights": edit}).status_code == 200
            edited = RewardClient(url, variants=("posted",), timeout=60)
            own = [edited.score(conversations[:1])[0] for _ in range(20)]
            assert own == pytest.approx([own[0]] * 20, abs=1e-4)
            assert own[0] != pytest.approx(expected[0], abs=1e-3)
            assert http.delete("/v1/models/sarm/variants/posted").status_code == 200
            for _ in range(20):
                with pytest.raises(RewardError, match="unknown_variant"):
                    edited.score(conversations[:1])
        assert client.check()["variants"] == ["base"]
        with httpx2.Client(base_url=url, trust_env=False, timeout=60) as http:
            the_replicas_have_one_watch(http, process, served)
    assert process.returncode == 0


def the_replicas_have_one_watch(http, process: subprocess.Popen, served: Path) -> None:
    """The account is that of a server without replicas, whichever replica is asked, and outlasts the process that keeps it."""
    asked = {"run": "one", "top": 96}

    def account() -> dict:
        response = http.get("/v1/drift", params=asked)
        return response.json()["streams"][0] if response.status_code == 200 else {}

    def has(num: int) -> bool:
        found = account()
        return bool(found) and found["answers"] + found["open_answers"] == num

    for step in range(60):
        post(http, step, answers_of(step, hacked=0.9 * (step >= 35)), run="one")
        assert settled(lambda step=step: has(6 * (step + 1)), pause=0.005)
    found = account()
    assert all(account() == found for _ in range(20))
    counted = {line for _ in range(20) for line in http.get("/metrics").text.splitlines() if 'route="/v1/rewards",status="200"' in line}  # fmt: skip
    assert len(counted) == 2, "both replicas have answered"
    assert "Alarm at step" in http.get("/v1/drift/page", params=asked).text
    with opened(Serving(model=served, threads=1)) as (service, client):
        for step in range(60):
            post(client, step, answers_of(step, hacked=0.9 * (step >= 35)), run="one")
        alone = stream_of(client, service, **asked)
    for name in ("steps", "answers", "open_steps", "open_answers", "state", "model"):
        assert found[name] == alone[name], name
    assert [one["step"] for one in found["alarms"]] == [one["step"] for one in alone["alarms"]] != []
    assert [one["latent"] for one in found["suspects"]] == [one["latent"] for one in alone["suspects"]]
    assert found["shift"] == pytest.approx(alone["shift"], abs=1e-4)
    (keeper,) = replicas_of(process, COMMON)
    keeper.send_signal(signal.SIGKILL)
    # Rewards do not wait for it, and what is read meanwhile is handed over when another is there.
    assert len(post(http, 60, answers_of(60), run="one")) == 6
    assert settled(lambda: account().get("open_steps") == [60], 90)
    assert account()["steps"] == found["steps"]
    assert account()["alarms"] == found["alarms"]
    assert http.post("/v1/drift/reset", json={"run": "one"}).json()["reset"] == [{"run": "one", "split": "train", "variant": "base"}]  # fmt: skip
    assert all(account()["state"] == "baseline" for _ in range(10))


def test_servers_with_one_folder_of_variants_have_the_same(served, tmp_path):
    heads = []
    for _ in range(2):
        from safetensors.torch import load_file

        heads.append(Heads(load_file(served / "model.safetensors")["score.weight"][0].numpy()))
    first, second = (Variants(one, tmp_path / "variants") for one in heads)
    from sarm.serve.schemas import Variant

    weights = json.loads((served.parent / "edit.json").read_text())["weights"]
    for number in range(5):
        first.post(Variant(name=f"v{number}", weights=weights))
        assert [one["name"] for one in second.listed()["variants"]] == ["base", *(f"v{n}" for n in range(number + 1))]
    second.delete("v2")
    assert "v2" not in [one["name"] for one in first.listed()["variants"]]
    assert heads[0].num_edited("v3") == heads[1].num_edited("v3") > 0
    assert len(read_edit(tmp_path / "variants" / "v1.json").latent) == len(weights)


class Answered:
    """A transport that gives these responses in turn."""

    def __init__(self, *responses):
        self.responses = list(responses)

    def handle_request(self, request):
        return self.responses.pop(0)

    def close(self):
        pass


def test_the_client_comes_again_where_a_replica_died_and_not_where_the_model_failed():
    import httpx2

    client = RewardClient("http://x", timeout=20)

    def asks(*responses):
        client._sync = httpx2.Client(base_url="http://x", transport=Answered(*responses))
        return client._send({})

    assert asks(httpx2.Response(500, text="Internal Server Error"), httpx2.Response(200, json={"a": 1})) == {"a": 1}
    own = httpx2.Response(500, json={"error": {"code": "engine_failed", "message": "m"}})
    with pytest.raises(RewardError, match="engine_failed"):
        asks(own)


def test_settings_that_replicas_cannot_follow_are_refused(served, tmp_path):
    settings = Serving(model=served, replicas=2, max_replicas=4)
    assert settings.max_replicas == 4
    for wrong in (
        {"max_replicas": 1},
        {"mlflow_uri": "http://127.0.0.1:5"},
        {"replicas": -1},
    ):
        with pytest.raises(UserError):
            replace(settings, **wrong)
    with pytest.raises(UserError):
        Serving(model=served, max_replicas=2)


def test_the_file_for_kubernetes_names_flags_that_there_are():
    (document,) = yaml.safe_load_all((ROOT / "cluster" / "kuberay" / "rayservice.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    (one,) = config["applications"]
    module, name = one["import_path"].split(":")
    assert hasattr(importlib.import_module(module), name)
    arguments = one["args"]
    arguments = {key: Path(value) if key in ("model", "variants_folder") else value for key, value in arguments.items()}
    settings = Serving(**arguments)
    assert settings.replicas >= 2
    assert settings.token.startswith("env:"), "a service is reached from other machines"
    ports = {config["http_options"]["port"]}
    container = document["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert ports <= {port["containerPort"] for port in container["ports"]}
    if importlib.util.find_spec("grpc_reflection") is not None:
        from ray.serve.schema import ServeDeploySchema

        ServeDeploySchema.model_validate(config)
