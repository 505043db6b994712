"""The floors of the house, held by walking every import: imports point down, heavy libraries stay at the edge."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sarm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "platform" / "sarm"
JOBS = sorted((ROOT / "jobs").glob("*.py"))
SCRIPTS = [*JOBS, *sorted((ROOT / "tune").glob("*.py"))]
MAX_LINES = 300
MAX_LINES_OF_FUNCTION = 60

# From the ground up. What stands on one floor does not know its neighbours; everything may read what lies below.
FLOORS = (
    {"settings", "nn", "client"},
    {"contracts"},
    {"data"},
    {"evaluate"},
    {"training", "interpret", "audit"},
    {"report", "passes"},
    {"engine", "serve"},
    {"stages", "integrations"},
    {"commands", "api"},
)
ROOMS = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# The mathematics stands on its own: a model that was exported has its files alone.
ALONE = {"nn"}
EDGE_ONLY = {"ray", "deepspeed", "mlflow", "openai", "wandb"}
NN_LIBRARIES = {"torch", "transformers", "jaxtyping"}
# What reads a checkpoint's files beside `transformers`, which reads them by the same library: no exported model needs it.
SAFETENSORS_IN_NN = {"sarm.nn.layer_embeddings"}
TRANSFORMERS_IN_NN = {
    "sarm.nn.attention",
    "sarm.nn.backbone",
    "sarm.nn.pretrained",
    "sarm.nn.modeling_sarm",
    "sarm.nn.sarm_output",
    *SAFETENSORS_IN_NN,
}
TRITON_IN_NN = {"sarm.nn.triton_backend"}
HEAVY = {"torch", "ray", "transformers", "deepspeed", "mlflow", "pyarrow"}


def modules() -> dict[str, Path]:
    """Every module of the package and every script by its dotted name."""
    package = {
        ".".join(["sarm", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    return package | {f"{path.parent.name}.{path.stem}": path for path in SCRIPTS}


def imports_of(module: str, source: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, is relative) of everything that the source imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.level > 0) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0] if node.args else None
            yield (str(name.value) if isinstance(name, ast.Constant) else "computed at run time"), False


def rooms_below(room: str) -> set[str]:
    """The rooms of the package that a module of `room` may import; jobs may import all."""
    if room in ALONE:
        return {room}
    own = ROOMS.get(room, len(FLOORS))
    return {room} | {other for other, floor in ROOMS.items() if floor < own}


def violations(module: str, source: str) -> list[str]:
    """What of a module's imports the layering forbids."""
    top, _, rest = module.partition(".")
    layer = rest.split(".")[0] if top == "sarm" else top
    found = []
    for name, is_relative in imports_of(module, source):
        library, _, inside = name.partition(".")
        part = inside.split(".")[0]
        if library == "sarm" and part != "__version__" and part not in rooms_below(layer):
            found.append(f"{module} imports {name}: {layer} may not import {part or 'the package as a whole'}")
        if library in EDGE_ONLY and layer != "engine":
            found.append(f"{module} imports {name}: only the engine may")
        if library in {"jobs", "tune", *(path.stem for path in SCRIPTS if top in ("jobs", "tune"))}:
            found.append(f"{module} imports {name}: nothing imports a job")
        if layer == "nn":
            if library == "sarm" and not is_relative:
                found.append(f"{module} imports {name}: nn imports its neighbours relatively")
            allowed = NN_LIBRARIES | ({"triton"} if module in TRITON_IN_NN else set())
            allowed |= {"safetensors"} if module in SAFETENSORS_IN_NN else set()
            if library not in allowed | {"sarm"} | sys.stdlib_module_names:
                found.append(f"{module} imports {name}: nn needs torch and transformers alone")
            if library == "transformers" and module not in TRANSFORMERS_IN_NN:
                found.append(f"{module} imports {name}: only the backbone and the model may")
    return found


def test_no_import_of_the_project_breaks_the_layering():
    found = [line for module, path in modules().items() for line in violations(module, path.read_text())]
    assert found == []


def test_the_walk_sees_the_project():
    names = modules().keys()
    assert {
        "sarm",
        "sarm.settings.jobs",
        "sarm.nn.sae",
        "sarm.data.tokens.chat",
        "sarm.stages.job",
        "jobs.pipeline",
    } <= names
    source = (PACKAGE / "data" / "formats" / "models.py").read_text()
    imported = {name for name, _ in imports_of("sarm.data.formats.models", source)}
    assert "sarm.nn.pretrained.read_config" in imported, "an import inside a function is an import"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sarm.settings.jobs", "import sarm.data.tokens.chat"),
        ("sarm.settings.sae", "from sarm.nn.sae import Sae"),
        ("sarm.contracts.manifest", "def f():\n    from sarm import nn, data"),
        ("sarm.nn.sae", "from sarm.settings.checks import UserError"),
        ("sarm.nn.sae", "from ..settings.checks import UserError"),
        ("sarm.nn.sae", "from sarm.nn.losses import bradley_terry"),
        ("sarm.nn.sae", "import numpy"),
        ("sarm.nn.sparse", "import triton"),
        ("sarm.nn.sae", "from transformers import AutoModel"),
        ("sarm.data.tokens.chat", "from sarm.training import reward"),
        ("sarm.data.tokens.chat", "from sarm import engine"),
        ("sarm.data.tokens.chat", "import sarm"),
        ("sarm.evaluate.pairs", "from sarm.training.sae import SaeTraining"),
        ("sarm.training.sae", "from sarm.audit.codes import AuditCodes"),
        ("sarm.evaluate.pairs", "from ..report import report"),
        ("sarm.interpret.sampling", "from sarm.report.report import write_report"),
        ("sarm.report.report", "from sarm.engine.terminal import say"),
        ("sarm.engine.session", "from sarm.stages.stage import STAGES"),
        ("sarm.stages.audit", "import ray.data"),
        ("sarm.passes.activations", "import ray"),
        ("sarm.training.reward", "import deepspeed.comm"),
        ("sarm.data.sources.rows", "if True:\n    import ray"),
        ("sarm.data.sources.rows", "import importlib\nimportlib.import_module('mlflow')"),
        ("sarm.report.report", "import wandb"),
        ("jobs.evaluate", "import openai"),
        ("jobs.evaluate", "from jobs import pipeline"),
        ("jobs.evaluate", "from pipeline import main"),
        ("sarm.stages.job", "import jobs.pipeline"),
        ("sarm.stages.job", "from sarm.commands.command import Command"),
        ("sarm.commands.card", "from sarm.api import load"),
        ("sarm.serve.engine", "from sarm.engine.session import Session"),
        ("sarm.serve.engine", "import ray"),
        ("sarm.client.http", "from sarm.contracts import ids"),
        ("sarm.passes.reader", "from sarm.serve.engine import Engine"),
    ],
)
def test_a_bad_import_is_noticed(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sarm.nn.modeling_sarm", "import math\nimport torch.nn\nfrom transformers import AutoModel\nfrom .sae import dense"),
        ("sarm.data.tokens.groups", "from sarm.data.tokens.packing import Row\nfrom sarm.nn.sae import dense\nfrom sarm.contracts import ids"),
        ("sarm.training.sae", "from sarm.evaluate.statistics import calibration\nimport numpy"),
        ("sarm.engine.deepspeed.zero", "import deepspeed\nfrom sarm.training import reward"),
        ("jobs.evaluate", "from sarm.settings.jobs import Evaluate\nfrom sarm.stages import chain"),
    ],
)  # fmt: skip
def test_a_good_import_is_let_through(module, source):
    assert violations(module, source) == []


def test_every_room_has_its_floor_and_none_is_the_whole_house():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == ROOMS.keys()
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}, "files stand in rooms"
    lines = {room: sum(len(path.read_text().splitlines()) for path in (PACKAGE / room).rglob("*.py")) for room in rooms}
    whole = sum(lines.values()) + sum(len(script.read_text().splitlines()) for script in SCRIPTS)
    assert {room: n for room, n in lines.items() if n > whole / 4} == {}


def test_no_files_import_each_other_in_a_circle():
    sources = {module: path.read_text() for module, path in modules().items()}
    graph = {
        module: {near for name, _ in imports_of(module, text) for near in (name, name.rpartition(".")[0]) if near in sources}
        for module, text in sources.items()
    }  # fmt: skip
    done: set[str] = set()
    while ready := {module for module, near in graph.items() if module not in done and near - {module} <= done}:
        done |= ready
    assert sorted(graph.keys() - done) == []


def test_no_file_outgrows_a_head():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in modules().values()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def long_functions(source: str) -> list[str]:
    """Names of the functions of a source that are longer than one may be, from `def` to the last line."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= MAX_LINES_OF_FUNCTION
    ]


def test_no_function_outgrows_a_head():
    long = {name: functions for name, path in modules().items() if (functions := long_functions(path.read_text()))}
    assert long == {}


def test_a_long_function_is_noticed():
    body = "        pass\n" * (MAX_LINES_OF_FUNCTION - 1)
    for begun in ("class C:\n    def f(self):\n", "async def f():\n"):
        assert long_functions(begun + body) == []
        assert long_functions(f"{begun}{body}        pass\n") == ["f"]


def run_python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_source_root_does_not_shadow_the_standard_librarys_platform():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert run_python("import platform; print(platform.system())").strip()


def test_importing_the_package_loads_nothing_heavy():
    run_python(f"import sarm, sys; assert not {HEAVY!r} & set(sys.modules)")


def test_the_packages_public_names_are_there_and_come_when_they_are_asked_for():
    names = sarm.__all__
    assert set(names) == set(sarm._HOMES)
    assert all(getattr(sarm, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sarm.nothing


def test_stages_and_their_session_load_nothing_that_takes_seconds():
    """Who is refused before a stage begins waits for none of it."""
    slow = HEAVY - {"pyarrow"}
    run_python(
        f"import sarm.engine.session, sarm.stages.stage, sarm.stages.chain, sys; assert not {slow!r} & set(sys.modules)"
    )


RUN_AND_LIST = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert stop.code in (0, None), stop.code
print("loaded:", sorted({HEAVY!r} & set(sys.modules)))
"""


FLAGS_ONLY = (
    "compare",
    "convert_sae",
    "convert_sarm",
    "audit_features",
    "debias",
    "steer",
    "relabel",
    "reward_card",
    "interpret",
    "rate",
    "ui",
    "serve",
    "push",
)
WITH_PRESETS = [job for job in SCRIPTS if job.stem not in FLAGS_ONLY]
ANSWERS = [
    *(
        (job, arguments)
        for job in WITH_PRESETS
        for arguments in (["--help"], ["tiny", "--help"], ["tiny", "--dry-run"])
    ),
    (ROOT / "jobs" / "convert_sae.py", ["--help"]),
    (ROOT / "jobs" / "audit_features.py", ["--help"]),
    (ROOT / "jobs" / "debias.py", ["--help"]),
    (ROOT / "jobs" / "debias.py", ["--model", "x", "--sae", "y", "--pairs", "z", "--dry-run"]),
    (ROOT / "jobs" / "steer.py", ["--help"]),
    (ROOT / "jobs" / "steer.py", ["--dry-run"]),
    (ROOT / "jobs" / "relabel.py", ["--help"]),
    (ROOT / "jobs" / "convert_sarm.py", ["--help"]),
    (ROOT / "jobs" / "compare.py", ["--help"]),
    (ROOT / "jobs" / "reward_card.py", ["--help"]),
    (ROOT / "jobs" / "compare.py", ["a", "b", "--dry-run"]),
    (ROOT / "jobs" / "interpret.py", ["--help"]),
    (ROOT / "jobs" / "rate.py", ["--help"]),
    (ROOT / "jobs" / "ui.py", ["--help"]),
    (ROOT / "jobs" / "serve.py", ["--help"]),
    (ROOT / "jobs" / "push.py", ["--help"]),
    (ROOT / "jobs" / "interpret.py", ["contexts", "--judging.judges", "m@http://h:1/v1", "--dry-run"]),
    (ROOT / "jobs" / "prepare_data.py", ["--inspect", "x", "--help"]),
    (ROOT / "jobs" / "evaluate.py", ["--model", "x", "--help"]),
    (ROOT / "jobs" / "evaluate.py", ["--model", "x", "--benchmarks", "rm_bench", "--dry-run"]),
]


@pytest.mark.parametrize(
    ("job", "arguments"), ANSWERS, ids=lambda value: value.stem if isinstance(value, Path) else " ".join(value)
)
def test_a_job_explains_itself_without_loading_anything_heavy(job, arguments):
    assert run_python(RUN_AND_LIST, job, *arguments).endswith("loaded: []\n")


def test_a_script_that_loads_something_heavy_is_noticed(tmp_path):
    script = tmp_path / "heavy.py"
    script.write_text("import pyarrow, sys\nsys.exit(0)\n")
    assert run_python(RUN_AND_LIST, script).endswith("loaded: ['pyarrow']\n")
