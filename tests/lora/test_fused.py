"""The fused kernels' cases, run where triton is installed; and what decides whether they run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora.fused import refuses_fused


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_fused_cases():
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    cases = Path(__file__).with_name("fused_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env=environment, timeout=270, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_a_cpu_is_refused_with_the_reason():
    assert "CUDA" in str(refuses_fused(torch.device("cpu"), torch.bfloat16, 8))
