"""Compiles every Triton kernel for the cards that it is meant for, and prints what came out as JSON: `python compiled_kernels.py`.

A process of its own: the tests' checks of shapes wrap functions, and Triton compiles their source.
"""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sarm.nn import triton_backend

CARDS = {"A100": 80, "H100": 90, "B200": 100}
BLOCKS = (64, 1024)
_OF_INTEGERS = {"latents", "offsets", "rows", "bags", "order", "starts", "stops", "targets", "more"}
_OF_SIZES = {"num_bags", "num_entries", "num_latents", "d"}
_WARP = 32


def main() -> None:
    """One entry a kernel, card and block: the architecture of its PTX, bytes of machine code, and whether anything is spilled to memory."""
    found = {}
    for name in sorted(name for name in vars(triton_backend) if name.endswith("_kernel")):
        for card, arch in CARDS.items():
            for block in BLOCKS:
                found[f"{name} {card} {block}"] = compiled(name, arch, block)
    print(json.dumps(found))


def compiled(name: str, arch: int, block: int) -> dict[str, object]:
    kernel = getattr(triton_backend, name)
    signature = {
        argument: "*i64" if argument in _OF_INTEGERS else "i32" if argument in _OF_SIZES else "*fp32"
        for argument in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature | {"BLOCK": "constexpr"}, constexprs={"BLOCK": block})
    made = triton.compile(source, target=GPUTarget("cuda", arch, _WARP))
    ptx = made.asm["ptx"]
    return {"is_for_card": f".target sm_{arch}" in ptx, "bytes": len(made.asm["cubin"]), "spills": ".local" in ptx}


if __name__ == "__main__":
    main()
