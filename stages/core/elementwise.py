"""Parts of a layer between its matrix products: by `stages.core.kernels` where these serve, else by
torch's operations.

None has a gradient of its own. Sums are in float32 at least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from stages.core import kernels


def rms_norm(
    states: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean x^2 + epsilon) * weight (Zhang and Sennrich 2019, eq. 4), in dtype.

    states [..., size], weight [size]. Also gives 1 / sqrt(...), [..., 1].
    """
    if _serve_norm(states, weight) and dtype in kernels.FORMATS:
        return kernels.rms_norm(states, weight, epsilon, dtype)
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
    return (states * scale).mul_(weight).to(dtype), scale


def rms_norm_backward(
    kept: Tensor, from_result: bool, weight: Tensor, scale: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the states [..., size], in float32, and of the weight [size].

    kept is what `rms_norm` gave, which divided by the weight is the normalised x, or the states.
    """
    if _serve_norm(scale, weight) and kernels.serve(kept) and kernels.serve(grad):
        inverse = weight.reciprocal() if from_result else None
        return kernels.rms_norm_backward(kept, inverse, weight, scale, grad)
    # In float32 first: an operation on two formats takes longer than the copy.
    normed = kept.float() / weight if from_result else kept.float() * scale
    grad = grad.float()
    product = normed * grad
    along = (product @ weight).div_(-len(weight)).unsqueeze(-1)
    d_states = (grad * weight).addcmul_(normed, along).mul_(scale)
    return d_states, product.reshape(-1, len(weight)).sum(0)


def add_(total: Tensor, part: Tensor) -> None:
    """total += part, [...] each. The kernel makes no copy of part in total's format."""
    in_place = total.dtype == torch.float32 and total.is_contiguous()
    if in_place and kernels.serve(total) and kernels.serve(part):
        kernels.add_(total, part)
    else:
        total.add_(part)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, eq. 6), both [..., size]. The kernel rounds once."""
    if kernels.serve(gate, up):
        return kernels.gated(gate, up)
    return functional.silu(gate).mul_(up)


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and of up, and `gated`. Overwrites grad."""
    if kernels.serve(grad, gate, up):
        return kernels.gated_backward(grad, gate, up)
    active = functional.silu(gate)
    product = active * up
    d_up = active.mul_(grad)
    return torch.ops.aten.silu_backward(grad.mul_(up), gate), d_up, product


def rotated(states: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34) of [_B, heads, _T, dim], or its inverse.

    cos and sin are [1 or _B, _T, dim], their second half the same as the first. The result lies in
    memory as [_B, _T, heads, dim].
    """
    rows = states.transpose(1, 2)
    if kernels.serve(rows) and len(rows) == 1:
        turned = kernels.rotate(rows[0], cos[0].float(), sin[0].float(), back)
        return turned.unsqueeze(0).transpose(1, 2)
    rows = rows.float()
    half = rows.shape[-1] // 2
    sin = sin[..., None, :half]
    sign = -1 if back else 1
    found = rows * cos.unsqueeze(2)
    found[..., :half].addcmul_(rows[..., half:], sin, value=-sign)
    found[..., half:].addcmul_(rows[..., :half], sin, value=sign)
    return found.to(states.dtype).transpose(1, 2)


def causal_softmax_(scores: Tensor, chunk: int) -> Tensor:
    """Softmax of scores [..., columns] over what each row sees. May overwrite them.

    Rows are counted through, chunk by chunk; row j of a chunk sees all columns but the last
    chunk - j - 1.
    """
    if kernels.serve(scores):
        return kernels.causal_softmax_(scores, chunk)
    own = scores.view(-1, chunk, scores.shape[-1])[..., -chunk:]
    own += scores.new_full((chunk, chunk), -math.inf).triu_(1)
    return scores.softmax(dim=-1)


def causal_softmax_backward_(weights: Tensor, grad: Tensor, chunk: int) -> Tensor:
    """Gradient of the scores, from that of the weights that `causal_softmax_` gave. May overwrite
    it."""
    if kernels.serve(weights, grad):
        return kernels.causal_softmax_backward_(weights, grad, chunk)
    found: Tensor = torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
    return found


def _serve_norm(states: Tensor, weight: Tensor) -> bool:
    return states.dtype == torch.float32 and kernels.serve(states, weight)
