"""FlexAttention over prefix trees, for devices where rows are long: blocks that no node sees are not computed.

A custom attention of transformers, under the name NAME; with any other mask than a tree's it is sdpa.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

NAME = "sdpo_prefix_tree"


@contextlib.contextmanager
def flex_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Have a model use it for the time of the block."""
    _register()
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def tree_mask(columns: "torch.Tensor", end: "torch.Tensor", nodes: int, _: Any = None) -> "BlockMask":
    """Say which column (cached + nodes,) each of the last `nodes` of them sees: see `tree.Row`."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(_batch: Any, _head: Any, node: "torch.Tensor", column: "torch.Tensor") -> "torch.Tensor":
        number = columns[node + (len(columns) - nodes)]
        return (columns[column] <= number) & (number < end[column])

    return create_block_mask(seen, None, None, nodes, len(columns), device=str(columns.device))


@functools.cache
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@functools.cache
def _compiled() -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention as attend

    return torch.compile(attend, dynamic=True)  # rows differ in length: no compilation for each


def _forward(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> "tuple[torch.Tensor, None]":
    """Attend, in the form that transformers calls; what it does not know of, such as sinks, is an error."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, BlockMask):
        kwargs |= {} if softcap is None else {"softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("attention sinks and position biases are not known to the tree's attention")
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # the kernel takes powers of two only
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))

    def capped(score: "torch.Tensor", *_: Any, cap: float = softcap or 0.0) -> "torch.Tensor":
        return cap * torch.tanh(score / cap)

    output = _compiled()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None
