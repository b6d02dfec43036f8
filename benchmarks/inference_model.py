"""The model and the routing that all arms of the inference benchmark share: random weights, drawn choices.

Random gates route evenly and forget at once, which no trained model does; so the choices are drawn with the locality of
recorded routing and forced on every arm: the gate computes as ever, only its choice is replaced.

Shapes: N tokens of a trace, L MoE layers, E experts, K choices, T rows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

# Of the expert a token used, added to its score for the next token; and the exponent of the experts' popularity.
_STAY, _POPULARITY = 2.0, 0.22


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE."""

    layers: int
    hidden: int
    intermediate: int
    experts: int
    choices: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: torch.dtype

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * self.dtype.itemsize

    @property
    def total(self) -> int:
        return self.layers * self.experts

    @property
    def dense_bytes(self) -> int:
        """Read for every token besides routed experts: attention, gates and the head."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + self.experts * self.hidden
        return (self.layers * layer + self.vocab * self.hidden) * self.dtype.itemsize

    def config(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=4 * self.hidden,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.choices,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            vocab_size=self.vocab,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=None,
        )


def write_model(folder: Path, shape: Shape, device: torch.device) -> None:
    """A folder as `save_pretrained` leaves it, one file per layer, with a tokenizer of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = shape.config().to_dict() | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "torch_dtype": str(shape.dtype).removeprefix("torch."),
        "dtype": str(shape.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(raw, default=str))
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> Tensor:
        made = torch.randn(*size, device=device, dtype=torch.float32, generator=generator)
        return (made / size[-1] ** 0.5).to(shape.dtype).cpu()

    home: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        home.update(dict.fromkeys(tensors, file))

    ones = torch.ones(shape.hidden, dtype=shape.dtype)
    outer = {"model.embed_tokens.weight": drawn(shape.vocab, shape.hidden), "model.norm.weight": ones}
    save("model-outer.safetensors", outer | {"lm_head.weight": drawn(shape.vocab, shape.hidden)})
    for layer in range(shape.layers):
        save(f"model-layer-{layer:02d}.safetensors", _layer(shape, f"model.layers.{layer}.", drawn, ones))
    index = {"metadata": {}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _tokenizer(shape.vocab).save_pretrained(folder)


def _layer(shape: Shape, prefix: str, drawn: Any, ones: Tensor) -> dict[str, Tensor]:
    H, inner, D = shape.hidden, shape.intermediate, shape.head_dim
    made = {f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
    made |= {f"{prefix}self_attn.{name}.weight": torch.ones(D, dtype=shape.dtype) for name in ("q_norm", "k_norm")}
    for name, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads), ("v_proj", shape.kv_heads)):
        made[f"{prefix}self_attn.{name}.weight"] = drawn(heads * D, H)
    made[f"{prefix}self_attn.o_proj.weight"] = drawn(H, shape.heads * D)
    made[f"{prefix}mlp.gate.weight"] = drawn(shape.experts, H)
    parts = {"gate_proj": drawn(shape.experts, inner, H), "up_proj": drawn(shape.experts, inner, H)}
    parts["down_proj"] = drawn(shape.experts, H, inner)
    for expert in range(shape.experts):
        made |= {f"{prefix}mlp.experts.{expert}.{name}.weight": part[expert].clone() for name, part in parts.items()}
    return made


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = {letter: i for i, letter in enumerate(sorted(alphabet))}
    words |= {f"<{i}>": i for i in range(len(words), min(vocab, 300))}
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def draw_trace(shape: Shape, tokens: int, seed: int = 1) -> np.ndarray:
    """Choices [N,L,K]: the K best of popularity, staying with the last token's experts, and chance (Gumbel's)."""
    rng = np.random.default_rng(seed)
    places = np.log(np.arange(1, shape.experts + 1))
    popular_LE = np.stack([rng.permutation(-_POPULARITY * places) for _ in range(shape.layers)])
    index_NLK = np.zeros((tokens, shape.layers, shape.choices), dtype=np.int64)
    for t in range(tokens):
        score_LE = rng.gumbel(size=popular_LE.shape) + popular_LE
        if t:
            np.put_along_axis(score_LE, index_NLK[t - 1], np.take_along_axis(score_LE, index_NLK[t - 1], 1) + _STAY, 1)
        index_NLK[t] = np.argsort(-score_LE, axis=1)[:, : shape.choices]
    return index_NLK


def locality(index_NLK: np.ndarray, experts: int) -> dict[str, float]:
    """Share of a token's experts that the last one used, and of all uses that fall on the more popular half."""
    N, L, _ = index_NLK.shape
    used_NLE = np.zeros((N, L, experts), dtype=bool)
    np.put_along_axis(used_NLE, index_NLK, True, axis=2)
    counts_LE = -np.sort(-used_NLE.sum(0), axis=1)
    return {
        "shared_with_last": float((used_NLE[1:] & used_NLE[:-1]).sum() / used_NLE[1:].sum()),
        "popular_half": float(counts_LE[:, : experts // 2].sum() / counts_LE.sum()),
    }


class ForcedRouting:
    """Replaces the choices of a model's gates for calls of one row, token after token, on the device alone.

    The gates compute as ever, and their weights stay: the best expert's weight is the best forced expert's.
    """

    def __init__(self, index_NLK: np.ndarray, device: torch.device) -> None:
        self.index_NLK = torch.from_numpy(index_NLK).to(device)
        self._now_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._chosen_1LK = self.index_NLK[:1].clone()

    def start(self, token: int) -> None:
        """The next token is the trace's number ``token``."""
        self._now_1.fill_(token - 1)

    def attach(self, gates: list[nn.Module]) -> None:
        for row, gate in enumerate(gates):
            gate.forward = self._wrapped(row, gate.forward)

    def _wrapped(self, row: int, own: Any) -> Any:
        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, index = own(hidden_states)
            return logits, weights, index if index.shape[0] != 1 else self.choices(row)

        return forward

    def choices(self, row: int) -> Tensor:
        """[1,K]; row 0 goes on to the next token, behind the last one from the start again."""
        if row == 0:
            self._now_1.copy_((self._now_1 + 1) % self.index_NLK.shape[0])
            self._chosen_1LK.copy_(self.index_NLK.index_select(0, self._now_1))
        return self._chosen_1LK[:, row]


def described(shape: Shape) -> dict[str, Any]:
    return asdict(shape) | {"expert_bytes": shape.expert_bytes, "dense_bytes": shape.dense_bytes}
