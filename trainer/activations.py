"""What a forward pass keeps for its backward when only adapters train, from shapes alone (no torch here).

Nothing is kept of the frozen layers before the first adapter, nor the input of any frozen linear layer: its weight gets
no gradient. What is left is what norms, attention, activations, softmaxes and the adapters themselves keep. Counted are
transformers' modules as planaria runs them: attention that keeps q, k, v and its output, experts that keep their input
and pre-activations. With attention dropout, which keeps the probabilities too, in families with latent attention,
and of banks whose choices vary (``top_p``, ``threshold``: counted as if all experts were chosen) the truth is another.

"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora.config import BankAt
from lora.cost import Size, chosen
from lora.fold import kept_rows
from lora.methods import EXPERT_TENSORS, FFN
from lora.targets import Placed
from trainer.model_shapes import ModelShapes
from trainer.schema import Recipe

Resolved = tuple[Placed, BankAt, Size]
BASE = "the frozen model"
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Batch:
    """One micro-batch and how it is computed.

    Attributes:
        tokens, sequence: T tokens in sequences of so many.
        width: bytes of a number in the training dtype; what is fp32 whatever that is counts 4.
        heads: of the attention.
        vocabulary: logits of a token.
        ep: workers that share the experts.
        tenants: whether adapters are several tenants', whose experts are computed in pieces that each keep what they
            need (:class:`lora.tenants.TenantExperts`), and whose dropout keeps its mask.
    """

    tokens: int
    sequence: int
    width: int
    heads: int
    vocabulary: int
    ep: int = 1
    tenants: bool = False


def micro_batches(recipe: Recipe, width: int, heads: int, vocabulary: int) -> list[Batch]:
    """Each tenant's part of a worker's micro-batch, in their order; without tenants the whole."""
    length = recipe.data.sequence_length
    sizes = [tenant.micro_batch_size or 0 for tenant in recipe.tenants.values()] or [recipe.train.micro_batch_size]
    common = (length, width, heads, vocabulary, recipe.parallel.ep, bool(recipe.tenants))
    return [Batch(size * length, *common) for size in sizes]


def saved_bytes(model: ModelShapes, placed: Sequence[Resolved], batch: Batch) -> dict[str, int]:
    """Bytes by bank, and of :data:`BASE`."""
    found: Counter[str] = Counter()
    first = min((one.layer for one, _, _ in placed), default=model.layers)
    for layer in range(first, model.layers):
        here = [entry for entry in placed if entry[0].layer == layer]
        _Layer(model, layer, here, batch, live=layer > first).count(found)
    if (states := next((one.bank for one, here, _ in placed if here.config.score == "states"), None)) is not None:
        found[states] += batch.tokens * _hidden(model) * batch.width  # of the first pass, for all routers
    found[BASE] += _norm(_hidden(model), batch.tokens)
    # Rotary cosines and sines, which all layers share; the loss keeps log-probabilities and labels.
    queries = next((shape[1] for path, shape in model.linear.items() if path.endswith(".o_proj")), 0)
    found[BASE] += 2 * batch.sequence * queries // batch.heads * batch.width
    found[BASE] += batch.tokens * (4 * batch.vocabulary + 8)
    return dict(found)


def working_bytes(placed: Iterable[Resolved], batch: Batch) -> int:
    """What backward needs beside what was kept, when it begins: two gradients of the logits, in fp32, and the training
    dtype's where that is another; and for a contrastive loss three of the similarities of one place. Or, where that is
    more, what it holds at one layer's experts of tenants: gradients of what goes in and comes out, before and after."""
    placed = list(placed)
    logits = batch.tokens * batch.vocabulary * (8 + (batch.width if batch.width != 4 else 0))
    start = logits + 12 * max((_pairs(bank, batch.tokens) ** 2 for _, bank, _ in placed), default=0)
    pieces = (size.active * 2 * (size.ins + size.outs) for one, _, size in placed if one.site == "experts")
    return max(start, batch.tokens * batch.width * max(pieces, default=0) * batch.tenants)


def _pairs(bank: BankAt, tokens: int) -> int:
    """Rows that a bank's contrastive loss compares with each other."""
    full = bank.config
    if not full.contrastive_coef or full.router != "token":
        return 0
    return tokens * (full.top_k or 1 if full.combine == "top_k" else 1)


def _hidden(model: ModelShapes) -> int:
    return model.norms.get("model.norm", 0)


def _norm(hidden: int, tokens: int) -> int:
    """Its input in fp32 and the reciprocal root of its mean square."""
    return tokens * (hidden + 1) * 4


class _Layer:
    """One decoder layer. ``live``: whether its input needs a gradient, some adapter being before it."""

    def __init__(self, model: ModelShapes, layer: int, here: list[Resolved], batch: Batch, *, live: bool) -> None:
        self.model, self.here, self.batch, self.live = model, here, batch, live
        self.tokens, self.width = batch.tokens, batch.width
        self.prefix = f"model.layers.{layer}."
        self.kept: set[str] = set()
        self.adapted = {placed.path.removeprefix(self.prefix).partition(".")[0] for placed, _, _ in here}
        self.after = live or "self_attn" in self.adapted
        inside = (p.path for p, _, _ in here if ".self_attn." in p.path and not p.path.endswith("o_proj"))
        self.attends = live or any(inside)

    def count(self, found: Counter[str]) -> None:
        hidden = _hidden(self.model)
        if self.live:
            found[BASE] += _norm(hidden, self.tokens)
        if self.attends:
            found[BASE] += self._attention()
        if self.after:
            found[BASE] += _norm(hidden, self.tokens)
        for placed, bank, size in self.here:
            found[placed.bank] += self._bank(placed, bank, size)
        found[BASE] += self._block()

    def _numbers(self, count: int) -> int:
        return self.tokens * count * self.width

    def _once(self, key: str, bytes_: int) -> int:
        """A tensor that several keep counts once."""
        new = key not in self.kept
        self.kept.add(key)
        return bytes_ if new else 0

    # -- the frozen model -------------------------------------------------------------------------------------------

    def _attention(self) -> int:
        linear, at = self.model.linear, f"{self.prefix}self_attn."
        out = linear.get(f"{at}o_proj")
        if out is None:
            return 0
        queries = out[1]
        keys = sum(linear[f"{at}{name}"][0] for name in _QKV[1:] if f"{at}{name}" in linear) or 2 * queries
        kept = self._numbers(2 * queries + keys) + self.tokens * self.batch.heads * 4
        if at.rstrip(".") in self.model.norms:  # sinks, for which probabilities are computed and kept
            kept += self._numbers(self.batch.heads * (self.batch.sequence + 1))
        inner = {placed.path for placed, _, _ in self.here}
        for name in ("q_norm", "k_norm"):
            head, projection = self.model.norms.get(f"{at}{name}"), f"{at}{name[0]}_proj"
            rows = linear.get(projection)
            if head and rows and (self.live or projection in inner):
                kept += self.tokens * (rows[0] + rows[0] // head) * 4
        return kept

    def _block(self) -> int:
        """The feed-forward part, but for what its own adapters keep."""
        at = f"{self.prefix}mlp"
        inner = {placed.path for placed, _, _ in self.here}
        kept = 0
        for path in self.model.places.ffn:
            inside = any(f"{path}.{name}" in inner for name in FFN)
            if path.startswith(at) and path not in inner and (self.after or inside):
                kept += self._numbers(3 * self.model.linear[f"{path}.{FFN[0]}"][0])
        if at not in self.model.places.parallel or not self.after:
            return kept
        experts, rows, hidden = self.model.experts[f"{at}.experts.gate_up_proj"]
        active = self.model.active
        # The router keeps its probabilities, its choices and their sum.
        kept += self.tokens * (4 * experts + 8 * active + 4 + 4 * active)
        if not any(path.startswith(f"{at}.experts.") for path in inner):
            kept += self._experts(hidden) + self._numbers(active * rows)
        return kept

    def _experts(self, hidden: int) -> int:
        """Input and routing: a weight, an order and a place for each choice."""
        here = self._once("into the block", self._numbers(hidden))
        if self.batch.ep > 1:
            here = self._rows() * hidden * self.width
        return here + self.tokens * self.model.active * (4 + 8 + 8)

    def _rows(self) -> int:
        """Rows that the experts of this worker see, routing being even; each worker sends a token at most once."""
        return self.tokens * max(1, min(self.model.active, self.batch.ep))

    # -- banks ------------------------------------------------------------------------------------------------------

    def _bank(self, placed: Placed, bank: BankAt, size: Size) -> int:
        full, site = bank.config, placed.site
        if site == "experts":
            return self._adapted_experts(placed, bank, size)
        if site == "ffn":
            return self._mixed(bank, size)
        kept = self._input(placed, size, full.dropout or 0.0)
        if full.router == "base":
            return kept + self.tokens * size.active * (self.width + 1)
        if full.router == "prompt":
            return kept + self._numbers(bank.r) + self._once(f"prompts of {placed.bank}", self._prompted(placed, size))
        live = self.live if "self_attn" in placed.path else self.after
        kept += self._router(bank) + (self._numbers(size.ins * (1 + live)) if full.jitter else 0)
        if full.kind == "scale":
            return kept + self._numbers(size.outs)
        products = self._numbers((1 if full.share == "A" else bank.num_experts) * bank.r)
        return kept + products + self._contrast(bank, size)

    def _adapted_experts(self, placed: Placed, bank: BankAt, size: Size) -> int:
        """All banks of a layer's experts are computed as one; the first pays for what they share."""
        experts = placed.path.rpartition(".")[0]
        mine = [(one, here.r) for one, here, _ in self.here if one.path.rpartition(".")[0] == experts]
        pairs = self.tokens * size.active
        kept = self._numbers(size.active * bank.r)
        if self.batch.tenants:
            dropped = size.ins * (self.after or placed.path.endswith("down_proj")) if bank.config.dropout else 0
            kept += pairs * (size.ins + dropped) * self.width
        if mine[0][0] is not placed:
            return kept
        hidden, inner = (self.model.experts[f"{experts}.{name}"][2] for name in EXPERT_TENSORS)
        if self.batch.tenants:
            return kept + self._in_pieces(pairs, hidden, inner, {one.path.rpartition(".")[2] for one, _ in mine})
        local = size.count // self.batch.ep
        rows = kept_rows(pairs, self._rows(), local, hidden, inner, sum(r for _, r in mine))
        return kept + self._experts(hidden) + rows * 2 * inner * self.width

    def _in_pieces(self, pairs: int, hidden: int, inner: int, adapted: set[str]) -> int:
        """What the pieces keep beside the adapters: pre-activations and what the activation makes of them, and for the
        gradients of routing weights the output; where each pair goes, and its weight."""
        numbers = 1
        if self.after or EXPERT_TENSORS[0] in adapted:
            numbers += (6 if self.model.clamped else 3) * inner
        numbers += hidden * self.after
        return pairs * (numbers * self.width + 8 + (16 + 4 * (self.width != 4)) * self.after)

    def _input(self, placed: Placed, size: Size, dropout: float) -> int:
        """The adapted layer's input, which neighbours may share, or attention keep anyway."""
        name = placed.path.removeprefix(self.prefix)
        if self.batch.tenants and dropout:
            live = self.live if "self_attn" in name else self.after
            live = self.attends if name == "self_attn.o_proj" else live
            return self._numbers(size.ins * (1 + live))
        needs_none = placed.site == "linear" and _scales_without_router(self.here, placed)
        if (name == "self_attn.o_proj" and self.attends) or needs_none:
            return 0
        shared = {"self_attn": "into the attention", "mlp": "into the block"}.get(name.partition(".")[0], name)
        own = name.endswith(("down_proj", "_b_proj"))
        return self._once(name if own else shared, self._numbers(size.ins))

    def _router(self, bank: BankAt) -> int:
        full, experts = bank.config, bank.num_experts
        if full.router not in ("token", "task"):
            return 0
        # Bytes a token and expert: probabilities; the chosen ones' own and who they are.
        each = {"soft": 4, "top_k": 9, "top_p": 5, "threshold": 13, "switch": 13}[str(full.combine)]
        more = {"threshold": 13, "switch": 9}.get(str(full.combine), 0)
        if full.score in ("arrow", "outputs"):
            each += 4  # before their sign is dropped, or the trained temperature divides them
        kept = self.tokens * (each * experts + more)
        if full.router == "task":
            kept += self.tokens * (full.num_tasks or 0) * self.width + self._numbers(full.task_embedding or 0)
        return kept

    def _prompted(self, placed: Placed, size: Size) -> int:
        """Weights of all tokens; of each row, taken as one sample, its mean, what the activation makes of it and, for
        the gradient of the layer's input, each token's part in the mean."""
        modules = sum(one.bank == placed.bank for one, _, _ in self.here)
        samples = self.tokens // self.batch.sequence
        return self.tokens * 4 * (modules + self.live) + samples * (2 * size.hidden + 3 * modules) * 4

    def _contrast(self, bank: BankAt, size: Size) -> int:
        pairs = _pairs(bank, self.tokens)
        if not pairs:
            return 0
        ranks = bank.num_experts * bank.r
        return pairs * pairs * 14 + (2 * pairs + ranks + size.outs) * ranks * 4

    def _mixed(self, bank: BankAt, size: Size) -> int:
        """A feed-forward bank: input, the two shared products, gates, and of each pair its products and dropout."""
        pairs, r, full = self.tokens * chosen(bank), bank.r, bank.config
        kept = self._numbers(2 * size.outs) + self._router(bank) + pairs * (4 + 8 + 8 * (full.combine == "top_k"))
        kept += pairs * 3 * r * self.width + bank.num_experts * 2 * r * size.ins * self.width
        # With jitter the router keeps another input than the experts, with dropout these another than it.
        views = (1 + self.after if full.jitter else 1) + (1 + self.after if full.dropout else bool(full.jitter))
        return kept + self._numbers(views * size.ins) + (pairs * size.outs if full.dropout else 0)


def _scales_without_router(here: Iterable[Resolved], placed: Placed) -> bool:
    return any(one is placed and bank.config.kind == "scale" and bank.config.router == "none" for one, bank, _ in here)
