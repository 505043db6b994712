"""How a message names a command: as whoever reads it types it."""

import ast
import re
import sys
from pathlib import Path

import pytest

import sarm.settings.started as start
from sarm.commands.registry import ENTRIES, name_of

PACKAGE = Path(start.__file__).parents[1]
# MLflow's source of a sweep's cells: a file, which no message names.
AS_A_TAG = "tune/ablation.py"


def test_a_script_is_told_of_scripts_and_everybody_else_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_command", None)
    monkeypatch.setattr(sys, "argv", ["/project/jobs/audit_features.py"])
    assert start.called("reward_card") == "python jobs/reward_card.py"
    assert start.called("ablation") == "python tune/ablation.py"
    for elsewhere in ("/usr/bin/jupyter", "mine.py", "-c", ""):
        monkeypatch.setattr(sys, "argv", [elsewhere])
        assert start.called("convert_sarm") == "sarm convert-sarm"
    monkeypatch.setattr(sys, "argv", ["/project/jobs/audit_features.py"])
    start.note_command("audit-features", "jobs/audit_features.py")
    assert start.called("reward_card") == "sarm card"


def test_commands_are_called_as_the_program_lists_them() -> None:
    for entry in ENTRIES.values():
        assert start.command_name(entry.module) == name_of(entry.module)


def _messages(path: Path) -> list[tuple[int, str]]:
    """Texts of a module that are no docstrings: of modules, functions and classes, and of fields of settings."""
    tree = ast.parse(path.read_text())
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented
    ]


def test_no_message_names_a_command_by_hand() -> None:
    by_hand = [
        f"{path.relative_to(PACKAGE)}:{line} {text}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in _messages(path)
        if re.search(r"\b(?:jobs|tune)/\w+\.py\b", text) and text != AS_A_TAG
    ]
    assert by_hand == []
    called = {
        node.args[0].value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "called" and isinstance(node.args[0], ast.Constant)
    }  # fmt: skip
    assert called <= {entry.module for entry in ENTRIES.values()}
    assert len(called) >= 6
