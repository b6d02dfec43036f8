"""Compiles the sorting and elementwise kernels for an H100 or H200, with the types they get there, and needs none.

The interpreter that the other cases run in does not check types as the compiler does.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe.kernels import elementwise, rotary, sorting

POINTERS = {
    "x": "*bf16", "y": "*bf16", "out": "*bf16", "h": "*bf16", "a": "*bf16", "da": "*bf16", "dh": "*bf16",
    "base": "*bf16", "out_x": "*bf16", "weight": "*bf16", "out_weight": "*bf16", "number": "*i64",
    "out_number": "*i16", "ds": "*fp32", "slot": "*i64", "pair": "*i64", "which": "*i64", "slot_out": "*i64",
    "pair_out": "*i64", "counts_out": "*i64", "ends_out": "*i32", "others": "*i32",
    "slot_there": "*i64", "pair_there": "*i64", "totals": "*i64", "counts": "*i32", "before": "*i32", "ends": "*i32",
    "ends_there": "*i32", "index": "*i64",
    "q": "*bf16", "k": "*bf16", "cos": "*bf16", "sin": "*bf16", "q_out": "*bf16", "k_out": "*bf16",
}  # fmt: skip
ROWS = {"block": 2048, "choices": 8}
SORT = {"top_k": 8, "block": 128, "step": 64}
HEADS = {"queries": 16, "keys": 8, "half": 32, "block": 64, "width": 32}
KERNELS = [
    (elementwise._gather_sum, ROWS | {"base": None}, {}),
    (elementwise._gather_sum, ROWS, {}),
    (elementwise._spread, ROWS, {}),
    (elementwise._spread_together, ROWS | {"columns": 8}, {}),
    (elementwise._spread_together, ROWS | {"columns": 8}, {"weight": "*fp32", "out_weight": "*fp32"}),
    (elementwise._scaled, {"top_k": 8, "rows": 4, "block": 512}, {}),
    (elementwise._scaled, {"top_k": 8, "rows": 4, "block": 512}, {"weight": "*fp32"}),
    (elementwise._scaled_backward, {"top_k": 8, "rows": 4, "block": 256}, {}),
    (elementwise._scaled_backward, {"top_k": 8, "rows": 4, "block": 256, "slot": None}, {"weight": "*fp32"}),
    (sorting._count, SORT, {"index": "*i16"}),
    (sorting._sum_up, {"step": 1024}, {}),
    (sorting._place, SORT, {"index": "*i16"}),
    (sorting._place, SORT, {}),
    (sorting._join, {"behind": False, "block": 128, "step": 64}, {}),
    (sorting._join, {"behind": True, "block": 128, "step": 64}, {}),
    (sorting._count_choices, {"rows": 16, "columns": 8, "step": 64}, {}),
    (rotary._rotate, HEADS | {"back": False}, {}),
    (rotary._rotate, HEADS | {"back": True}, {}),
    (sorting._place_choices, {"rows": 16, "columns": 8, "step": 64}, {}),
]

for quick, constants, others in KERNELS:
    kernel = quick.kernel
    types = {name: (POINTERS | others).get(name, "i32") for name in kernel.arg_names}
    signature = types | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__)
