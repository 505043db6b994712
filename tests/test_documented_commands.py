"""Every command of README, docs, cluster/README.md and the scripts' own help runs as it is written there, or is said not to, and why.

`make test` runs the quick ones on a finished run of the preset `tiny`, which stands in for the demo's: where a command says `demo` it says
`tiny`, and nothing else is changed. `make test-docs` (`SARM_DOCS=1`) runs all of them unchanged, beginning with `make demo`: half an hour.
`SARM_DOCS=FOLDER` does so in a folder that is kept, so that the demo there is not made again.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from tests.documented import ROOT, Command, commands_of_docstring, commands_of_page, documented_commands
from tests.documented_world import World, with_tiny

IN_FULL = os.environ.get("SARM_DOCS", "")

_GPUS = "reads a billion tokens, for hours of several H100s"
_CLOUD = "needs an account of a cloud, and pays for machines"
_KUBERNETES = "needs a Kubernetes cluster"
_JUDGE = "needs a judge: a chat model that is served at that address"

NOT_RUN = {
    "make test": "is what runs this",
    "pip install '.[train]'": "changes the environment that it is typed in; make test-package installs the wheel into one of its own",
    "python jobs/pipeline.py demo --out outputs/mine --model.name Qwen/*": "needs a model of the Hugging Face hub, and data of the reader's own",
    "ray job submit * sarm-1b *": _GPUS,
    "RAY_AUTH_MODE=token * sarm-1b *": _GPUS,
    "python jobs/train_sarm.py sarm-1b *": _GPUS,
    "ray job submit * paper-3b *": _GPUS,
    "ray job list; *": "ID stands for a job's name",
    "python jobs/pipeline.py sarm-4b --out /shared/*": _GPUS,
    "ray start *": "needs several machines; tests/chaos starts such clusters",
    "ray up *": _CLOUD,
    "ray dashboard *": _CLOUD,
    "ray down *": _CLOUD,
    "kubectl *": _KUBERNETES,
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(kubectl *": _KUBERNETES,
    "RAY_API_SERVER_ADDRESS=* tiny --out /shared/tiny": _KUBERNETES,
    "sbatch *": "needs Slurm; tests/test_cluster_files.py runs the script with stand-ins",
    "docker compose *": "needs docker; tests/test_cluster_files.py holds the file to its schema",
    "python tune/ablation.py smollm2": "takes an hour and a half",
    "python tune/ablation.py smollm2 --sweep.ks 14 27 54": "takes more than an hour and a half",
    "ray job submit * tune/ablation.py smollm2": "takes an hour and a half",
    "python jobs/prepare_data.py demo --data.texts /data/*": "reads 28 GB of the reader's own",
    "python jobs/interpret.py * --judging.judges *": _JUDGE,
    "python jobs/audit_features.py demo * --ratings outputs/ratings": "reads what a judge wrote",
    "python jobs/debias.py --model outputs/model *": "needs a reward model of the reader's own and its dictionary; tests/stages/test_debias.py runs it on a planted one",
    "python jobs/evaluate.py --model outputs/model *": "needs such a model too; tests/passes/test_feature_edits.py reads one with its edit",
    "python jobs/* outputs/rm*": "needs a reward model of the reader's own; tests/stages/test_auditing_classifiers.py audits and steers one",
    "python jobs/ui.py": "serves until it is stopped; tests/engine/test_ui.py runs it",
    "python jobs/ui.py *": "serves until it is stopped, another folder; tests/engine/test_ui.py runs it so",
    "python docs/examples/trl_grpo.py *": "needs TRL, which is not locked; tests/integrations/test_their_clients.py runs it",
    "python -m vllm.*": "serves until it is stopped, in an environment of its own; tests/integrations/test_inside_vllm.py runs it",
    "python jobs/serve.py *": "serves until it is stopped; tests/serve/test_server.py runs it",
    "python jobs/reward_card.py --web --model *": "serves until it is stopped; tests/serve/test_try_page.py runs it",
    "python jobs/push.py * --hub *": "needs an account of the Hugging Face hub",
    "transformers serve *": "serves until it is stopped, from a model of the reader's own",
}
"""Commands that no test runs, as patterns, and why."""

SLOW = {
    "make demo": "the whole demo, a quarter of an hour",
    "ray job submit *": "starts a cluster, and a job on it",
    "python jobs/pipeline.py demo-papers": "the whole demo once more",
    "python jobs/train_sarm.py --config k54.json *": "trains another demo",
    "python tune/ablation.py tiny": "trains five cells, four minutes",
    "python jobs/extract_activations.py demo --layers 7 10 15 *": "layers that only the demo's model has",
    "python jobs/train_sae.py demo --also.*": "trains eight dictionaries",
    "python jobs/* --redo-from *": "reads all texts again",
    "python jobs/evaluate.py --model outputs/demo/sarm *": "scores on a Ray cluster",
    "python jobs/compare.py *": "reads two evaluations, which are scored first",
    'python jobs/reward_card.py * --prompt "...*': "loads the model once more",
    'python jobs/reward_card.py * --prompt "My*': "loads the model once more",
    "sarm card *": "loads the model once more",
    "sarm evaluate *": "scores with the model",
    "python jobs/push.py *": "loads the model once more",
    "python jobs/audit_features.py *": "scores and reruns on a Ray cluster",
    "python jobs/steer.py *": "reads an audit",
    "python jobs/relabel.py *": "reads an audit",
}
"""Commands that only `make test-docs` runs, as patterns, and what takes the time."""

REFUSED = {
    "python jobs/train_sarm.py demo --sae.k 54": "was made with k=",
}
"""Commands that a page shows being refused, and words of the refusal."""

# What a later command reads comes first; what is made again with other settings comes last.
_ORDER = (
    "make demo", "*mkdir*", "(umask*", "export *", "*prepare_data.py demo", "*extract_activations.py demo", "*train_sae.py demo", "*train_sarm.py demo",
    "*jobs/evaluate.py demo", "*pipeline.py demo", "*collect_contexts.py demo", "*interpret.py demo", "*interpret.py*", "*rate.py* --sheet*",
    "*rate.py*", "*feature_pages.py demo", "*reward_card.py*", "*convert_s*", "*evaluate.py --model*", "*compare.py*", "*audit_features.py demo*", "*audit_features.py*", "*steer.py*doubled --edit*",
    "*steer.py*", "*relabel.py*",
)  # fmt: skip
_LAST = ("*demo-papers", "*--config k54.json*", "*--redo-from feature_pages*", "*--redo-from*", "*tune/*")


def matching(command: Command, patterns: dict[str, str]) -> list[str]:
    return [pattern for pattern in patterns if fnmatchcase(command.text, pattern.replace("[", "[[]"))]


def rank(command: Command) -> int:
    for place, pattern in enumerate(_LAST, start=len(_ORDER) + 1):
        if fnmatchcase(command.text, pattern):
            return place
    return next((place for place, pattern in enumerate(_ORDER) if fnmatchcase(command.text, pattern)), len(_ORDER))


COMMANDS = documented_commands()
RUN = sorted((command for command in COMMANDS if not matching(command, NOT_RUN)), key=rank)
QUICK = [command for command in RUN if not matching(command, SLOW)]


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ray_logs: Path
) -> Callable[[], World]:
    """Made when the first command runs: the tests of the lists need none."""
    made: list[World] = []

    def make() -> World:
        if not made:
            if IN_FULL:
                folder = Path(IN_FULL).absolute() if len(IN_FULL) > 1 else tmp_path_factory.mktemp("docs")
                folder.mkdir(parents=True, exist_ok=True)
                made.append(World(folder, ray_logs))
            else:
                made.append(World(tmp_path_factory.mktemp("docs"), ray_logs, request.getfixturevalue("finished")))
        return made[0]

    return make


@pytest.mark.parametrize("command", RUN if IN_FULL else QUICK, ids=lambda command: command.where)
def test_a_documented_command_runs_as_it_is_written(
    command: Command, world: Callable[[], World], request: pytest.FixtureRequest
) -> None:
    text = command.text if IN_FULL else with_tiny(command.text)
    here = world()
    if text.startswith("ray job submit"):
        here.environment |= request.getfixturevalue("head")
    done = here.run(text)
    if command.text in REFUSED:
        assert done.returncode == 2, done.stderr
        assert REFUSED[command.text] in done.stderr
        return
    said = f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    assert not re.search(r"^(error|Traceback)", done.stdout + "\n" + done.stderr, re.MULTILINE), said


@pytest.fixture(scope="module")
def head(world: Callable[[], World]) -> Iterator[dict[str, str]]:
    """A cluster that was started in the checkout, and the environment of who may use it."""
    from tests.ray_head import running_head

    here = world()
    with running_head(here.folder, here.environment) as running:
        yield running.environment


def test_every_entry_of_the_lists_is_of_a_documented_command() -> None:
    for patterns in (NOT_RUN, SLOW, REFUSED):
        stale = [pattern for pattern in patterns if not any(pattern in matching(c, {pattern: ""}) for c in COMMANDS)]
        assert stale == []


def test_at_least_forty_documented_commands_are_run() -> None:
    assert len(RUN) >= 40, len(RUN)
    assert len(QUICK) >= 25, len(QUICK)


def test_commands_are_found_where_they_stand_and_only_those() -> None:
    page = """Text.

    python jobs/a.py demo    # a comment
    output of it

```
$ RAY_ADDRESS=x ray job submit -- \\
    python jobs/b.py "a # b"
held-out 0.9
(umask 077; ray get-auth-token)
```
```python
python = 3
```
- item
      python jobs/c.py
"""
    assert [text for _, text in commands_of_page(page)][:3] == [
        "python jobs/a.py demo",
        'RAY_ADDRESS=x ray job submit -- python jobs/b.py "a # b"',
        "(umask 077; ray get-auth-token)",
    ]
    assert list(commands_of_docstring("Does.\n\n    python jobs/a.py x --help     what that is\n")) == [
        (3, "python jobs/a.py x --help")
    ]
    assert with_tiny("python jobs/a.py demo --sae outputs/demo/sae") == "python jobs/a.py tiny --sae outputs/demo/sae"


@pytest.mark.parametrize(
    "script", [*sorted((ROOT / "jobs").glob("*.py")), ROOT / "tune" / "ablation.py"], ids=lambda path: path.stem
)
def test_help_shows_each_example_once_on_a_line_of_its_own(script: Path) -> None:
    told = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    # What is too long for the terminal goes on in the next line, as a shell takes it.
    lines = [line.strip() for line in re.sub(r" \\\n\s+", " ", told.stdout).splitlines()]
    examples = [
        re.split(r"\s{3,}", line)[0] for line in lines if re.match(r"(python (jobs|tune)/|ray job submit)", line)
    ]
    of_this = [
        command.text
        for command in documented_commands()
        if command.where.startswith(f"platform/sarm/commands/{script.name}:")
    ]
    assert set(of_this) <= set(examples)
    assert len(examples) == len(set(examples)) >= 1
    assert not re.search(r"usage:.*PATH PATH", told.stdout)


@pytest.mark.parametrize(
    "target",
    sorted(
        {
            name
            for page in (ROOT / "README.md", ROOT / "cluster" / "README.md", *(ROOT / "docs").glob("*.md"))
            for name in re.findall(r"`make ([a-z-]+)", page.read_text())
        }
    ),
)
def test_make_knows_the_targets_that_the_documentation_names(target: str) -> None:
    told = subprocess.run(["make", "-n", target], capture_output=True, text=True, check=False, cwd=ROOT)
    assert told.returncode == 0, told.stderr
