"""Every loading of a model is asked whether all weights came from its files: transformers draws the others at random, and warns."""

import ast
from pathlib import Path

import pytest

from sarm.nn.loading_report import faults

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("platform", "jobs", "tune") for path in sorted((ROOT / room).rglob("*.py"))]
# What has no weights, and what asks by itself.
_WITHOUT = ("Config", "Tokenizer", "TokenizerFast", "SarmForSequenceClassification", "super()")
EMPTY = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def unchecked(source: str) -> list[str]:
    """Loadings of a source that do not ask for the report."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr != "from_pretrained" or ast.unparse(node.func.value).endswith(_WITHOUT):
            continue
        asks = any(
            word.arg == "output_loading_info" or (word.arg is None and "_strictly(" in ast.unparse(word.value))
            for word in node.keywords
        )
        if not asks or "faults(" not in source:
            found.append(ast.unparse(node)[:100])
    return found


def test_every_place_that_loads_a_model_reads_the_report():
    assert {path.name: found for path in SOURCES if (found := unchecked(path.read_text()))} == {}
    loads = [
        path.name for path in SOURCES if "AutoModel" in path.read_text() and ".from_pretrained(" in path.read_text()
    ]
    assert {"pretrained.py", "foreign_models.py", "demo.py"} <= set(loads)


@pytest.mark.parametrize("source", ["AutoModel.from_pretrained(f)", "m = AutoModelForCausalLM.from_pretrained(f, dtype=d)", "AutoModel.from_pretrained(f, output_loading_info=True)"])  # fmt: skip
def test_a_place_that_does_not_is_noticed(source):
    assert unchecked(source)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({}, ""),
        ({"missing_keys": {"b", "a"}}, "lacks 2 weights, e.g. a"),
        ({"unexpected_keys": {"x"}}, "holds 1 weights that this architecture has no place for, e.g. x"),
        ({"mismatched_keys": {("w", (1, 2), (1, 3))}}, "e.g. w: (1, 2), not (1, 3)"),
        ({"error_msgs": ["first\nsecond"]}, "first"),
        ({"missing_keys": {"a"}, "unexpected_keys": {"x"}}, "lacks 1 weights, e.g. a; holds 1 weights"),
    ],
)
def test_a_fault_is_said_in_one_line(report, said):
    found = faults({**EMPTY, **report})
    assert said in found
    assert bool(found) == bool(report)
    assert "\n" not in found


def test_what_nobody_needs_may_lack_and_be_left():
    report = {**EMPTY, "missing_keys": {"norm.weight"}, "unexpected_keys": {"lm_head.weight"}}
    assert faults(report, may_lack=lambda key: key == "norm.weight", may_hold=lambda key: key == "lm_head.weight") == ""
    assert "norm.weight" in faults(report, may_hold=lambda key: True)
