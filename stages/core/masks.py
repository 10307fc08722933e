"""Masks, and statistics over masked tokens.

Shapes: `_B` sequences, `_T` tokens. A mask is bool, or 0 and 1 in any dtype. What lies under a 0
never reaches a result, not even a NaN or an infinity: it is replaced, not multiplied away.
"""

import torch
from torch import Tensor

WHITEN_EPS = 1e-8  # added to the variance, as in TRL and verl


def upcast(values: Tensor) -> Tensor:
    """The dtype statistics are taken in: float64 stays, everything else becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


def completion_mask_from_lengths(
    prompt_lengths: Tensor, total_lengths: Tensor, width: int
) -> Tensor:
    """True on the completions of right-padded rows: prompt length <= t < total length.

    prompt_lengths, total_lengths: [_B] long, in tokens; total counts prompt and completion. The
    lengths decide, not the ids, so a pad id equal to the EOS id cannot hide the EOS token.
    Returns bool [_B, _T], _T = width. Raises ValueError unless 0 <= prompt <= total <= width.
    """
    bad = (prompt_lengths < 0) | (prompt_lengths > total_lengths) | (total_lengths > width)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"row {row}: prompt length {int(prompt_lengths[row])} and total length "
            f"{int(total_lengths[row])} do not satisfy 0 <= prompt <= total <= width ({width})"
        )
    positions = torch.arange(width, device=prompt_lengths.device)
    return (positions >= prompt_lengths[:, None]) & (positions < total_lengths[:, None])


def last_valid_index(attention_mask: Tensor) -> Tensor:
    """Position of the last 1 in each row of attention_mask [_B, _T], padded on either side.

    Returns long [_B]. Raises ValueError if a row has no 1.
    """
    mask = attention_mask.bool()
    empty = ~mask.any(dim=1)
    if empty.any():
        raise ValueError(f"row {int(empty.nonzero()[0])} has no valid token: there is no last one")
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of values [_B, _T] where mask [_B, _T] is 1, over everything or over `dim`.

    Nothing to sum gives 0.
    """
    assert values.shape == mask.shape, (values.shape, mask.shape)
    kept = torch.where(mask.bool(), upcast(values), 0.0)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of values [_B, _T] where mask [_B, _T] is 1, over everything or over `dim`.

    No valid token gives 0: a fully masked row adds nothing and spreads no NaN.
    """
    valid = mask.bool()
    count = valid.sum() if dim is None else valid.sum(dim=dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Values [_B, _T] scaled to unit variance over all valid tokens; 0 where masked.

    The variance is the sample variance, as in TRL and verl. `shift_mean=False` puts the mean back.
    Without variance the deviations are exactly 0. It sees only the tokens it is given: pass
    every token of the optimizer step, or the result depends on how the step was split.
    """
    assert values.shape == mask.shape, (values.shape, mask.shape)
    valid = mask.bool()
    values = upcast(values)
    kept = values[valid]
    # Rounding in the mean would leave 1e-8 over 1e-4 where there is nothing: compare, then divide.
    if kept.numel() < 2 or bool((kept == kept[0]).all()):
        return torch.zeros_like(values) if shift_mean else torch.where(valid, values, 0.0)
    mean = kept.mean()
    whitened = (values - mean) * torch.rsqrt(kept.var(correction=1) + WHITEN_EPS)
    return torch.where(valid, whitened if shift_mean else whitened + mean, 0.0)
