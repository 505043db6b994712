"""Every Triton kernel compiles to machine code of the cards that it is meant for, on a machine without any of them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Beside torch's CUDA build; where that of the CPU is installed, `make test` and `make test-kernels` fetch it into a folder of its own.
APART = Path(__file__).parents[2] / ".triton"
if importlib.util.find_spec("triton") is None and not (APART / "triton").exists():
    pytest.skip(
        "triton comes with torch's CUDA build and is not here: `make test-kernels` fetches it into a folder of its own",
        allow_module_level=True,
    )

KERNELS = ["_add_pieces_kernel", "_decode_kernel", "_value_gradients_kernel", "_weight_gradients_kernel"]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(APART))))
    command = [sys.executable, str(Path(__file__).with_name("compiled_kernels.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("card", ["A100", "H100", "B200"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_compiles_for_a_card(kernel: str, card: str, compiled: dict[str, Any]) -> None:
    own = {name: found for name, found in compiled.items() if name.startswith(f"{kernel} {card} ")}
    assert len(own) == 2
    for name, found in own.items():
        assert found["is_for_card"], name
        assert found["bytes"] > 1000, name
        # What does not fit the registers would go to memory, with every entry.
        assert not found["spills"], name


def test_no_kernel_is_left_out(compiled: dict[str, Any]) -> None:
    assert sorted({name.split()[0] for name in compiled}) == KERNELS
