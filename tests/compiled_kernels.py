"""quantopt's Triton kernels of products, compiled ahead of time."""

from collections.abc import Mapping
from typing import Any


def compile_product(
    kernel: Any,
    config: Any,
    kind: str,
    architecture: int,
    constants: Mapping[str, Any],
    even: tuple[str, ...],
) -> Any:
    """The kernel for x of type ``kind`` with blocks of ``config``, one plane and one part of K.

    ``constants``: what is known when it is compiled, besides. ``even``: sizes that are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known: dict[str, Any] = {
        "PLANE_WEIGHTS": (1,),
        "ONE_SCALE": False,
        "INT8": kind == "*i8",
        "PARTIAL": False,
        "ROWS": config.rows,
        "OUTPUTS": config.outputs,
        "INPUTS": config.inputs,
        **constants,
    }
    if kind != "*i8":
        known["x_scale_ptr"] = None
    names = kernel.arg_names
    types = {"x_ptr": kind, "bits_ptr": "*u8", "out_ptr": "*fp16"}
    signature = {
        name: "constexpr" if name in known else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in known and (name.endswith("_ptr") or name in even)
    }
    return triton.compile(
        ASTSource(kernel, signature, constexprs=known, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": False,
        },
    )
