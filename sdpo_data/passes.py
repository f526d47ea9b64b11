"""Forward passes of a model up to log-probabilities: a prefix tree in rows, a padded batch, a plain sequence."""

import contextlib
import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sdpo_data.flex import flex_attention, tree_mask
from sdpo_data.head import block_rows, logits_to_logps, read_logps
from sdpo_data.tree import Request, Row, plan_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "alloc_failed", "bad_alloc")
"""As CUDA, the CPU's allocators, cuBLAS and C++ say it; an "illegal memory access" is a bug."""

Read = tuple[np.ndarray, "torch.Tensor", "torch.Tensor", int]
"""Places in the bin's completions, their log-probabilities, whether they are the likeliest, tokens computed."""


def tree_pass(model: "PreTrainedModel", requests: Sequence[Request], row_tokens: int, *, flex: bool) -> Iterator[Read]:
    """Compute sequences, in the order of one bin, as a prefix tree in rows, each on the cache of its ancestors."""
    from transformers.cache_utils import DynamicCache

    rows = plan_rows(requests, row_tokens)
    cache = DynamicCache() if len(rows) > 1 else None
    for row in rows:
        if cache is not None and len(row.columns) > len(row.tokens):
            _keep(cache, row.kept)
        elif cache is not None:
            cache = DynamicCache()  # nothing of the row before is seen
        states = tree_states(model, row, cache, flex=flex)
        if len(row.readers):
            yield row.places, *read_logps(model, states, row.readers, row.targets), len(row.tokens)
        else:
            yield row.places, *_nothing(states), len(row.tokens)


def tree_states(
    model: "PreTrainedModel", row: Row, cache: "DynamicCache | None", *, flex: bool = False
) -> "torch.Tensor":
    """Run a row through the model up to its head: (nodes, hidden)."""
    import torch

    device = model.device
    columns, end = (torch.from_numpy(part).to(device) for part in (row.columns, row.end))
    with flex_attention(model) if flex else contextlib.nullcontext():
        output = model.base_model(
            input_ids=torch.from_numpy(row.tokens)[None].to(device),
            position_ids=torch.from_numpy(row.depth)[None].to(device),
            attention_mask=(tree_mask if flex else _dense_mask)(columns, end, len(row.tokens), model.dtype),
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return output.last_hidden_state[0]


def batch_pass(model: "PreTrainedModel", requests: Sequence[Request], *, split_head: bool) -> Iterator[Read]:
    """Compute sequences side by side, padded on the right.

    Where the head cannot be run by itself every position goes through it: then so many sequences at
    a time that their logits keep to HEAD_BYTES, or one that is larger by itself.
    """
    import torch

    length = max(len(ids) for ids, _ in requests)
    size = len(requests) if split_head else max(1, block_rows(model, model.device) // length)
    place = 0
    for first in range(0, len(requests), size):
        part = requests[first : first + size]
        ids, mask = np.zeros((len(part), length), dtype=np.int64), np.zeros((len(part), length), dtype=np.int64)
        for row, (tokens, _) in enumerate(part):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        inputs = {
            "input_ids": torch.from_numpy(ids).to(model.device),
            "attention_mask": torch.from_numpy(mask).to(model.device),
            "use_cache": False,
        }
        readers = np.concatenate([row * length + np.arange(s - 1, len(t) - 1) for row, (t, s) in enumerate(part)])
        targets = np.concatenate([np.asarray(tokens[start:], dtype=np.int64) for tokens, start in part])
        if split_head:
            states = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
            logps, likeliest = read_logps(model, states, readers, targets)
        else:
            logits = model(**inputs).logits.flatten(0, 1)[torch.from_numpy(readers).to(model.device)]
            logps, likeliest = logits_to_logps(logits, torch.from_numpy(targets).to(logits.device))
        yield np.arange(place, place + len(readers)), logps, likeliest, ids.size
        place += len(readers)


def plain_states(model: "PreTrainedModel", ids: np.ndarray) -> "torch.Tensor":
    """Run one plain sequence through the model up to its head: (tokens, hidden)."""
    import torch

    inputs = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(model.device)
    return model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0]


def _dense_mask(columns: "torch.Tensor", end: "torch.Tensor", nodes: int, dtype: "torch.dtype") -> "torch.Tensor":
    """Mask what each of the last `nodes` columns does not see: (1, 1, nodes, cached + nodes), to be added."""
    import torch

    number = columns[len(columns) - nodes :, None]
    seen = (columns <= number) & (number < end)
    bias = torch.zeros(seen.shape, dtype=dtype, device=columns.device)
    return bias.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def _keep(cache: "DynamicCache", kept: np.ndarray) -> None:
    """Leave in the cache only these of its positions."""
    import torch

    layers: Any = cache.layers
    for layer in layers:
        place = torch.from_numpy(kept).to(layer.keys.device)
        layer.keys, layer.values = layer.keys[..., place, :], layer.values[..., place, :]


def _nothing(states: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    return states.new_zeros(0, dtype=torch.float32), states.new_zeros(0, dtype=torch.bool)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell want of memory, of the device or the host, from what is a bug."""
    wanting = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return wanting or any(sign in str(error).lower() for sign in OUT_OF_MEMORY)
