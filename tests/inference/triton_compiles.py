"""Compiles the kernels of inference and of checksums for an H100 or H200, with the types they get there, needing none.

The interpreter that the other cases run in does not check types as the compiler does.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from checkpointing import device_sums
from inference import decode_kernels, slot_kernels, unpack_kernel
from inference.packed import GROUP, HEADER, OTHER, TILE

MODULES = (decode_kernels, slot_kernels, unpack_kernel, device_sums)
POINTERS = {
    # decode_kernels
    "qkv": "*bf16", "cos": "*bf16", "sin": "*bf16", "slot_R": "*i64", "pool": "*bf16", "q": "*bf16", "table": "*i64",
    "position_R": "*i64", "part": "*fp32", "top": "*fp32", "total": "*fp32", "added": "*bf16", "normed": "*bf16",
    "logits": "*bf16", "score": "*bf16", "index": "*i64",
    # slot_kernels
    "x": "*bf16", "weight": "*bf16", "expert_P": "*i64", "slot_E": "*i32", "a": "*fp32", "score_P": "*bf16",
    "y": "*fp32", "other": "*fp32", "elsewhere_E": "*i32", "out": "*bf16", "x_out": "*fp32", "expert_out": "*i32",
    "score_out": "*fp32", "done": "*i64", "awaited": "*i64", "source": "*i32", "target": "*i32",
    # unpack_kernel, device_sums
    "packed": "*u8", "block": "*i16", "chunks": "*u64", "secret": "*u64", "sums": "*u64",
    "rows": "*u64", "factor": "*fp32",
}  # fmt: skip
PARTS = {device_sums._product, device_sums._swapped, device_sums._scaled}  # of kernels
HEADS, EXPERT = {"H": 32, "K": 4, "D": 128}, {"hidden": 2048, "inner": 768}
KERNELS = [
    (decode_kernels._turn, HEADS | {"NORMED": True}, {"eps": "fp32"}),
    (decode_kernels._turn, HEADS | {"NORMED": False}, {"eps": "fp32"}),
    (decode_kernels._attend, HEADS | {"WINDOW": 0, "G16": 16, "S": 16, "SPLIT": 128, "KEYS": 64}, {"scale": "fp32"}),
    (decode_kernels._attend, HEADS | {"WINDOW": 64, "G16": 16, "S": 16, "SPLIT": 128, "KEYS": 64}, {"scale": "fp32"}),
    (decode_kernels._merge, {"SPLITS": 4, "D": 128}, {}),
    (decode_kernels._add_norm, {"hidden": 2048, "BH": 2048}, {"eps": "fp32", "total": "*bf16"}),
    (decode_kernels._choose, {"experts": 128, "E": 128, "choices": 8, "K": 8, "SHARES": True}, {}),
    (slot_kernels._up, EXPERT | {"choices": 8, "BI": 8, "BH": 256}, {}),
    (slot_kernels._down, EXPERT | {"BI": 256, "BH": 16}, {}),
    (slot_kernels._combine, {"hidden": 2048, "SPLIT": True, "choices": 8, "CHOICES": 8, "BH": 256}, {}),
    (slot_kernels._combine, {"hidden": 2048, "SPLIT": False, "choices": 8, "CHOICES": 8, "BH": 256}, {}),
    (slot_kernels._publish, {"BLOCK": 1024}, {}),
    (slot_kernels._await_host, {}, {}),
    (slot_kernels._adopt, {"BLOCK": 512}, {}),
    (
        unpack_kernel._unpack,
        {"elements": 1 << 16, "codes_at": 1 << 16, "first_at": 1 << 17, "exceptions_at": 1 << 18, "HEADER": HEADER,
         "OTHER": OTHER, "TILE": TILE, "GROUP": GROUP, "SOME": 128},
        {},
    ),
    (device_sums._add_blocks, {"blocks": 32}, {}),
    (device_sums._scale_blocks, {"blocks": 32}, {"source": "*u64", "out": "*fp32"}),
    (
        device_sums._digest,
        {"prime": 0x9E3779B1, "mix": 0x165667919E3779F9, "in_chunk": 4096, "unrolled": 45},
        {"table": "*u64", "out": "*u64"},
    ),
]  # fmt: skip

for kernel, constants, others in KERNELS:
    types = {name: (POINTERS | others).get(name, "i32") for name in kernel.arg_names}
    signature = types | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__)

known = {kernel for module in MODULES for kernel in vars(module).values() if isinstance(kernel, JITFunction)}
own = {kernel for kernel in known if kernel.__module__ in {module.__name__ for module in MODULES}}
compiled = {kernel for kernel, _, _ in KERNELS} | PARTS
assert own == compiled, f"not compiled: {own - compiled}"
