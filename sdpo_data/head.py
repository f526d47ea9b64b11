"""Log-probabilities off hidden states: the model's own head, on the positions that need it, a block at a time."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HEAD_BYTES = {"cpu": 2**26, "cuda": 2**29}  # of the largest (rows, vocabulary) block of float32 logits


def read_logps(
    model: "PreTrainedModel", states: "torch.Tensor", readers: np.ndarray, targets: np.ndarray
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Log-probability of target k as position readers[k] (ascending) predicts it, and whether it is the likeliest.

    Every position goes through the head once, as many at a time as HEAD_BYTES allows; with
    gradients, the logits of a single block are kept, those of more computed again on the way back.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    positions, rows = np.unique(readers, return_inverse=True)
    size = max(1, block_rows(model, states.device))
    parts = []
    for first in range(0, len(positions), size):
        low, high = np.searchsorted(rows, [first, first + size])
        at = torch.from_numpy(rows[low:high] - first).to(states.device)
        tokens = torch.from_numpy(targets[low:high]).to(states.device)
        block = states[torch.from_numpy(positions[first : first + size]).to(states.device)]

        def head(block: "torch.Tensor", at: "torch.Tensor" = at, tokens: "torch.Tensor" = tokens) -> Any:
            return logits_to_logps(run_head(model, block), tokens, at)

        again = block.requires_grad and len(positions) > size
        parts.append(checkpoint(head, block, use_reentrant=False) if again else head(block))
    logps, likeliest = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(likeliest)


def block_rows(model: "PreTrainedModel", device: "torch.device") -> int:
    """Count the positions whose logits HEAD_BYTES holds."""
    vocabulary = model.config.get_text_config().vocab_size
    return HEAD_BYTES.get(device.type, HEAD_BYTES["cuda"]) // (4 * vocabulary)


def logits_to_logps(
    logits: "torch.Tensor", tokens: "torch.Tensor", at: "torch.Tensor | None" = None
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Read log-probabilities off logits (rows, vocab), at least in float32."""
    import torch

    logits = logits if logits.dtype == torch.float64 else logits.float()
    at = torch.arange(len(tokens), device=logits.device) if at is None else at
    tokens, at = tokens.to(logits.device), at.to(logits.device)
    own = logits[at, tokens]
    return own - logits.logsumexp(-1)[at], own.detach() >= logits.detach().amax(-1)[at]


def run_head(model: "PreTrainedModel", states: "torch.Tensor") -> "torch.Tensor":
    """Run what a model does after its backbone (head, soft cap, scale) on hidden states (rows, hidden).

    The backbone's place is taken by the states for the one call, so that it is the model's own code
    that runs, whatever its architecture.
    """
    import torch

    backbone = model.base_model
    own = vars(backbone).get("forward")  # accelerate puts its hooks there
    backbone.forward = lambda *_, **__: _Output(states[None])  # type: ignore[method-assign]
    try:
        return model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False).logits[0]
    finally:
        if own is None:
            del backbone.forward
        else:
            backbone.forward = own


class _Output:
    """What a backbone gives back, whatever its class: hidden states, and nothing else."""

    def __init__(self, states: "torch.Tensor"):
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: int) -> "torch.Tensor":
        return (self.last_hidden_state,)[place]
