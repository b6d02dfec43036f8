"""`planaria upcycle` and `planaria extend`: one model folder in, another out. No torch before a verb needs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_model_verbs(verb: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """``verb(name, run, text)`` makes a sub-command's parser."""
    upcycle = verb("upcycle", _upcycle, "make a mixture of experts of a dense model")
    upcycle.add_argument("dense_dir", metavar="DENSE", help="Hugging Face folder of a llama, mistral, qwen2 or qwen3")
    upcycle.add_argument("out_dir", metavar="OUT", help="folder to make")
    upcycle.add_argument("--copies", type=int, default=8, metavar="N", help="of the dense block in every layer")
    upcycle.add_argument("--parts", type=int, default=1, metavar="N", help="experts that each copy is cut into")
    upcycle.add_argument("--top-groups", type=int, default=2, metavar="N", help="copies that a token is sent to")
    upcycle.add_argument("--noise", type=float, default=0.0, metavar="F", help="added to copies, relative to weights")
    upcycle.add_argument("--router-std", type=float, default=0.02, metavar="F", help="0: almost equal logits")
    upcycle.add_argument("--seed", type=int, default=0, metavar="N")

    extend = verb("extend", _extend, "add experts to every layer of a mixture of experts")
    extend.add_argument("model_dir", metavar="MODEL", help="Hugging Face folder of a mixture of experts")
    extend.add_argument("out_dir", metavar="OUT", help="folder to make")
    extend.add_argument("--experts", type=int, required=True, metavar="N", help="how many to add to every layer")
    extend.add_argument("--noise", type=float, default=0.01, metavar="F", help="added to copies, relative to weights")
    extend.add_argument("--router", choices=("mean", "copy"), default="mean", help="rows of new experts: of old ones")
    extend.add_argument("--seed", type=int, default=0, metavar="N")

    esft = verb("esft", _esft, "select the experts of a mixture that a recipe's data uses most, to train them alone")
    esft.add_argument("action", choices=("select",), help="score experts and write which ones train")
    esft.add_argument("recipe", help="path of a YAML recipe with model.path")
    esft.add_argument("out", metavar="OUT", help="JSON file to make, for model.trainable_experts")
    esft.add_argument("overrides", nargs="*", metavar="key=value", help="section.key=value, put over the recipe's own")
    esft.add_argument("--score", choices=("token", "gate"), default="token", help="share of choices, or of weights")
    esft.add_argument("--p", type=float, default=0.2, metavar="F", help="share of a layer's scores to reach")
    esft.add_argument("--tokens", type=int, default=131072, metavar="N", help="size of the sample")


def _esft(arguments: argparse.Namespace) -> int:
    from trainer import esft

    how = (arguments.score, arguments.p, arguments.tokens)
    return esft.main(arguments.recipe, arguments.overrides, arguments.out, *how)


def _upcycle(arguments: argparse.Namespace) -> int:
    from moe.upcycle import Upcycling, upcycle

    names = ("copies", "parts", "top_groups", "noise", "router_std", "seed")
    how = Upcycling(**{name: getattr(arguments, name) for name in names})
    config = upcycle(arguments.dense_dir, arguments.out_dir, how)
    print(
        f"{arguments.out_dir}: {config.model_type} with {how.num_experts} experts in each of "
        f"{config.num_hidden_layers} layers, {how.top_k} for a token"
    )
    return 0


def _extend(arguments: argparse.Namespace) -> int:
    from moe.extend import Extension, extend

    what = Extension(arguments.experts, arguments.noise, arguments.router, arguments.seed)
    old = extend(arguments.model_dir, arguments.out_dir, what)
    print(
        f"{arguments.out_dir}: {old} + {what.experts} experts in each layer; train it with model.path="
        f"{arguments.out_dir} model.frozen_experts={old}"
    )
    return 0
