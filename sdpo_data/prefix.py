"""Log-probabilities of many continuations, each shared prefix computed once: the one engine under all.

`tree.py` says what is computed together; here a model computes it. Rows of a prefix tree go through
the model's own forward with a mask in which siblings do not see each other, on top of a KV cache of
their ancestors. The head works on the positions that predict a completion, a few rows at a time.

Where `probe.py` finds that this is not what the sequences get alone, they come in padded batches of
like length instead.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdpo_data import workers
from sdpo_data.head import read_logps
from sdpo_data.passes import batch_pass, tree_pass, tree_states
from sdpo_data.probe import read_model
from sdpo_data.tree import Bin, Request, plan_bins, plan_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ROW_TOKENS = {"cpu": 512, "cuda": 8192}  # of a forward pass: beyond 512, dense masks cost a CPU more than they save


@dataclass(frozen=True)
class Completion:
    """What a model says of one continuation."""

    logps: np.ndarray  # (tokens,) float32, nats
    greedy: bool  # every token is the likeliest one


def score_completions(
    model: "PreTrainedModel",
    requests: Sequence[Request],
    token_budget: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[list[int], list[Completion]]]:
    """Score the tokens of each request from its start on, bin by bin, the longest sequences first.

    Args:
        model: loaded causal LM, in eval mode.
        requests: (token ids, start); 1 <= start < len(ids): a first token is never predicted.
        token_budget: tokens per forward pass at most; a device has its own limit besides.
        advance: told the tokens computed, row by row.

    Yields:
        The places of some requests in `requests`, and what the model says of them.

    Raises:
        ValueError: a request has no completion token. It would get 0, the best score there is.
    """
    if not requests:
        return
    for bin_ in plan_work(model, requests, token_budget):
        own = [requests[place] for place in bin_.sequences]
        yield list(bin_.sequences), score_bin(model, own, row_tokens(model, token_budget), advance, packed=bin_.packed)


def score_together(
    model: "PreTrainedModel", requests: Sequence[Request], token_budget: int | None = None
) -> Iterator[tuple[list[int], list[Completion]]]:
    """Do what `score_completions` does with all processes of `accelerate launch`: each of them gets every answer.

    All must call it, with the same requests. The bins are those of one process, so the answers are
    too, bit for bit; in each turn a process computes one of them.
    """
    if not requests:
        return
    size = row_tokens(model, token_budget)
    bins = workers.from_main(lambda: plan_work(model, requests, token_budget))
    for first in range(0, len(bins), workers.count()):
        turn = bins[first : first + workers.count()]
        own = turn[workers.rank() : workers.rank() + 1]
        said = [score_bin(model, [requests[p] for p in bin_.sequences], size, packed=bin_.packed) for bin_ in own]
        for bin_, [completions] in zip(turn, workers.gather(said), strict=False):  # the last turn may not need all
            yield list(bin_.sequences), completions


def plan_work(model: "PreTrainedModel", requests: Sequence[Request], token_budget: int | None = None) -> list[Bin]:
    """Plan bins for this model: trees as far as it can read them, batches beyond.

    Raises:
        ValueError: a request has no completion token. It would get 0, the best score there is.
    """
    impossible = [place for place, (ids, start) in enumerate(requests) if not 1 <= start < len(ids)]
    if impossible:
        raise ValueError(f"Sequence {impossible[0]} has no completion token after a first token: nothing to score.")
    longest = max(len(ids) for ids, _ in requests)
    packed_length = read_model(model, longest).packed_length
    if longest > packed_length:
        log.info(
            "%s is read in padded batches where sequences have more than %d tokens: prefix trees are not exact there",
            type(model).__name__,
            packed_length,
        )
    return plan_bins(requests, row_tokens(model, token_budget), packed_length)


def row_tokens(model: "PreTrainedModel", token_budget: int | None) -> int:
    """Tokens of a forward pass: what suits the device, or less where the budget says so."""
    own = ROW_TOKENS.get(model.device.type, ROW_TOKENS["cuda"])
    return min(own, token_budget) if token_budget else own


def score_bin(
    model: "PreTrainedModel",
    requests: Sequence[Request],
    row_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
    *,
    packed: bool = True,
) -> list[Completion]:
    """Compute one bin: its requests in, one completion each out. A cluster may map over bins.

    The numbers depend on the requests, their order and `row_tokens` alone: the same bin gives the
    same bits on the same machine.

    Args:
        requests: of one bin of `plan_bins`, in its order.
        row_tokens: tokens of a forward pass.
        advance: told the tokens computed.
        packed: as a tree in rows, else as one padded batch.
    """
    import torch

    with torch.inference_mode():
        counts = np.array([len(ids) - start for ids, start in requests])
        logps = np.zeros(counts.sum(), dtype=np.float32)
        likeliest = np.zeros(counts.sum(), dtype=bool)
        reading = read_model(model)
        if packed:
            reads = tree_pass(model, requests, row_tokens, flex=reading.flex)
        else:
            reads = batch_pass(model, requests, split_head=reading.split_head)
        for places, row_logps, row_likeliest, tokens in reads:
            logps[places] = row_logps.cpu().numpy()
            likeliest[places] = row_likeliest.cpu().numpy()
            advance(tokens)
    ends = np.cumsum(counts)[:-1]
    return [
        Completion(part, bool(best.all()))
        for part, best in zip(np.split(logps, ends), np.split(likeliest, ends), strict=True)
    ]


def read_tree(
    model: "PreTrainedModel", requests: Sequence[Request], *, flex: bool = False
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Do what `score_bin` does with gradients: the same forward, all requests in one row.

    Args:
        model: loaded causal LM that `read_model` says can be read in trees of this length.
        requests: in any order; what they share is computed once.
        flex: with FlexAttention, which the model must have been set to use (`flex.NAME`): layers
            that are checkpointed attend again on the way back.

    Returns:
        Of all completion tokens, request by request: log-probabilities in float32 or the model's
        wider dtype, nats, and whether each is the likeliest; on the model's device.
    """
    import torch

    [bin_] = plan_bins(requests, sum(len(ids) for ids, _ in requests))
    own = [requests[place] for place in bin_.sequences]
    [row] = plan_rows(own, bin_.tokens)
    logps, likeliest = read_logps(model, tree_states(model, row, None, flex=flex), row.readers, row.targets)
    ends = np.cumsum([len(ids) - start for ids, start in own])[:-1]
    stand = np.split(np.argsort(row.places), ends)  # of each request of the row, where its tokens were read
    order = np.concatenate([stand[place] for place in np.argsort(bin_.sequences)])
    back = torch.from_numpy(order).to(logps.device)
    return logps[back], likeliest[back]
