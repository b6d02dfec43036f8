"""The cases of the slot kernels and of the step that runs them, where triton is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = ["slot_cases.py", "unpack_cases.py", "attention_cases.py", "decode_cases.py", "graphed_cases.py"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run them on")
@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("file", FILES)
def test_cases_interpreted(file):
    _run(file, {"TRITON_INTERPRET": "1"})


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(280)
def test_cases_behind_a_simulated_link():
    """On a CPU wherever they run; test_link_cuda.py has those of a GPU."""
    _run("slot_call_cases.py", {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(280)
@pytest.mark.parametrize("file", FILES)
def test_cases(file):
    _run(file, {})


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_kernels_compile_for_a_gpu_without_one(tmp_path):
    """Those of inference and of checkpointing."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("triton_compiles.py"))]
    done = subprocess.run(command, env=environment, timeout=110, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def _run(file: str, more: dict[str, str]) -> None:
    cases = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    environment = {**os.environ, **more}
    done = subprocess.run(command, env=environment, timeout=270, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
