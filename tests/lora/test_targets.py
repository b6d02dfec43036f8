"""Targets name places of a model, which is only a list of paths here."""

from __future__ import annotations

import pytest

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.targets import OUTPUT, ROUTER, Places, resolve

DENSE = Places(
    linear=tuple(f"model.layers.{n}.mlp.{name}_proj" for n in range(3) for name in ("gate", "up", "down")),
    ffn=tuple(f"model.layers.{n}.mlp" for n in range(3)),
    refused={"lm_head": OUTPUT, "model.layers.0.mlp.router": ROUTER},
)


def test_every_place_is_named_once_in_order():
    found = resolve({"a": BankConfig("lora", ("up_proj", "layers.[02].mlp.down_proj"))}, DENSE)
    assert [(p.target, p.layer) for p in found] == [
        ("up_proj", 0), ("up_proj", 1), ("up_proj", 2),
        ("layers.[02].mlp.down_proj", 0), ("layers.[02].mlp.down_proj", 2),
    ]  # fmt: skip
    assert {p.site for p in found} == {"linear"}
    assert len(resolve({"a": BankConfig("lora", ("layers.*",))}, DENSE)) == 9


@pytest.mark.parametrize(
    ("banks", "part"),
    [
        ({"a": BankConfig("lora", ("up_proj", "mlp.up_proj"))}, "'mlp.up_proj' names model.layers.0.mlp.up_proj"),
        ({"a": BankConfig("lora", ("up_proj",)), "b": BankConfig("mola", ("u*",))}, "already belongs to adapter.a"),
        ({"a": BankConfig("mixlora"), "b": BankConfig("lora", ("layers.1.*",))}, "inside model.layers.1.mlp"),
        ({"a": BankConfig("perft-r")}, "'mlp' matches no MoE block; the model has: no MoE block at all ('mlp'"),
        ({"a": BankConfig("expert-lora")}, "no tensor of routed experts at all"),
        ({"a": BankConfig("lora", ("router",))}, "names model.layers.0.mlp.router, and routers choose experts"),
        ({"a": BankConfig("lora", ("*",))}, "also names lm_head"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_what_is_there(banks, part):
    with pytest.raises(AdapterError) as caught:
        resolve(banks, DENSE)
    assert part in str(caught.value)
