"""What the project never does with data, and what it shows to nobody unless asked: read out of the source, and asked of real servers."""

import ast
import base64
import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sarm.engine.mlflow import ui
from sarm.report.render import html

ROOT = Path(__file__).parents[2]
SOURCES = [
    *sorted((ROOT / "platform").rglob("*.py")),
    *sorted((ROOT / "jobs").glob("*.py")),
    *sorted((ROOT / "tune").glob("*.py")),
]
PAGES = sorted((ROOT / "platform").rglob("*.html.j2"))
# Calls that run, or may run, what they read.
NEVER = re.compile(
    r"^(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\.loads?$|^yaml\.|^(eval|exec|compile)$|^os\.(system|popen)$"
    r"|\.(extractall|unpack_archive)$|^shutil\.unpack_archive$"
)


def violations(source: str) -> list[str]:
    """Calls of a source that read data in a way that can run code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        # BaseLoader makes texts, lists and mappings, whatever tags say.
        is_bad = bool(NEVER.search(name)) and given.get("Loader") != "yaml.BaseLoader"
        is_bad |= name == "torch.load" and given.get("weights_only") != "True"
        is_bad |= name.endswith(".load") and given.get("allow_pickle", "False") != "False"
        is_bad |= given.get("trust_remote_code", "False") != "False" or given.get("shell", "False") != "False"
        is_bad |= name == "jinja2.Environment" and "autoescape" not in given
        if is_bad:
            found.append(ast.unparse(node)[:100])
    return found


def test_nothing_that_is_read_is_run():
    assert len(SOURCES) > 150
    assert {path.name: found for path in SOURCES if (found := violations(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(f)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "yaml.safe_load(t)",
        "yaml.load(t, Loader=yaml.Loader)",
        "eval(t)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "subprocess.run(c, shell=True)",
        "tar.extractall(d)",
        "jinja2.Environment(loader=x)",
    ],
)
def test_what_would_run_it_is_noticed(source):
    assert violations(source)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_page_is_the_base_page_and_brings_no_policy_script_or_unescaped_value_of_its_own(page):
    text = page.read_text()
    if page.name not in ("base.html.j2", "parts.html.j2"):
        assert text.startswith('{% extends "base.html.j2" %}')
        assert not re.search(r"http-equiv|<script|<link|<iframe|<base\b", text)
    assert not re.search(r"\bsafe\b|autoescape", re.sub(r"\{#.*?#\}", "", text, flags=re.S))


@pytest.mark.parametrize("script", ["", "alert(1)"])
def test_a_page_loads_nothing_and_runs_only_its_own_script(script):
    page = html("page", title="t", facts={}, script=script, sections=[], pictures=[])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == "'none'"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert allowed.get("script-src") == (f"'sha256-{digest}'" if script else None)
    assert allowed["img-src"] == "data:"
    assert (allowed["base-uri"], allowed["form-action"]) == ("'none'", "'none'")
    assert page.index("Content-Security-Policy") < page.find("<script") % 10**9


def test_a_cluster_of_ours_has_no_dashboard_and_mlflow_is_on_loopback():
    source = (ROOT / "platform" / "sarm" / "engine" / "ray" / "cluster.py").read_text()
    (local,) = [
        {word.arg: ast.unparse(word.value) for word in node.keywords}
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init" and "num_cpus" in ast.unparse(node)
    ]
    assert (local["address"], local["include_dashboard"]) == ("'local'", "False")
    assert "mlflow server" not in (ROOT / "Makefile").read_text()
    command = ui.server_command(Path("/outputs/mlflow.db"), 5000)
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_the_token_that_the_guide_makes_is_for_its_owner_alone(tmp_path):
    """Ray itself leaves its file to the umask, with which others may usually read it."""
    lines = [line for line in (ROOT / "cluster" / "README.md").read_text().splitlines() if "get-auth-token" in line]
    assert len(lines) >= 2
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert {line.partition("  ")[0] for line in lines} == {"(umask 077; ray get-auth-token --generate >/dev/null)"}
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "PATH": path}
    subprocess.run(["bash", "-c", lines[0]], env=environment, capture_output=True, check=True, umask=0o022)
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600
