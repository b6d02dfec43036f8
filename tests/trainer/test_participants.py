"""The count of parameters in a backward pass that DeepSpeed asks for is its own function's."""

import torch
from deepspeed.runtime.utils import count_used_parameters_in_backward
from torch import nn

from trainer.engine import _Participants


def test_it_is_deepspeeds_count_whatever_takes_part():
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(6))
    layers[2].weight.requires_grad_(False)
    parameters, count, found = list(layers.parameters()), _Participants(), []
    layers[5].weight.register_hook(
        lambda gradient: found.append((count(parameters), count_used_parameters_in_backward(parameters)))
    )
    for first in (0, 3, 0, 5):
        x = torch.ones(3)
        for layer in layers[first:]:
            x = layer(x)
        x.sum().backward()
    assert found == [(n, n) for n in (11, 6, 11, 2)]


def test_another_models_parameters_are_looked_up_anew():
    count = _Participants()
    for size in (2, 4):
        layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(size)))
        parameters, found = list(layers.parameters()), []
        layers[-1].weight.register_hook(lambda gradient, of=parameters, to=found: to.append(count(of)))
        layers(torch.ones(3)).sum().backward()
        assert found == [2 * size]
