"""A key-value cache that grows in proportion, for the layers of ordinary full attention."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

# A layer that is full gets a sixteenth more room. Much more would mean fewer copies, but spreads
# what is filled over more memory, which attention then reads more slowly: a sixteenth is the
# fastest at 40 tokens and at 200, where copying all at each step costs half the time.
_SPARE = 16


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` that appends into spare room, where its parent copies all it holds.

    `keys` and `values` are views [rows, heads, filled, head_dim] of rooms with more columns.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the states and give back everything so far."""
        if self.keys is None or self.values is None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if self._rooms is None or end > self._rooms[0].shape[2]:
            self._rooms = _with_room(self.keys, end), _with_room(self.values, end)
        keys, values = self._rooms
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may occur more than once."""
        super().batch_select_indices(indices)
        self._rooms = None


def _with_room(states: Tensor, length: int) -> Tensor:
    """The states in a tensor that holds `length` tokens and some more."""
    num_rows, num_heads, filled, size = states.shape
    room = states.new_empty((num_rows, num_heads, length + length // _SPARE, size))
    room[:, :, :filled] = states
    return room


def make_cache(model: PreTrainedModel) -> Cache:
    """A cache for the model; layers that are not plain full attention get transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
