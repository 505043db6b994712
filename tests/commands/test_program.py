"""The program `sarm`: the same jobs by other names, help that fits a screen, and what it says of itself."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sarm
import sarm.settings.started as start
from sarm.commands.command import command_of
from sarm.commands.program import SHELLS, main, overview
from sarm.commands.registry import ENTRIES, name_of
from sarm.engine.stopping import command_line
from sarm.engine.submission import submit
from sarm.settings.checks import UserError
from sarm.settings.jobs import Pipeline
from sarm.settings.presets import PRESETS
from sarm.stages.help_text import few, like

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """(status, output, errors) of the program with these arguments."""
    monkeypatch.setattr(start, "_command", None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/sarm"])

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_every_script_is_a_command_and_every_command_a_script() -> None:
    scripts = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("jobs/*.py"), *ROOT.glob("tune/*.py"))}
    assert scripts == {entry.script for entry in ENTRIES.values()}
    for script in sorted(scripts):
        text = (ROOT / script).read_text()
        module = Path(script).stem
        assert text.endswith(f'    command_of("{module}").run()\n')
        assert f"`sarm {name_of(module)}`" in text


def test_help_fits_a_screen_and_names_every_command(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert out == run()[1] == overview() + "\n"
    lines = out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    for name in ENTRIES:
        assert any(line.startswith(f"  {name} ") for line in lines), name


def test_the_version_is_the_packages(run) -> None:
    assert run("--version") == (0, f"sarm {sarm.__version__}\n", "")


def test_a_misspelt_command_is_one_line_with_what_may_have_been_meant(run) -> None:
    assert run("trian-sarm") == (
        2,
        "",
        "error: sarm has no command 'trian-sarm', did you mean train-sarm? Try sarm --help.\n",
    )
    assert run("inspect")[0] == 2
    assert "the source to inspect comes first" in run("inspect", "--rows", "100", "tiny:pairs")[2]


@pytest.mark.parametrize(
    ("typed", "job"),
    [
        (("demo", "--sae.k", "5"), ("pipeline", "demo", "--sae.k", "5")),
        (("train_sae", "tiny"), ("train_sae", "tiny")),
        (("evaluate", "tiny"), ("evaluate", "tiny")),
    ],
)
def test_a_command_has_the_settings_of_the_script(run, monkeypatch, tmp_path, typed, job) -> None:
    more = ("--out", str(tmp_path), "--dry-run", "--json")
    code, settings, _ = run(*typed, *more)
    assert code == 0
    name, *arguments = job
    script = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments, *more]
    assert settings == subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("name", ENTRIES)
def test_help_of_a_command_begins_with_what_it_does_and_examples_as_they_are_typed(run, name) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    entry = ENTRIES[name]
    about = str(command_of(entry.module).about)
    before = out.partition("usage: ")[0]
    assert " ".join(before.split()).startswith(" ".join(about.splitlines()[0].split()))
    assert f"    sarm {name_of(entry.module)} " in before
    assert "python jobs" not in before
    assert "ray job submit" not in before
    assert f"usage: sarm {name_of(entry.module)}" in out


@pytest.mark.parametrize(("name", "columns"), [*((name, 80) for name in ENTRIES), ("card", 40), ("card", 200)])
def test_help_fits_the_terminal_and_its_examples_are_still_the_same_commands(run, monkeypatch, name, columns) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(name, "--help")
    if columns == 80:
        assert max(map(len, run(name, *(("demo",) if command_of(ENTRIES[name].module).presets else ()), "--help")[1].splitlines())) <= 80  # fmt: skip
        assert max(map(len, out.splitlines())) <= 80
    # A shell reads a line that ends in a backslash and the next one as one command.
    examples = out.partition("usage: ")[0].replace("\\\n", " ")
    given = [
        line
        for line in str(command_of(ENTRIES[name].module).about).splitlines()
        if re.match(r" *python (jobs|tune)/", line)
    ]
    for line in given:
        words = shlex.split(re.split(r"\s{3,}", line.strip())[0])[2:]
        assert any(shlex.split(one)[2 : 2 + len(words)] == words for one in examples.splitlines() if one.startswith("    sarm")), line  # fmt: skip


def test_experts_flags_are_shown_by_help_all_alone(run) -> None:
    _, short, _ = run("train-sarm", "demo", "--help")
    _, whole, _ = run("train-sarm", "demo", "--help-all")
    for common in ("--sae.k ", "--model.layer ", "--data.pairs ", "--out ", "--reward.lr "):
        assert common in short
        assert common in whole
    for rare in ("--sae.aux-coefficient ", "--reward.max-grad-norm ", "--num-workers "):
        assert rare not in short
        assert rare in whole
    assert "(default: 2304)" in short, "defaults are the preset's"
    assert "more flags are for experts: --help-all" in short
    assert "for experts" not in whole
    assert len(short.splitlines()) < 0.5 * len(whole.splitlines())


@pytest.mark.parametrize("name", ENTRIES)
def test_flags_name_other_commands_as_whoever_asks_types_them(run, name) -> None:
    command, first = command_of(ENTRIES[name].module), ENTRIES[name].first
    # A command that stands for flags has the form that they choose.
    forms = (
        [()]
        if "--inspect" in first
        else [("demo",) if command.presets else (), *((flag, "x") for flags in command.other for flag in flags)]
    )
    for form in forms:
        code, out, _ = run(name, *form, "--help-all")
        assert code == 0
        assert not re.search(r"(jobs|tune)/\w+\.py", out), form


def test_a_script_names_scripts_and_the_program_commands(run) -> None:
    script = [sys.executable, str(ROOT / "jobs" / "interpret.py"), "--help"]
    out = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "Folder that `jobs/collect_contexts.py` wrote." in out
    assert "Folder that `sarm collect-contexts` wrote." in run("interpret", "--help")[1]


def test_common_flags_are_settings_and_the_shown_settings_have_the_same_values() -> None:
    preset = PRESETS["demo"][1]
    kind, hidden = few(Pipeline)
    assert hidden > 50
    shown = like(preset, kind)
    assert isinstance(shown, kind)
    assert dataclasses.asdict(shown) == dataclasses.asdict(preset)
    sections = [getattr(preset, field.name) for field in dataclasses.fields(preset)]
    for section in sections:
        names = {field.name for field in dataclasses.fields(section)}
        assert set(getattr(section, "common", ())) <= names, type(section)


def test_messages_repeat_the_command_as_it_was_typed(monkeypatch) -> None:
    monkeypatch.setattr(start, "_command", None)
    monkeypatch.setattr(sys, "argv", ["jobs/train_sarm.py"])
    assert command_line(["tiny", "--sae.k", "3"]) == "python jobs/train_sarm.py tiny --sae.k 3"
    assert start.started().again == ("jobs/train_sarm.py",)
    start.note_command("train-sarm", "jobs/train_sarm.py")
    assert command_line(["tiny", "--sae.k", "3"]) == "sarm train-sarm tiny --sae.k 3"
    assert start.started().again == ("-P", "-m", "sarm.commands", "train-sarm")
    assert start.started().name == "train_sarm"


def test_a_supervisor_can_start_the_command_once_more() -> None:
    command = [sys.executable, "-m", "sarm.commands", "train-sarm", "tiny", "--dry-run", "--json"]
    assert '"sae"' in subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_a_command_that_is_started_again_imports_nothing_of_the_folder_that_it_is_started_in(
    tmp_path, monkeypatch
) -> None:
    (tmp_path / "tyro.py").write_text("raise SystemExit('imported from the folder')")
    monkeypatch.setattr(start, "_command", ("train-sarm", "jobs/train_sarm.py"))
    command = [sys.executable, *start.started().again, "tiny", "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT / "platform")})  # fmt: skip
    assert '"sae"' in done.stdout, done.stderr


def test_help_whose_reader_has_seen_enough_ends_quietly() -> None:
    line = f"{sys.executable} -m sarm.commands train-sarm demo --help-all | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("pairs/v1 and the SAE")
    assert done.stderr == ""


def test_what_is_submitted_without_a_checkout_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no jobs/train_sarm\.py here"):
        submit("jobs/train_sarm.py", [], PRESETS["tiny"][1])


COMPLETE = """
source "$1"; shift
function=$(complete -p sarm | sed -E 's/.*-F ([^ ]+).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$function sarm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(script: Path, line: str) -> list[str]:
    """What bash offers for a line that ends in an unfinished word."""
    command = ["bash", "-c", COMPLETE, "bash", str(script), *line.split()]
    return sorted(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_and_flags(run, shell, tmp_path) -> None:
    code, script, _ = run("completion", shell)
    assert code == 0
    for word in ("train-sarm", "feature-pages", "sae.k", "benchmarks"):
        assert word in script, word
    assert not re.search(r"(jobs|tune)/\w+\.py", script)
    if shell == "bash":
        (tmp_path / "completion").write_text(script)
        assert completed(tmp_path / "completion", "sarm tr") == ["train-sae", "train-sarm"]
        assert completed(tmp_path / "completion", "sarm card --con") == ["--contexts", "--conversation"]
        flags = completed(tmp_path / "completion", "sarm train-sarm --sae.")
        assert "--sae.d-sae" in flags
        assert all(flag.startswith("--sae.") for flag in flags), "words of the help are no candidates"
    assert run("completion", "tcsh")[0] == run("completion")[0] == 2
