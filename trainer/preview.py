"""`planaria preview R`: the first samples of a run as the model will see them, with the tokens that have loss marked.

On a terminal these are green, elsewhere in ``[[double brackets]]``. The data cache is the one that training uses, built
if it is not there yet. Needs the tokenizer, no model and no torch of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from trainer import chat_data
from trainer.chat_data import IGNORED, ChatRow
from trainer.data import cache_root, load_section, sample_order
from trainer.recipe import load_recipe
from trainer.schema import Recipe
from trainer.tenant_recipe import alone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GREEN, _PLAIN = "\033[32m", "\033[0m"


def main(recipe_path: str, overrides: Sequence[str], samples: int) -> int:
    """Print ``samples`` sequences in the order of training, of each tenant if there are any.

    Raises RecipeError and DataError.
    """
    recipe = load_recipe(recipe_path, overrides)
    for name in recipe.tenants:
        print(f"##### tenant {name}")
        _show(alone(recipe, name), samples)
    if not recipe.tenants:
        _show(recipe, samples)
    return 0


def _show(recipe: Recipe, samples: int) -> None:
    data = recipe.data
    bundle = load_section(data, cache_root=cache_root(recipe), model_path=recipe.model.path)
    if bundle.chat:
        print("\n".join(chat_data.told(bundle.chat, data.sequence_length)))
    else:
        print(
            f"data: {bundle.train_documents} documents train, {bundle.heldout_documents} held out; {len(bundle.train)} "
            f"and {len(bundle.heldout)} sequences of {data.sequence_length} tokens, all of them with loss"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle.tokenizer_dir, local_files_only=True)
    marks = (_GREEN, _PLAIN) if sys.stdout.isatty() else ("[[", "]]")
    for number in range(min(samples, len(bundle.train))):
        index = sample_order(number, len(bundle.train), recipe.train.seed)
        row = bundle.train[index]
        print(f"\n=== sequence {number + 1} in the order of training, {index + 1} of {len(bundle.train)} in the cache")
        if isinstance(row, ChatRow):
            print("\n".join(chat_lines(row, tokenizer, bundle.chat["tasks"], marks)))
        else:
            print(marked(row, np.ones(len(row), bool), tokenizer, marks))


def chat_lines(
    row: ChatRow, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], marks: tuple[str, str]
) -> Iterator[str]:
    """Each sample of the row under a line about it, and a line about the row."""
    learn_S = row.labels_S != IGNORED
    for number, (place, lost, length) in enumerate(zip(row.places, row.cut, row.lengths, strict=True)):
        here = row.mask_S & (row.segment_S == number)
        task = f", task {tasks[int(row.task_S[here][0])]}" if row.task_S is not None else ""
        cut = f", cut: {lost} tokens more" if lost else ""
        yield (
            f"--- sample {number + 1} of {len(row.places)}: {place}, {length} tokens, "
            f"{int(learn_S[here].sum())} with loss{task}{cut}"
        )
        yield marked(row.ids_S[here], learn_S[here], tokenizer, marks)
    tokens = int(row.mask_S.sum())
    yield (
        f"--- {tokens} tokens and {len(row.ids_S) - tokens} of padding; loss on {int(learn_S.sum())} "
        f"({learn_S.sum() / tokens:.1%} of the tokens)"
    )


def marked(ids_S: np.ndarray, learn_S: np.ndarray, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]) -> str:
    """The tokens as text, special ones spelt out, with ``marks`` around those with loss."""
    borders = [0, *(np.flatnonzero(np.diff(learn_S)) + 1).tolist(), len(ids_S)]
    pieces = []
    for start, end in pairwise(borders):
        text = str(tokenizer.decode(ids_S[start:end].tolist(), clean_up_tokenization_spaces=False))
        pieces.append(f"{marks[0]}{text}{marks[1]}" if learn_S[start] else text)
    return "".join(pieces)
