"""Products repeat, and what cannot repeat is refused, without a variable that torch would read in each of them."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import os, torch
from trainer.determinism import make_deterministic
device = torch.device("cuda")
make_deterministic(device)
print(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
torch.manual_seed(0)
x = torch.randn(4096, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
w = torch.randn(512, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
found = []
for stream in [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(4))] * 4:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = torch.nn.functional.linear(x, w)
        found.append([out.detach(), *torch.autograd.grad(out, (x, w), torch.ones_like(out))])
torch.cuda.synchronize()
print(all(torch.equal(a, b) for one in found for a, b in zip(one, found[0])))
try:
    torch.zeros(4, device=device).put_(torch.tensor([1, 1], device=device), torch.ones(2, device=device))
except RuntimeError as error:
    print("refused" if "deterministic" in str(error) else error)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("own", [None, ":16:8"])
def test_products_repeat_on_all_streams_without_the_variable(own):
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    if own is not None:
        environment["CUBLAS_WORKSPACE_CONFIG"] = own
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(own), "True", "refused"], done.stderr[-2000:]


def test_on_a_cpu_nothing_is_set(monkeypatch):
    from trainer.determinism import make_deterministic

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_deterministic(torch.device("cpu"))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()
