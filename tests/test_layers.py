"""The layering of the README, held by walking every import: imports point down, heavy libraries stay at the edge."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "platform" / "sarm"
JOBS = sorted((ROOT / "jobs").glob("*.py"))
SCRIPTS = [*JOBS, *sorted((ROOT / "tune").glob("*.py"))]
MAX_LINES = 320

BOTTOM = {
    "checks",
    "config",
    "extraction_config",
    "sae_config",
    "reward_config",
    "reading_config",
    "results_root",
    "folder_schemas",
    "untrusted",
    "schema",
    "manifest",
    "presets",
    "tune_config",
    "tune_presets",
}
SIBLINGS = {"train", "evaluate", "interpret", "audit"}
EDGE_ONLY = {"ray", "deepspeed", "mlflow", "openai"}
NN_LIBRARIES = {"torch", "transformers", "jaxtyping"}
TRANSFORMERS_IN_NN = {"sarm.nn.backbone", "sarm.nn.modeling_sarm"}
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


def layers_below(layer: str) -> set[str]:
    """The parts of the package that a module of `layer` may import."""
    if layer in BOTTOM:
        return BOTTOM
    if layer == "nn":
        return {"nn"}
    if layer == "data":
        return BOTTOM | {"nn", "data"}
    if layer in SIBLINGS:
        return BOTTOM | {"nn", "data", layer}
    return BOTTOM | {"nn", "data", "runtime"} | SIBLINGS


def violations(module: str, source: str) -> list[str]:
    """What of a module's imports the layering forbids."""
    top, _, rest = module.partition(".")
    layer = rest.split(".")[0] if top == "sarm" else top
    found = []
    for name, is_relative in imports_of(module, source):
        library, _, inside = name.partition(".")
        part = inside.split(".")[0]
        if library == "sarm" and part != "__version__" and part not in layers_below(layer):
            found.append(f"{module} imports {name}: {layer} may not import {part or 'the package as a whole'}")
        if library in EDGE_ONLY and layer != "runtime":
            found.append(f"{module} imports {name}: only runtime may")
        if library in {"jobs", "tune", *(path.stem for path in SCRIPTS if top in ("jobs", "tune"))}:
            found.append(f"{module} imports {name}: nothing imports a job")
        if layer == "nn":
            if library == "sarm" and not is_relative:
                found.append(f"{module} imports {name}: nn imports its neighbours relatively")
            allowed = NN_LIBRARIES | ({"triton"} if module in TRITON_IN_NN else set())
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
    assert {"sarm", "sarm.config", "sarm.nn.sae", "sarm.data.chat", "sarm.runtime.job", "jobs.pipeline"} <= names
    imported = {name for name, _ in imports_of("sarm.data.models", (PACKAGE / "data" / "models.py").read_text())}
    assert "sarm.nn.backbone.read_config" in imported, "an import inside a function is an import"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sarm.config", "import sarm.data.chat"),
        ("sarm.manifest", "def f():\n    from sarm import nn"),
        ("sarm.nn.sae", "from sarm.config import UserError"),
        ("sarm.nn.sae", "from ..config import UserError"),
        ("sarm.nn.sae", "from sarm.nn.losses import bradley_terry"),
        ("sarm.nn.sae", "import numpy"),
        ("sarm.nn.sparse", "import triton"),
        ("sarm.nn.sae", "from transformers import AutoModel"),
        ("sarm.data.chat", "from sarm.train import reward"),
        ("sarm.data.chat", "from sarm import runtime"),
        ("sarm.data.chat", "import sarm"),
        ("sarm.train.sae", "from sarm.evaluate.pairs import measure"),
        ("sarm.evaluate.pairs", "from ..interpret import report"),
        ("sarm.interpret.report", "from sarm.runtime.session import say"),
        ("sarm.train.reward", "import deepspeed.comm"),
        ("sarm.data.rows", "if True:\n    import ray"),
        ("sarm.data.rows", "import importlib\nimportlib.import_module('mlflow')"),
        ("jobs.evaluate", "import openai"),
        ("jobs.evaluate", "from jobs import pipeline"),
        ("jobs.evaluate", "from pipeline import main"),
        ("sarm.runtime.job", "import jobs.pipeline"),
    ],
)
def test_a_bad_import_is_noticed(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sarm.nn.modeling_sarm", "import math\nimport torch.nn\nfrom transformers import AutoModel\nfrom .sae import dense"),
        ("sarm.data.groups", "from sarm.data.packing import Row\nfrom sarm.nn.sae import dense\nfrom sarm import schema"),
        ("sarm.evaluate.pairs", "from sarm.data.statistics import calibration\nimport numpy"),
        ("sarm.runtime.training.zero", "import deepspeed\nfrom sarm.train import reward"),
        ("jobs.evaluate", "from sarm.config import Evaluate\nfrom sarm.runtime import stages"),
    ],
)  # fmt: skip
def test_a_good_import_is_let_through(module, source):
    assert violations(module, source) == []


def test_no_file_outgrows_a_head():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in modules().values()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


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


def test_stages_and_their_session_load_nothing_that_takes_seconds():
    """Who is refused before a stage begins waits for none of it."""
    slow = HEAVY - {"pyarrow"}
    run_python(f"import sarm.runtime.session, sarm.runtime.stages, sys; assert not {slow!r} & set(sys.modules)")


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
    "steer",
    "relabel",
    "reward_card",
    "interpret",
    "rate",
    "ui",
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
    (ROOT / "jobs" / "interpret.py", ["contexts", "--judging.judges", "m@http://h:1/v1", "--dry-run"]),
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
