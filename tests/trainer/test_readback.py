"""Numbers come back to the host, and the training stream does not wait for the copy engine."""

import pytest
import torch

from trainer.readback import Readback


def test_on_a_cpu_numbers_are_there_already():
    assert Readback(torch.tensor([1.5, 2.0])).read().tolist() == [1.5, 2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_goes_on_while_the_copy_engine_is_busy():
    big, target = (
        torch.ones(1 << 30, dtype=torch.uint8, device="cuda"),
        torch.empty(1 << 30, dtype=torch.uint8).pin_memory(),
    )
    other = torch.cuda.Stream()
    for turn in range(3):
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            target.copy_(big, non_blocking=True)
            copied = other.record_event()
        number = torch.full((1,), float(turn), device="cuda")
        read = Readback(number)
        del number  # its memory may be asked for at once
        torch.full((1,), -1.0, device="cuda")
        on = torch.cuda.current_stream().record_event()
        on.synchronize()
        assert not copied.query(), "the training stream waited for the large copy"
        assert read.read().tolist() == [turn]
