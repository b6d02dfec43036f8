"""Multi-head latent attention over cached latents (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C).

A position keeps one latent, from which every head's key and value follow, and one rotated key that all heads share.
Decoding never makes keys and values: what would make a key is applied to the query, what would make a value to the
mixed latents ("absorbed"), so a step reads C numbers a position however many heads there are. A chunk of a prompt has
many queries for each key, so there it is cheaper to make them.

Shapes: R rows, H heads, C numbers of a latent, P of its rotated key, X = C+P; N and V numbers of a head's key without
rotation and of its value, D = N+P; of a group: B sequences, Q rows of each, L keys of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.attention import Step, gathered
from inference.dense import Norm, is_plain, joined, linear
from inference.kv import PagedKV
from inference.rope import rotated, rotated_pairs
from inference.rows import Group


class LatentAttention:
    """DeepSeek's attention, V2 and V3; projections with adapters are called as modules.

    An adapter on ``kv_b_proj`` is a function of the latent that cannot be absorbed, so keys and values are made then.
    """

    window = None

    def __init__(self, module: nn.Module, config: Any, layer: int, kv: PagedKV) -> None:
        self._layer, self._kv = layer, kv
        self._latent, self._turned = int(config.kv_lora_rank), int(config.qk_rope_head_dim)
        self._plain, self._value = int(config.qk_nope_head_dim), int(config.v_head_dim)
        self._scale = float(module.scaling)
        # V3 has a switch for what V2 always does: a pair to rotate is two neighbours.
        self._rotated = rotated_pairs if interleaved(config) else rotated
        first = module.q_proj if getattr(module, "q_proj", None) is not None else module.q_a_proj
        self._inward = joined((first, module.kv_a_proj_with_mqa))
        self._query = None
        if first is not getattr(module, "q_proj", None):
            self._query_norm = Norm.of(module.q_a_layernorm, kv.dtype)
            self._query = linear(module.q_b_proj)
        self._latent_norm = Norm.of(module.kv_a_layernorm, kv.dtype)
        self._expand, self._out = linear(module.kv_b_proj), linear(module.o_proj)
        self._key_HNC: Tensor | None = None
        if is_plain(module.kv_b_proj):
            weight_HYC = module.kv_b_proj.weight.detach().unflatten(0, (-1, self._plain + self._value))
            self._key_HNC, self._value_HVC = weight_HYC.split((self._plain, self._value), dim=1)

    def __call__(self, x_RH: Tensor, step: Step) -> Tensor:
        inward = self._inward(x_RH)
        width = self._latent + self._turned
        q, latent_RX = inward[:, :-width], inward[:, -width:]
        if self._query is not None:
            q = self._query(self._query_norm(q))
        q_RHD = q.unflatten(-1, (-1, self._plain + self._turned))
        turned_RHP = self._rotated(q_RHD[..., self._plain :], step.cos_R1D, step.sin_R1D)
        key_R1P = self._rotated(latent_RX[:, None, self._latent :], step.cos_R1D, step.sin_R1D)
        cached_R1X = torch.cat([self._latent_norm(latent_RX[:, : self._latent]), key_R1P[:, 0]], dim=-1)[:, None]
        self._kv.positions_PCD[self._layer].index_copy_(0, step.slot_R, cached_R1X)
        return self._out(self._mixed(q_RHD[..., : self._plain], turned_RHP, step.groups[None]))

    def _mixed(self, q_RHN: Tensor, turned_RHP: Tensor, groups: tuple[Group, ...]) -> Tensor:
        if len(groups) == 1 and groups[0].sequences * groups[0].queries == len(q_RHN):
            return self._attended(q_RHN, turned_RHP, groups[0])
        out_RX = q_RHN.new_empty(len(q_RHN), q_RHN.shape[1] * self._value)
        for group in groups:
            out_RX[group.rows] = self._attended(q_RHN[group.rows], turned_RHP[group.rows], group)
        return out_RX

    def _attended(self, q_RHN: Tensor, turned_RHP: Tensor, group: Group) -> Tensor:
        cached_BLX = gathered(self._kv.layers_NSCD[self._layer], group)[:, :, 0]
        if group.queries == 1 and self._key_HNC is not None:
            return self._absorbed(q_RHN, turned_RHP, cached_BLX, group)
        return self._expanded(torch.cat([q_RHN, turned_RHP], dim=-1), cached_BLX, group)

    def _absorbed(self, q_RHN: Tensor, turned_RHP: Tensor, cached_BLX: Tensor, group: Group) -> Tensor:
        """One row of each sequence: the heads are the rows of one product over the latents."""
        q_HRC = torch.bmm(q_RHN.transpose(0, 1), self._key_HNC)
        q_B1HX = torch.cat([q_HRC.transpose(0, 1), turned_RHP], dim=-1)[:, None]
        cached_B1LX = cached_BLX[:, None]
        # The rotated keys are mixed too, and dropped: kernels want values as wide as keys.
        mixed_B1HX = F.scaled_dot_product_attention(q_B1HX, cached_B1LX, cached_B1LX, group.mask, scale=self._scale)
        latent_HBC = mixed_B1HX[:, 0, :, : self._latent].transpose(0, 1)
        return torch.bmm(latent_HBC, self._value_HVC.transpose(1, 2)).transpose(0, 1).flatten(1)

    def _expanded(self, q_RHD: Tensor, cached_BLX: Tensor, group: Group) -> Tensor:
        """Every head's keys and values, made from the latents."""
        latent_BLC, turned_BLP = cached_BLX.split((self._latent, self._turned), dim=-1)
        made_BLHY = self._expand(latent_BLC).unflatten(-1, (-1, self._plain + self._value))
        key_BLHN, value_BLHV = made_BLHY.split((self._plain, self._value), dim=-1)
        turned_BLHP = turned_BLP[:, :, None].expand(-1, -1, key_BLHN.shape[2], -1)
        key_BHLD = torch.cat([key_BLHN, turned_BLHP], dim=-1).transpose(1, 2)
        width = self._plain + self._turned
        value_BHLV = value_BLHV.transpose(1, 2)
        if self._value < width:
            value_BHLV = F.pad(value_BHLV, (0, width - self._value))
        q_BHQD = q_RHD.unflatten(0, (group.sequences, group.queries)).transpose(1, 2)
        mixed_BHQV = F.scaled_dot_product_attention(
            q_BHQD, key_BHLD, value_BHLV, group.mask, is_causal=group.causal, scale=self._scale
        )
        return mixed_BHQV[..., : self._value].transpose(1, 2).flatten(0, 1).flatten(1)


def interleaved(config: Any) -> bool:
    """Whether the two numbers of a rotated pair are neighbours, not half a head apart."""
    return config.model_type == "deepseek_v2" or bool(getattr(config, "rope_interleave", False))
