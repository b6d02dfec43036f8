"""Same recipe, same bits: what torch must be told for it."""

from __future__ import annotations

import os

import torch

_CUBLAS, _REPEATS = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def make_deterministic(device: torch.device) -> None:
    """On CUDA only kernels without atomics; an operation that has none raises."""
    if device.type != "cuda":
        return
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs a kernel for every new tensor, a tenth of a small model's step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward has no deterministic form
    _settle_cublas(device)


def _settle_cublas(device: torch.device) -> None:
    """Have torch see, at its first product, that cuBLAS is told to repeat itself, and then not tell it any more.

    While the variable is set, torch reads it by a regular expression in every product: 41 of the host's 56 us
    (docs/measurements.md). Products repeat because each handle and stream has a workspace of its own, which torch
    gives them in any case, on Hopper as large a one as the variable asks for. Whoever sets the variable keeps it.
    """
    if _CUBLAS in os.environ:
        return
    os.environ[_CUBLAS] = _REPEATS
    if torch.cuda.get_device_capability(device) != (9, 0):
        return
    one = torch.ones(8, 8, device=device)
    torch.mm(one, one)
    del os.environ[_CUBLAS]
    try:
        torch.mm(one, one)
    except RuntimeError:  # a torch that looks each time
        os.environ[_CUBLAS] = _REPEATS
