"""The tutorials of docs/tutorials: how their cells are run, and their outputs kept and compared.

    python -m tests.tutorials FOLDER                    all, by Jupyter's own kernel, in an empty folder
    python -m tests.tutorials FOLDER --keep             ... and what they print becomes what the notebooks and the site show
    python -m tests.tutorials FOLDER --only debias      one of them, where FOLDER has what the first one made

Cells print what they show, and `!` is the only word of Jupyter that they use. So they run in two ways, to the same outputs: by nbclient and a
kernel, which are not locked, and as plain Python by what is locked (`make test`). A cell with the tag `slow` is left out there: it trains, and
what it makes is that of a finished run, or nothing that later cells read. With the tag `varies`, what it prints is shown and not compared.

The notebooks show figures of a small model after a short training, and such a training ends elsewhere on another kind of processor, whose products
are rounded otherwise. So the notebook's metadata say on which kind its outputs were kept, and `make test-tutorials` compares them there. Elsewhere, and
in `make test`, cells have to run, and to print something where they printed something.
"""

import argparse
import ast
import asyncio
import contextlib
import functools
import inspect
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
# In the order in which they build on each other.
NAMES = ("first-sarm", "own-data", "audit", "debias", "serve", "sweep")
SLOW, VARIES = "slow", "varies"
KEPT_ON = "kept_on"
_NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
# How Ray and DeepSpeed begin a line: with the date, and a file of theirs.
_OF_LIBRARIES = re.compile(r"\[?\d{4}-\d\d-\d\d \S+.*\b\w+\.(?:py|cc):\d+")
# A sum in another order moves a trained weight in its last digits, and figures after it.
_RELATIVE, _ABSOLUTE = 0.02, 0.02


def read(name: str) -> dict[str, Any]:
    """A notebook, as its file has it."""
    notebook: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return notebook


def code_of(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def has_tag(cell: dict[str, Any], tag: str) -> bool:
    """Whether a cell is marked by it."""
    return tag in cell["metadata"].get("tags", ())


def printed(cell: dict[str, Any]) -> str:
    """What a cell printed when its output was kept."""
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@functools.cache
def processor() -> str:
    """What kind of processor this is, as far as it decides how products are rounded: its maker, and the widest instructions that torch uses."""
    import torch

    info = Path("/proc/cpuinfo")
    maker = re.search(r"^vendor_id\s*:\s*(\S+)", info.read_text() if info.exists() else "", re.MULTILINE)
    return f"{maker.group(1) if maker else platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def faults(name: str, now: list[str | None], *, compares: bool = True) -> list[str]:
    """What the outputs of a notebook's cells have otherwise than they were kept; None: a cell that was not run.

    What they say is compared if it `compares` and the processor is of the kind on which they were kept.
    """
    notebook = read(name)
    same = compares and notebook["metadata"].get(KEPT_ON) == processor()
    found = []
    for cell, text in zip(code_of(notebook), now, strict=True):
        kept = printed(cell)
        if text is None or has_tag(cell, VARIES):
            continue
        if bool(kept.strip()) != bool(text.strip()):
            found.append(f"kept: {kept}\nnow:  {text}")
        elif same:
            found += differences(kept, text)
    return found


def differences(kept: str, now: str) -> list[str]:
    """In which lines two outputs differ: in words, or in a number by more than roundings make. Spaces that align columns do not count."""
    old, new = ([" ".join(line.split()) for line in text.strip().splitlines()] for text in (kept, now))
    if len(old) != len(new):
        return [f"{len(old)} lines were kept, now {len(new)}:", *new]
    return [f"kept: {one}\nnow:  {other}" for one, other in zip(old, new, strict=True) if not _alike(one, other)]


def _alike(one: str, other: str) -> bool:
    if _NUMBER.sub("#", one) != _NUMBER.sub("#", other):
        return False
    numbers = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    return all(_close(float(a.replace("−", "-")), float(b.replace("−", "-"))) for a, b in numbers)


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= max(_ABSOLUTE, _RELATIVE * max(abs(one), abs(other)))


def run_plainly(name: str) -> None:
    """Run the quick cells of a notebook in the current folder as Python, and print what they printed: a JSON list, with null for a slow cell."""
    space: dict[str, Any] = {"__name__": "__main__", "__shell__": _shell}
    found: list[str | None] = []
    with asyncio.Runner() as loop:
        for cell in code_of(read(name)):
            if has_tag(cell, SLOW):
                found.append(None)
                continue
            source = re.sub(r"^!(.+)$", lambda line: f"__shell__({line.group(1)!r})", "".join(cell["source"]), flags=re.MULTILINE)  # fmt: skip
            code = compile(source, f"{name}, cell {len(found)}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                if code.co_flags & inspect.CO_COROUTINE:
                    loop.run(eval(code, space))
                else:
                    exec(code, space)
            found.append(said.getvalue())
    print(json.dumps(found))


def _shell(line: str) -> None:
    print(subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout, end="")


def environment(folder: Path) -> dict[str, str]:
    """The environment of a run in `folder`, which has the program `sarm` of this tree, and lines as wide as the pages."""
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    program = programs / "sarm"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m sarm.commands "$@"\n')
    program.chmod(0o755)
    root = FOLDER.parents[1]
    paths = os.pathsep.join([str(root), str(root / "platform"), os.environ.get("PYTHONPATH", "")])
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": paths,
        "COLUMNS": "80",
        "JUPYTER_COLUMNS": "80",
        "NO_COLOR": "1",
        "RAY_COLOR_PREFIX": "0",
        "DS_ACCELERATOR": "cpu",
    }


def run_in_kernel(name: str, folder: Path) -> dict[str, Any]:
    """The notebook as Jupyter runs it in `folder`, with what it printed there. Raises nbclient's error for a cell or a program that fails."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    sources = [cell["source"] for cell in notebook["cells"]]
    for cell in notebook["cells"]:
        # Jupyter goes on after a program that failed.
        cell["source"] = re.sub(
            r"^(!.+)$", r"\1\nassert not _exit_code, _exit_code", cell["source"], flags=re.MULTILINE
        )
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute(env=environment(folder))  # fmt: skip
    for cell, source in zip(notebook["cells"], sources, strict=True):
        cell["source"] = source
    done: dict[str, Any] = json.loads(nbformat.writes(notebook))
    for cell in code_of(done):
        text = _plain("".join(map(_text, cell["outputs"])), folder)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}] if text else []  # fmt: skip
        cell["execution_count"] = None
        cell["metadata"].pop("execution", None)
    done["metadata"] = {**read(name)["metadata"], KEPT_ON: processor()}
    return done


def _text(output: dict[str, Any]) -> str:
    """What stands in an output: what was printed, or the text of a table that Jupyter shows as HTML; not what libraries warn of."""
    shown = output.get("data", {}).get("text/plain", "") or (
        output.get("text", "") if output.get("name") == "stdout" else ""
    )
    return "".join(shown)


def _plain(text: str, folder: Path) -> str:
    """A terminal's text without colours, where it was run, lines that it writes over, and what libraries warn of beside it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(f"{folder.resolve()}/", "").replace(str(folder.resolve()), ".")
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(line for line in lines if not _OF_LIBRARIES.match(line))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run the tutorials as Jupyter does, and compare what they print with what they show."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--plainly", action="store_true", help="the quick cells of one, as plain Python")
    settings = parser.parse_args()
    if settings.plainly:
        os.chdir(settings.folder)
        run_plainly(settings.only[0])
        return
    # Programs are found in it from wherever a cell is.
    folder = settings.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in settings.only:
        done = run_in_kernel(name, folder)
        others = faults(name, [printed(cell) for cell in code_of(done)])
        print(f"{name}: {'runs' if settings.keep else 'as it was kept' if not others else 'differs'}")
        if settings.keep:
            (FOLDER / f"{name}.ipynb").write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")
        elif others:
            sys.exit("\n".join(others))


if __name__ == "__main__":
    main()
