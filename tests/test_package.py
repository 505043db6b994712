"""The package: what its dependencies cover, what the reading side does without, and (`make test-package`) a wheel in an environment of its own."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.export_sarm import export

from sarm.settings.extras import LIBRARIES, MissingExtraError, extra_of, need

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
BASE = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
# Libraries that come with one that is named.
_COME_WITH = {"tokenizers": "transformers", "markupsafe": "jinja2", "requests": "mlflow"}
# Frameworks that the integrations are for, which bring this package and not the other way round; kernels, which come with torch's CUDA build;
# what a registered model's folder holds.
_NOT_OURS = {"verl", "skyrl_gym", "open_instruct", "nemo_rl", "vllm", "triton", "sarm_model"}


def requirements_of(extra: str) -> Iterator[Requirement]:
    for text in OPTIONAL[extra]:
        found = Requirement(text)
        if found.name == "sarm":
            for inner in found.extras:
                yield from requirements_of(inner)
        else:
            yield found


def imported() -> dict[str, set[str]]:
    """The libraries that the package imports, wherever in a file, and where."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "platform" / "sarm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []  # fmt: skip
            for name in names:
                top = name.partition(".")[0]
                if top and top != "sarm" and top not in sys.stdlib_module_names:
                    found.setdefault(top, set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_every_library_that_is_imported_is_a_dependency_or_one_of_an_extra_that_says_so() -> None:
    distributions = packages_distributions()
    extras = {name for names in LIBRARIES.values() for name in names}
    lacking = {}
    for name, places in imported().items():
        if name in extras | _NOT_OURS:
            continue
        named = {canonicalize_name(one) for one in distributions.get(_COME_WITH.get(name, name), [])}
        if not named & BASE and _COME_WITH.get(name) not in extras:
            lacking[name] = sorted(places)
    assert lacking == {}


def test_every_extra_has_the_libraries_that_it_is_said_to_bring() -> None:
    distributions = packages_distributions()
    for extra, names in LIBRARIES.items():
        brought = {canonicalize_name(found.name) for found in requirements_of(extra)}
        for name in names:
            assert {canonicalize_name(one) for one in distributions.get(name, [name])} & brought, (extra, name)
            assert extra_of(f"{name}.inner") == extra
    assert extra_of("numpy") is None
    assert extra_of(None) is None


def test_the_lock_has_everything_that_is_asked_for_in_a_version_that_fits() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    asked = [*map(Requirement, PROJECT["dependencies"]), *requirements_of("dev")]
    wrong = [str(one) for one in asked if not one.specifier.contains(locked.get(canonicalize_name(one.name), "0"))]
    assert wrong == []
    assert {one.name for one in asked} >= {"ray", "deepspeed", "mlflow", "openai", "peft", "optuna", "pytest", "mypy"}


def test_the_reading_side_asks_for_nothing_of_what_trains_and_pins_nothing() -> None:
    assert not BASE & {"ray", "deepspeed", "mlflow", "datasets", "openai", "starlette", "uvicorn", "peft", "optuna"}
    for text in PROJECT["dependencies"]:
        assert not re.search("==|~=", text), text


def test_a_missing_library_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sarm.settings.extras.is_installed", lambda module: module != "deepspeed")
    need("serve", "judge")
    with pytest.raises(MissingExtraError) as raised:
        need("judge", "train")
    assert str(raised.value).endswith("needs the train extra (deepspeed is not installed): pip install 'sarm[train]'")
    assert isinstance(raised.value, ImportError)


def test_a_finished_sarm_is_read_explained_edited_and_evaluated_without_any_library_of_the_extras(
    tmp_path: Path,
) -> None:
    """In a process to which none of them is installed; `make test-package` does the same where none of them is."""
    export(tmp_path)
    assert "none of the extras is loaded" in read(sys.executable, tmp_path, str(ROOT / "platform"))


@pytest.mark.skipif(not os.environ.get("SARM_PACKAGE"), reason="make test-package")
def test_the_wheel_works_in_an_environment_with_nothing_but_its_dependencies(tmp_path: Path) -> None:
    export(tmp_path)
    python = os.environ["SARM_PACKAGE"]
    assert "none of the extras is loaded" in read(python, tmp_path, "")
    installed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout.lower()  # fmt: skip
    assert not re.search(r"^(ray|deepspeed|mlflow|openai|starlette)==", installed, re.MULTILINE)
    program = Path(python).parent / "sarm"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert re.fullmatch(r"sarm \d+\.\d+\.\d+\S*\n", said)


def read(python: str, folder: Path, path: str) -> str:
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [python, str(ROOT / "tests" / "reading_side.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout
