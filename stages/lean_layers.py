"""Parts of a decoder layer that make and keep fewer copies than autograd and autocast do.

Autograd keeps what each of a layer's many small operations has made until the backward pass.
Autocast turns every weight into bfloat16 anew for each micro-batch, and every normalised state once
for each product that reads it. `stages.layer_functions` does the same arithmetic, with the sums of
a norm in float32, and keeps the inputs of a part alone; what is cheap is computed again. It serves
autocast to bfloat16 on any device, and float32 on processors, where the products are faster too:
see `stages.core.products`.

Only modules that are seen to compute the same are replaced; the others stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from stages import layer_functions
from stages.core.elementwise import rotated

_WEIGHTS = "_posttrain_held_weights"
_ROTATION = "apply_rotary_pos_emb"

# Far above where a product with a normalised state would lose digits of bfloat16.
_LEAST_DIVISOR = 1e-20


class HeldWeights:
    """Copies of weights in another format, made once in a region in which no weight changes."""

    def __init__(self) -> None:
        self._depth = 0
        self._copies: dict[tuple[int, torch.dtype], Tensor] = {}
        self._invertible: dict[int, bool] = {}

    @property
    def is_holding(self) -> bool:
        """Whether such a region is open."""
        return self._depth > 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep copies until the outermost region ends."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._copies.clear()
                self._invertible.clear()

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight, detached, in a format or as it is."""
        if dtype == weight.dtype:
            return weight.detach()
        found = self._copies.get((id(weight), dtype))
        if found is None:
            # A pass for inference may be the first of a region whose later ones are for training.
            with torch.inference_mode(False):
                found = weight.detach().to(dtype)
            if self._depth:
                self._copies[id(weight), dtype] = found
        return found

    def can_divide(self, weight: Tensor) -> bool:
        """Whether what was multiplied by the weight can be had again: no element is near 0."""
        found = self._invertible.get(id(weight))
        if found is None:
            found = weight.detach().abs().amin().item() >= _LEAST_DIVISOR
            if self._depth:
                self._invertible[id(weight)] = found
        return found


def use_lean_layers(backbone: nn.Module) -> HeldWeights:
    """Let norms, gated MLPs and linear maps of the decoder layers use our functions.

    They do so where `_dtype` names a format, and are as they were elsewhere. What is done twice to
    a backbone is done once.
    """
    weights = held_weights(backbone)
    if weights is not None:
        return weights
    weights = HeldWeights()
    setattr(backbone, _WEIGHTS, weights)
    if isinstance(backbone, PreTrainedModel):
        embedding = backbone.get_input_embeddings()
        if _is_plain_embedding(embedding):
            embedding.forward = MethodType(_embedding_forward, embedding)
    layers = decoder_layers(backbone)
    for file in {sys.modules[type(module).__module__] for module in layers.modules()}:
        _use_rotation(file)
    for module in layers.modules():
        forward = _replacement(module)
        if forward is not None:
            setattr(module, _WEIGHTS, weights)
            module.forward = MethodType(forward, module)
    return weights


def held_weights(backbone: nn.Module) -> HeldWeights | None:
    """What the layers of a backbone share since `use_lean_layers`."""
    weights: HeldWeights | None = getattr(backbone, _WEIGHTS, None)
    return weights


def store_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of linear maps of the decoder layers in the format of their products alone.

    For a model that is not trained, after `use_lean_layers`: its products read these weights in
    that format and no other, so it gives what it gave.
    """
    narrow = {
        id(module.weight)
        for module in decoder_layers(model).modules()
        if type(module) is nn.Linear and hasattr(module, _WEIGHTS)
    }
    for parameter in model.parameters():
        wanted = dtype if id(parameter) in narrow else parameter.dtype
        # Copies, all of them: the file stays in memory as long as one weight is read from it.
        parameter.data = parameter.data.to(wanted, copy=True)


def decoder_layers(model: nn.Module) -> nn.Module:
    """The longest list of modules. What lies outside, such as the last norm, feeds a head that may
    want float32."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _replacement(module: nn.Module) -> Any:
    if type(module) is nn.Linear:
        return _linear_forward
    if _is_rms_norm(module):
        return _rms_norm_forward
    return _gated_mlp_forward if _is_gated_mlp(module) else None


def _is_plain_embedding(module: Any) -> bool:
    return (
        type(module) is nn.Embedding
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(epsilon, float):
        return False
    if len(list(module.parameters())) > 1:
        return False
    probe = _probe(weight, len(weight))
    # Some families scale by 1 + weight, or round in between.
    return _agree(module(probe), layer_functions.RMSNorm.apply(probe, weight, epsilon, probe.dtype))  # type: ignore[no-untyped-call]


def _is_gated_mlp(module: nn.Module) -> bool:
    maps = _gated_maps(module)
    if maps is None or not is_silu(getattr(module, "act_fn", None)):
        return False
    gate, up, down = maps
    probe = _probe(gate, gate.shape[1])
    own = (functional.silu(probe @ gate.T) * (probe @ up.T)) @ down.T
    return _agree(module(probe), own)


def is_silu(activation: Any) -> bool:
    """Whether an activation is x * sigmoid(x)."""
    return isinstance(activation, nn.SiLU | SiLUActivation)


def _gated_maps(module: nn.Module) -> list[Tensor] | None:
    """Weights of gate, up and down; none unless all three are linear maps and nothing more.

    An adapter's layer shows the weight below it as its own.
    """
    maps = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(one) is nn.Linear and one.bias is None for one in maps):
        return None
    return [cast(nn.Linear, one).weight for one in maps]


def _use_rotation(file: ModuleType) -> None:
    """Put ours in front of a model file's function, if the two rotate alike."""
    theirs: Any = getattr(file, _ROTATION, None)
    if theirs is None or hasattr(theirs, "plain"):
        return
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    angles = torch.randn(1, 3, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        found = theirs(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return
    ours = [rotated(one, cos, sin) for one in (q, k)]
    if all(_agree(a, b) for a, b in zip(found, ours, strict=True)):
        setattr(file, _ROTATION, _rotation(theirs))


def _rotation(plain: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> Any:
        if rest or more or q.dtype != _dtype(q):
            return plain(q, k, cos, sin, *rest, **more)
        return tuple(layer_functions.Rotation.apply(one, cos, sin) for one in (q, k))  # type: ignore[no-untyped-call]

    rotate.plain = plain  # type: ignore[attr-defined]
    return rotate


def _probe(weight: Tensor, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, width, generator=generator).to(weight.device, weight.dtype)


def _agree(theirs: Any, ours: Tensor) -> bool:
    return isinstance(theirs, Tensor) and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def _dtype(states: Tensor) -> torch.dtype | None:
    """What our functions compute in; none where the modules compute as they did."""
    device = states.device.type
    if torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
        return wanted if wanted == torch.bfloat16 else None
    return states.dtype if device == "cpu" and states.dtype == torch.float32 else None


def _embedding_forward(self: nn.Embedding, ids: Tensor) -> Tensor:
    if ids.device.type != "cpu":  # adding rows up in place has no fixed order elsewhere
        return functional.embedding(ids, self.weight, self.padding_idx)
    found: Tensor = layer_functions.Embedding.apply(ids, self.weight, self.padding_idx)  # type: ignore[no-untyped-call]
    return found


def _linear_forward(self: nn.Linear, states: Tensor) -> Tensor:
    dtype = _dtype(states)
    if dtype is None:
        return functional.linear(states, self.weight, self.bias)
    weights: HeldWeights = getattr(self, _WEIGHTS)
    found: Tensor = layer_functions.Linear.apply(  # type: ignore[no-untyped-call]
        states.to(dtype), self.weight, self.bias, weights.of(self.weight, dtype)
    )
    return found


def _rms_norm_forward(self: Any, states: Tensor) -> Tensor:
    dtype = _dtype(states)
    if dtype is None:
        plain: Tensor = type(self).forward(self, states)
        return plain
    weights: HeldWeights = getattr(self, _WEIGHTS)
    found: Tensor = layer_functions.RMSNorm.apply(  # type: ignore[no-untyped-call]
        states, self.weight, self.variance_epsilon, dtype, weights.can_divide(self.weight)
    )
    return found


def _gated_mlp_forward(self: Any, states: Tensor) -> Tensor:
    dtype, maps = _dtype(states), _gated_maps(self)
    if dtype is None:
        plain: Tensor = type(self).forward(self, states)
        return plain
    if maps is None:  # adapters have come since
        gate, up = self.gate_proj(states), self.up_proj(states)
        adapted: Tensor = self.down_proj(layer_functions.Gate.apply(gate, up))  # type: ignore[no-untyped-call]
        return adapted
    weights: HeldWeights = getattr(self, _WEIGHTS)
    found: Tensor = layer_functions.GatedMLP.apply(  # type: ignore[no-untyped-call]
        states.to(dtype), *maps, *(weights.of(one, dtype) for one in maps)
    )
    return found
