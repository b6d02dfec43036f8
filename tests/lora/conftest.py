from __future__ import annotations

import math
import os
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lora.attach import attach
from lora.owners import owners_of
from lora.presets import expand
from moe.convert import convert
from moe.kernels.grouped import Backend, grouped_linear

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU


@pytest.fixture(autouse=True)
def as_training_has_it(request):
    """On a GPU runs train in deterministic mode, in which torch refuses some operations and runs others otherwise."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def tiny_moe():
    """Builds a Qwen3-MoE of 2 layers and 8 experts, hidden 32; the same weights every time."""

    def build(dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
        config = Qwen3MoeConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=16,
            intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            vocab_size=64,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Qwen3MoeForCausalLM(config).to(dtype).train()

    return build


@pytest.fixture(scope="session")
def tiny_dense():
    """Builds a Llama of 2 layers, hidden 32; the same weights every time."""

    def build() -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=64,
            initializer_range=0.2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).train()

    return build


@pytest.fixture(scope="session")
def adapted():
    """``adapted(model, banks)``: the model with these banks and every adapter tensor away from its start."""

    def build(model: nn.Module, banks, std: float = 0.2) -> nn.Module:
        mixture = any(hasattr(module, "experts") for module in model.modules())
        attach(model, banks, convert(model) if mixture else [])
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".adapter." in path:
                    parameter.normal_(0, std, generator=generator)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def base_folder(tiny_moe, tmp_path_factory):
    """``tiny_moe`` as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_moe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_logits():
    """``plain_logits(model, tensors, banks, tokens)``: LoRA as its paper has it, on a plain transformers model.

    Independent of the fast paths and of every exporter: an expert's weight becomes ``W + s B A``, a linear layer
    adds ``s B (A x)``. In the order of operations that PEFT has, so that equal means equal bits.
    """

    def logits(model: nn.Module, tensors, banks, tokens: torch.Tensor) -> torch.Tensor:
        owners = owners_of(tensors, banks)
        hooks, mixture = [], any(hasattr(module, "experts") for module in model.modules())
        for path in [path for path in tensors if path.endswith(".A")]:
            place, _, inner = path.removesuffix(".A").rpartition(".adapter")
            bank = expand(banks[owners[path]])
            a, b = tensors[path], tensors[path[:-1] + "B"]
            scale = bank.alpha / (math.sqrt(a.shape[1]) if bank.scaling == "sqrt_r" else a.shape[1])
            module = model.get_submodule(place)
            if mixture and place.endswith(("gate_proj", "up_proj", "down_proj")):
                # PEFT can have these as parameters only, for it takes their names for those of experts.
                module.weight.data += (b[0] @ a[0]) * scale
            elif isinstance(module, nn.Linear):
                hooks.append(module.register_forward_hook(_adding(a[0], b[0], scale)))
            else:
                weight = getattr(module, inner.removeprefix("."))
                experts = weight.shape[0]
                weight.data = torch.baddbmm(
                    weight.data, b.expand(experts, -1, -1), a.expand(experts, -1, -1), alpha=scale
                )
        with torch.no_grad():
            found = model.eval()(tokens).logits
        for hook in hooks:
            hook.remove()
        return found

    return logits


def _adding(a: torch.Tensor, b: torch.Tensor, scale: float):
    return lambda _module, args, y: y + functional.linear(functional.linear(args[0], a), b) * scale


@pytest.fixture
def grouped_products(monkeypatch):
    """Of a module, a switch that lets it choose and lay out grouped products as on a GPU, computed by the loop.

    Sizes that a GPU would refuse are refused, and having chosen the loop is an error.
    """

    def choose(_device, _dtype, *widths):
        assert not any(width % 8 for width in widths), f"falls back to the loop, which reads back: {widths}"
        return Backend("grouped_mm", "")

    def product(x_NM, weight_LOM, counts_L, backend):
        assert backend == "grouped_mm"
        assert not any(width % 8 for width in weight_LOM.shape[1:]), weight_LOM.shape
        return grouped_linear(x_NM, weight_LOM, counts_L, "loop")

    def of(module):
        @contextmanager
        def switched(on):
            with monkeypatch.context() as patch:
                if on:
                    patch.setattr(module, "choose_backend", choose)
                    patch.setattr(module, "grouped_linear", product)
                yield

        return switched

    return of
