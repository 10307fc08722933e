"""A decoder as Llama has it, by few and large operations, for sampling on a processor.

A module of transformers spends most of a token's time around its matrix products: on copies of
weights, small operations and calls. Here projections that read the same states are one product, and
weights are laid out once, as the kernel reads them fastest. Roundings to bfloat16 are where
autocast and `stages.lean_layers` have them.

Shapes: `_T` tokens, `_H` query heads, `_K` key heads, `_D` dimension of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from stages import attention as packed
from stages.core import elementwise
from stages.lean_layers import is_silu
from stages.rollout.products import LinearMap, Product, is_linear_map

_BACKBONE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Others turn by angles that depend on the length of a sequence.
_ROTATIONS = {"default", "linear", "llama3", "yarn"}

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(number of the layer, q [_T, _H, _D], k and v [_T, _K, _D]) -> [_T, _H * _D]."""


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean x^2 + epsilon) * weight (Zhang and Sennrich 2019, eq. 4), in float32."""

    weight: Tensor
    epsilon: float
    dtype: torch.dtype

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype, weight: Tensor | None = None) -> Norm:
        """Of a module that `looks_fusable` has found plain, with another order of its weight."""
        weight = module.weight.detach() if weight is None else weight
        return cls(weight, module.variance_epsilon, dtype)

    def __call__(self, states: Tensor) -> Tensor:
        """Of states [..., size], in dtype."""
        return elementwise.rms_norm(states.float(), self.weight, self.epsilon, self.dtype)[0]


class Layer:
    """One layer. Heads' dimensions are stored in pairs that rotate together, not in halves."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        q, k, v = map(LinearMap.of, (attention.q_proj, attention.k_proj, attention.v_proj))
        self.num_heads = len(q.weight) // self.dim
        self.num_key_heads = len(k.weight) // self.dim
        paired = partial(_paired, dim=self.dim)
        qkv = Product([q.with_outputs(paired), k.with_outputs(paired), v], dtype)
        self.head_norms = [
            Norm.of(norm, dtype, _paired(norm.weight.detach(), self.dim))
            for norm in (getattr(attention, name, None) for name in sorted(_HEAD_NORMS))
            if norm is not None
        ]
        output = Product([LinearMap.of(attention.o_proj)], dtype)
        gate_and_up = Product([*map(LinearMap.of, (mlp.gate_proj, mlp.up_proj))], dtype)
        down = Product([LinearMap.of(mlp.down_proj)], dtype)
        self.products = (qkv, output, gate_and_up, down)
        self.inner: int = len(mlp.up_proj.weight)
        self.activation = mlp.act_fn
        self.norms = [
            Norm.of(norm, dtype)
            for norm in (module.input_layernorm, module.post_attention_layernorm)
        ]

    def heads(self, states: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [_T, _H, _D] and k [_T, _K, _D], rotated, and v [_T, _K, _D]."""
        qkv = self.products[0]
        found = qkv(self.norms[0](states)).view(len(states), -1, self.dim)
        num_rotated = self.num_heads + self.num_key_heads
        qk, v = found[:, :num_rotated], found[:, num_rotated:]
        if self.head_norms:
            k_norm, q_norm = self.head_norms
            qk = torch.cat([q_norm(qk[:, : self.num_heads]), k_norm(qk[:, self.num_heads :])], 1)
        pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turn[:, None]).flatten(-2).to(v.dtype)
        return turned[:, : self.num_heads], turned[:, self.num_heads :], v

    def add(self, states: Tensor, mixed: Tensor) -> None:
        """Add to states [_T, hidden] what attention has mixed, and then what the MLP makes."""
        _, output, gate_and_up, down = self.products
        states += output(mixed)
        gate, up = gate_and_up(self.norms[1](states)).chunk(2, dim=-1)
        states += down(_opened(self.activation, gate, up))


class FusedDecoder:
    """The weights of a model as they are now; `can_fuse` says for which models."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        backbone: Any = model.base_model
        head: Any = model.get_output_embeddings()
        self.layers = [Layer(layer, dtype) for layer in backbone.layers]
        self.device = model.device
        self.dtype = dtype
        self._embedding = backbone.embed_tokens.weight.detach()
        self._rotation = backbone.rotary_emb
        self._norm = Norm.of(backbone.norm, dtype)
        self._head = Product([LinearMap.of(head)], dtype)

    def turns(self, num_positions: int) -> Tensor:
        """Complex numbers [num_positions, _D / 2] that pairs are multiplied by."""
        positions = torch.arange(num_positions, device=self.device)[None]
        cos, sin = self._rotation(self._embedding, positions)
        half = cos.shape[-1] // 2
        return torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())

    def states(self, ids: Tensor, turn: Tensor, attend: Attend) -> Tensor:
        """What the layers make of ids [_T] at their positions' turns [_T, _D / 2]."""
        states = self.embedded(ids)
        for number, layer in enumerate(self.layers):
            layer.add(states, attend(number, *layer.heads(states, turn)))
        return states

    def embedded(self, ids: Tensor) -> Tensor:
        """What the first layer gets, [_T, hidden]."""
        return functional.embedding(ids, self._embedding)

    def logits(self, states: Tensor) -> Tensor:
        """Of the tokens after those of states."""
        found: Tensor = self._head(self._norm(states))
        return found


def _opened(activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    if is_silu(activation):
        return elementwise.gated(gate, up)
    found: Tensor = activation(gate).mul_(up)
    return found


def _paired(values: Tensor, dim: int) -> Tensor:
    """Rows of each head of [heads * dim, ...]: first of one half, first of the other, and so on."""
    halves: Tensor = values.unflatten(0, (-1, 2, dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def looks_fusable(model: PreTrainedModel) -> bool:
    """Whether a model has the modules of Llama and no others, all in their plain form.

    Biases, adapters, and norms of queries and keys, may be there or not. It says nothing of what a
    family does without modules, such as scaling.
    """
    if model.device.type != "cpu" or any(p.dtype != torch.float32 for p in model.parameters()):
        return False
    if model.config._attn_implementation not in ("sdpa", packed.NAME):
        return False
    cache = DynamicCache(config=model.config)
    backbone: Any = model.base_model
    return (
        _names(model) == {model.base_model_prefix, "lm_head"}
        and _names(backbone) == _BACKBONE
        and type(backbone.embed_tokens) is nn.Embedding
        and getattr(backbone.rotary_emb, "rope_type", None) in _ROTATIONS
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and all(map(_is_plain_layer, backbone.layers))
        and len({_head_sizes(layer.self_attn) for layer in backbone.layers}) == 1
        and _is_plain(backbone.norm)
        and type(cast(Any, model).lm_head) is nn.Linear
        and not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    )


def _head_sizes(attention: Any) -> tuple[int, int]:
    return attention.head_dim, len(attention.k_proj.weight)


def _is_plain_layer(layer: nn.Module) -> bool:
    if _names(layer) != _LAYER or _names(cast(nn.Module, layer.mlp)) != _MLP:
        return False
    attention: Any = layer.self_attn
    parts = [*_children(attention), *_children(cast(nn.Module, layer.mlp))]
    parts += [one for one in _children(layer) if not _names(one)]
    return _names(attention) - _HEAD_NORMS == _ATTENTION and (
        len(_names(attention) & _HEAD_NORMS) != 1
        and isinstance(getattr(attention, "scaling", None), float)
        and isinstance(getattr(attention, "head_dim", None), int)
        and all(_is_plain(one) for one in parts)
        and attention.k_proj.weight.shape == attention.v_proj.weight.shape
        and attention.head_dim % 2 == 0
    )


def _is_plain(module: nn.Module) -> bool:
    """A linear map, a norm or an activation."""
    if is_linear_map(module):
        return True
    names = [name for name, _ in module.named_parameters()]
    return not names or (
        names == ["weight"] and isinstance(getattr(module, "variance_epsilon", None), float)
    )


def _children(module: nn.Module) -> Iterator[nn.Module]:
    return (one for _, one in module.named_children())


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
