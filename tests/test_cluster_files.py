"""What `cluster/` ships: valid for the tool that reads it, closed by default, and true to what the project is called and pins."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from tests.ray_head import free_ports

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHER = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
# What no file here may hold: keys as services write them, and passwords in place.
SECRETS = re.compile(
    r"sk-[A-Za-z0-9]{8}|hf_[A-Za-z0-9]{8}|AKIA[0-9A-Z]{8}|ghp_[A-Za-z0-9]{8}|(?i:password)\s*[:=]\s*[\"']?\w"
)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_launcher_accepts_its_files(name):
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    (config,) = documents(name)
    jsonschema.validate(config, LAUNCHER)
    # The launcher's own check after it has added its defaults, and that it refuses what is misspelt.
    validate_config(fillout_defaults(config))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_worker": 3}, LAUNCHER)
    assert config["head_node_type"] in config["available_node_types"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert any("RAY_AUTH_MODE=token ray start" in command for command in commands)
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kuberay/raycluster.yaml", "RayCluster"),
        ("kuberay/rayjob.yaml", "RayJob"),
        ("kuberay/rayservice.yaml", "RayService"),
    ],
)
def test_kuberay_finds_what_it_needs(name, kind):
    found = next(d for d in documents(name) if d["kind"] == kind)
    assert found["apiVersion"] == "ray.io/v1"
    inside = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    cluster = found["spec"][inside[kind]] if kind in inside else found["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    if kind == "RayJob":
        assert yaml.safe_load(found["spec"]["runtimeEnvYAML"])["env_vars"] == {
            "PYTHONPATH": "platform",
            "RAY_JOB_STOP_WAIT_TIME_S": "300",
        }


@pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/rayservice.yaml"])
def test_the_operators_own_schema_accepts_them(name):
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip(
            "the operator's definitions are in no package: pass KUBERAY_CRDS=kuberay/ray-operator/config/crd/bases"
        )
    for document in documents(name):
        if document["apiVersion"] != "ray.io/v1":
            continue
        (path,) = Path(folder).glob(f"ray.io_{document['kind'].lower()}s.yaml")
        versions = {
            v["name"]: v["schema"]["openAPIV3Schema"] for v in yaml.safe_load(path.read_text())["spec"]["versions"]
        }
        jsonschema.validate(document, closed(versions["v1"]))


def closed(schema: Any) -> Any:
    """A definition in which fields that it does not name are errors, as the API server's strict check has it."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if (
        "properties" in found
        and "type" in found
        and found.get("properties")
        and not found.get("x-kubernetes-preserve-unknown-fields")
    ):
        found.setdefault("additionalProperties", found["properties"].get("metadata") == {"type": "object"})
    return found


def test_runtime_env_is_one_that_ray_takes():
    from ray.runtime_env import RuntimeEnv

    env = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    RuntimeEnv(**env)
    # Ray shows these in its list of jobs.
    # Ray kills a stopped job after 3 s by itself, before a training has saved its state.
    assert set(env["env_vars"]) == {"PYTHONPATH", "RAY_JOB_STOP_WAIT_TIME_S"}


def test_compose_keeps_mlflow_at_home_and_its_passwords_in_files():
    (compose,) = documents("compose.yaml")
    schema = os.environ.get("COMPOSE_SCHEMA")
    if schema:
        jsonschema.validate(compose, json.loads(Path(schema).read_text()))
    declared = set(compose["secrets"])
    for service in compose["services"].values():
        assert set(service["secrets"]) <= declared
        for mount in service["volumes"]:
            assert mount.split(":")[0] in compose["volumes"]
        for value in service["environment"].values():
            assert not SECRETS.search(f"password={value}" if "FILE" in str(value) else str(value))
    assert compose["services"]["mlflow"]["ports"] == ["${MLFLOW_BIND:-127.0.0.1}:5000:5000"]
    assert "ports" not in compose["services"]["database"]


def test_the_image_can_launch_kernels_and_sees_the_gpus_of_its_machine():
    text = (CLUSTER / "Dockerfile").read_text()
    (installed,) = re.findall(r"apt-get install --yes --no-install-recommends (.*) \\", text)
    assert {"gcc", "libc6-dev"} <= set(installed.split())
    variables = dict(pair.split("=") for line in re.findall(r"^ENV (.*)", text, re.M) for pair in line.split())
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert set(variables["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == {"compute", "utility"}


def test_images_hold_what_is_locked_and_run_as_nobody_in_particular():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [line.split()[2:-1] for line in lines if line.startswith("COPY --chown")]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name
    assert lines.index("USER ray") < min(i for i, line in enumerate(lines) if "pip install" in line)
    assert "ENV RAY_AUTH_MODE=token" in lines
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    mlflow = re.search(r"mlflow\[auth\]==([\d.]+)", (CLUSTER / "mlflow.Dockerfile").read_text())
    assert mlflow
    assert mlflow[1] == locked["mlflow"]
    assert locked["ray"] == ray.__version__


def test_no_file_holds_a_secret():
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            assert not SECRETS.search(path.read_text()), path
    assert SECRETS.search("password: hunter2")


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which Slurm's commands write down how they were called; `srun` runs what follows `--`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "scontrol": 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then printf "node1\\nnode2\\n"; fi',
        "srun": 'echo "srun $*" >> "$CALLS"; stat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"; while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    return {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
    }


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_slurm_queues_a_job_again_only_if_it_asks(code, requeued, slurm, tmp_path):
    command = [CLUSTER / "slurm.sh", "bash", "-c", f"exit {code}"]
    done = subprocess.run(command, env=slurm, cwd=tmp_path, capture_output=True, text=True, check=False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == code, done.stderr
    assert ("scontrol requeue 4711" in calls) == requeued
    assert "600" in calls, "others could read the token"
    assert not list(tmp_path.glob(".ray-token*")), "the token outlived the job"
    assert any(
        call.startswith("srun --kill-on-bad-exit=1 ray symmetric-run --address node1:24711 --min-nodes 2")
        for call in calls
    )


def test_slurm_passes_the_signal_on_and_waits(slurm, tmp_path):
    saved = tmp_path / "saved"
    program = f"trap 'sleep 0.5; touch {saved}; exit 75' TERM; touch {tmp_path}/up; while true; do sleep 0.05; done"
    job = subprocess.Popen([CLUSTER / "slurm.sh", "bash", "-c", program], env=slurm, cwd=tmp_path)
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 75
    assert saved.exists()
    assert "scontrol requeue 4711" in (tmp_path / "calls").read_text()


def test_slurms_options_are_those_of_ray():
    script = (CLUSTER / "slurm.sh").read_text().replace("\\\n", " ")
    (call,) = re.findall(r"ray symmetric-run (.*?) -- ", script)
    used = set(re.findall(r"--[a-z-]+", call))
    tool = Path(sys.executable).parent / "ray"
    known = ""
    for command in ("symmetric-run", "start"):
        known += subprocess.run([tool, command, "--help"], capture_output=True, text=True, check=True).stdout
    assert used == {"--address", "--min-nodes", "--num-cpus", "--num-gpus"}
    assert used <= set(re.findall(r"--[a-z-]+", known))


def test_mlflow_answers_only_those_who_know_the_password_and_its_name(tmp_path, mlflow_db):
    pytest.importorskip("flask_wtf", reason="MLflow's passwords need mlflow[auth], which only the server's image has")
    (port,) = free_ports(1)
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    for name in ("postgres", "mlflow_admin", "mlflow_flask"):
        (secrets / name).write_text("0123456789abcdef" * 3)
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    environment = {
        **os.environ, "SECRETS": str(secrets), "STATE": str(tmp_path), "HOST": "127.0.0.1", "PORT": str(port), "WORKERS": "1",
        "ALLOWED_HOSTS": f"127.0.0.1:{port}", "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            ["sh", CLUSTER / "mlflow.sh"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        deadline = time.monotonic() + 400
        while status(url) == 0:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.5)
        assert status(url) == 401
        assert status(url, "admin:wrong") == 401
        assert status(url, "admin:" + "0123456789abcdef" * 3) == 200
        assert status(url, "admin:" + "0123456789abcdef" * 3, host="elsewhere.example") == 403
        arguments = Path(f"/proc/{server.pid}/cmdline").read_text()
        assert "0123456789abcdef" not in arguments
        assert stat.S_IMODE((tmp_path / "auth.db").stat().st_mode) == 0o600
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def status(url: str, login: str = "", host: str = "") -> int:
    headers = {"Authorization": "Basic " + b64encode(login.encode()).decode()} if login else {}
    request = urllib.request.Request(url, headers={**headers, **({"Host": host} if host else {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
