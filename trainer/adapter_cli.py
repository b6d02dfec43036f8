"""The sub-verbs of ``planaria adapter``. A new one is a row of :data:`VERBS` and the functions it names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from lora.exactness import FORMS


class Verb(NamedTuple):
    """What it does, the function that gives its parser the arguments, and the one that runs it."""

    text: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_adapter_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="adapter_verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        text = verb.text
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        verb.arguments(sub)
        sub.set_defaults(run=verb.run)


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("adapter_dir", metavar="ADAPTER", help="adapter folder, e.g. the one `planaria export` writes")
    sub.add_argument("out_dir", metavar="OUT", help="folder to make")
    sub.add_argument(
        "--to",
        required=True,
        choices=FORMS,
        help="peft: for PEFT, experts stacked; peft-per-expert: each expert's matrices apart; tasks: a plain LoRA for "
        "each task of a task-routed bank; upcycled: MixLoRA as a mixture of experts; merged: the base model with the "
        "adapter added to its weights",
    )
    sub.add_argument("--base", metavar="DIR", help="Hugging Face folder that it was trained on")


def _import_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("peft_dir", metavar="PEFT_DIR", help="folder with PEFT's adapter_config.json")
    sub.add_argument("out_dir", metavar="OUT", help="adapter folder to make")
    sub.add_argument("--base", required=True, metavar="DIR", help="Hugging Face folder that it was trained on")
    sub.add_argument(
        "--lora-b-layout",
        choices=("expert_fastest", "expert_slowest"),
        default="expert_fastest",
        help="how lora_B of stacked experts is packed; expert_slowest: Unsloth's, from 2026-02 to 2026-09",
    )
    sub.add_argument("--peft-version", metavar="V", help="that wrote it, e.g. 0.17, where the file does not say")


def _export(arguments: argparse.Namespace) -> int:
    from trainer import adapter_files

    return adapter_files.export(arguments.adapter_dir, arguments.out_dir, arguments.to, arguments.base)


def _import(arguments: argparse.Namespace) -> int:
    from trainer import adapter_files

    return adapter_files.import_peft(
        arguments.peft_dir,
        arguments.out_dir,
        arguments.base,
        arguments.lora_b_layout == "expert_slowest",
        arguments.peft_version,
    )


def _plan_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", help="path of a YAML recipe with a section adapter")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="section.key=value, put over the recipe's own")


def _plan(arguments: argparse.Namespace) -> int:
    from trainer.adapter_plan import plan_adapters, table
    from trainer.recipe import load_recipe

    print(table(plan_adapters(load_recipe(arguments.recipe, arguments.overrides))))
    return 0


def _presets_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", nargs="?", metavar="NAME", help="of one preset: its formula, defaults and paper")


def _presets(arguments: argparse.Namespace) -> int:
    from trainer.adapter_plan import presets_text

    print(presets_text(arguments.name))
    return 0


def _arrow_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("out_dir", metavar="OUT", help="adapter folder to make")
    sub.add_argument("adapter_dirs", metavar="ADAPTER", nargs="+", help="two or more folders of plain LoRA adapters")
    sub.add_argument("--top-k", type=int, default=3, metavar="K", help="adapters that a token uses (3)")
    sub.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of their softmax (1)")


def _arrow(arguments: argparse.Namespace) -> int:
    from trainer import adapter_files

    folders = tuple(arguments.adapter_dirs)
    return adapter_files.make_arrow(arguments.out_dir, folders, arguments.top_k, arguments.temperature)


VERBS = {
    "plan": Verb("say what a recipe's banks train, cost and can be written as", _plan_arguments, _plan),
    "presets": Verb("list the published methods, or explain one", _presets_arguments, _presets),
    "export": Verb("write an adapter for other tools", _export_arguments, _export),
    "arrow": Verb("make one adapter of several, of which each token chooses; nothing trains", _arrow_arguments, _arrow),
    "import": Verb("make an adapter of what PEFT saved", _import_arguments, _import),
}
