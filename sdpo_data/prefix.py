"""Log-probabilities of many continuations, each shared prefix computed once.

Sequences are sorted, so that those with a common beginning stand together, and packed into rows.
A row is the prefix tree of its sequences, written out depth first: a token sees its ancestors and
itself, and its position is its depth. So every sequence gets what it would get alone, and a token
that several sequences share is computed once a row. Last tokens are only predicted, never read,
so they are in no row.

        prompt -+- chosen (c3 c4 c5)       tokens    p0 p1 p2 c3 c4 r3
                +- rejected (r3 r4)        position   0  1  2  3  4  3
                                           r3 sees   p0 p1 p2 r3, and predicts r4

The saving is about (2P + C + R) / (P + C + R) for a pair, and there is no padding at all.
"""

import inspect
import itertools
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.1}  # nats a token, packed against alone, at the probe

PLAIN_ROW = 512  # tokens up to which a row takes in anything that fits: small matrices are slow
WORTH = 3000  # a shared token saves as much work as this many masked-out pairs of tokens cost, in a 135M model

_packs: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Row:
    """The prefix tree of some sequences without their last tokens, one node a token, depth first."""

    tokens: np.ndarray  # (nodes,) token ids
    depth: np.ndarray  # (nodes,) position ids
    end: np.ndarray  # (nodes,) node j is seen by node i if j <= i < end[j]
    predictors: dict[int, np.ndarray]  # sequence -> the nodes that predict its completion, in order
    targets: dict[int, np.ndarray]  # sequence -> the token ids they are to predict


@dataclass(frozen=True)
class Completion:
    """What a model says of one continuation."""

    logps: np.ndarray  # (tokens,) float32, nats
    greedy: bool  # every token is the likeliest one


def score_completions(
    model: "PreTrainedModel", sequences: Sequence[tuple[Sequence[int], int]], token_budget: int
) -> Iterator[tuple[list[int], list[Completion]]]:
    """Score the tokens of each sequence from `start` on, row by row, the longest rows first.

    Which way is taken is measured, not looked up: packed rows where the model gives the same
    answer for them as for sequences alone, length-sorted batches where it does not (ALiBi,
    recurrent state) and for sequences longer than its sliding window.

    Args:
        model: loaded causal LM, in eval mode.
        sequences: (token ids, start); 1 <= start < len(ids): a first token is never predicted.
        token_budget: tokens per row; a single longer sequence has a row of its own.

    Yields:
        The places of some sequences in `sequences`, and what the model says of them.

    Raises:
        ValueError: a sequence has no completion token. It would get 0, the best score there is.
    """
    import torch

    impossible = [place for place, (ids, start) in enumerate(sequences) if not 1 <= start < len(ids)]
    if impossible:
        raise ValueError(f"Sequence {impossible[0]} has no completion token after a first token: nothing to score.")
    window = _window(model)
    with torch.inference_mode():
        packed = [place for place, (ids, _) in enumerate(sequences) if len(ids) <= window and _can_pack(model)]
        alone = sorted(set(range(len(sequences))) - set(packed))
        for row in plan_rows(sequences, packed, token_budget):
            yield list(row.predictors), _score_row(model, row)
        for batch in _plan_batches(sequences, alone, token_budget):
            yield batch, _score_batch(model, [sequences[place] for place in batch])


def plan_rows(sequences: Sequence[tuple[Sequence[int], int]], places: Sequence[int], token_budget: int) -> list[Row]:
    """Pack sequences into rows of at most `token_budget` tokens, the longest row first.

    Beyond PLAIN_ROW a row takes a sequence in only where what it shares outweighs the attention
    between siblings, which is computed and masked. The plan depends on the sequences alone, not
    on their order.
    """
    ids = {place: np.asarray(sequences[place][0], dtype=np.int64) for place in places}
    order = sorted(places, key=lambda place: (ids[place].astype(">i8").tobytes(), sequences[place][1]))
    runs: list[list[tuple[int, int]]] = []  # rows of (sequence, nodes it shares with the one before)
    size = 0
    for place in order:
        shared = _common_prefix(ids[runs[-1][-1][0]][:-1], ids[place][:-1]) if runs else 0
        fresh = len(ids[place]) - 1 - shared
        pays = size + fresh <= PLAIN_ROW or 2 * size * fresh <= WORTH * shared
        if not (runs and pays and size + fresh <= token_budget):
            runs.append([])
            fresh, shared, size = fresh + shared, 0, 0
        runs[-1].append((place, shared))
        size += fresh
    rows = [_tree(run, ids, sequences) for run in runs]
    return sorted(rows, key=lambda row: -len(row.tokens))


def count_tokens(sequences: Sequence[tuple[Sequence[int], int]]) -> int:
    """Count the nodes of the one prefix tree of all sequences: the fewest tokens any plan can compute."""
    order = sorted(np.asarray(ids[:-1], dtype=">i8").tobytes() for ids, _ in sequences)
    texts = [np.frombuffer(text, dtype=">i8") for text in order]
    shared = (_common_prefix(before, text) for before, text in itertools.pairwise(texts))
    return sum(map(len, texts)) - sum(shared)


def _tree(
    run: list[tuple[int, int]], ids: dict[int, np.ndarray], sequences: Sequence[tuple[Sequence[int], int]]
) -> Row:
    size = sum(len(ids[place]) - 1 - shared for place, shared in run)
    tokens, depth = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    end = np.full(size, size, dtype=np.int64)
    path = np.zeros(0, dtype=np.int64)  # node at each depth of the sequence before
    predictors, targets, used = {}, {}, 0
    for place, shared in run:
        fresh = np.arange(used, used + len(ids[place]) - 1 - shared)
        end[path[shared:]] = used  # what the sequence before did not share, nothing later sees
        path = np.concatenate([path[:shared], fresh])
        tokens[fresh] = ids[place][shared:-1]
        depth[fresh] = np.arange(shared, len(path))
        start = sequences[place][1]
        predictors[place], targets[place] = path[start - 1 :], ids[place][start:]
        used += len(fresh)
    return Row(tokens, depth, end, predictors, targets)


def _score_row(model: "PreTrainedModel", row: Row) -> list[Completion]:
    import torch

    device = model.device
    node = torch.arange(len(row.tokens), device=device)
    end = torch.from_numpy(row.end).to(device)
    seen = (node[None, :] <= node[:, None]) & (node[:, None] < end[None, :])  # (nodes, nodes)
    bias = torch.zeros(seen.shape, dtype=model.dtype, device=device)
    bias.masked_fill_(~seen, torch.finfo(model.dtype).min)
    kept, rows = np.unique(np.concatenate(list(row.predictors.values())), return_inverse=True)
    logits = model(
        input_ids=torch.from_numpy(row.tokens)[None].to(device),
        position_ids=torch.from_numpy(row.depth)[None].to(device),
        attention_mask=bias[None, None],
        use_cache=False,
        **_keep(model, torch.from_numpy(kept).to(device)),
    ).logits[0]  # (kept, vocab)
    return _read(logits, rows, list(row.targets.values()))


def _read(logits: "torch.Tensor", rows: np.ndarray, targets: Sequence[np.ndarray]) -> list[Completion]:
    """Log-probabilities, in float32, of the targets one after the other, target k predicted by logits[rows[k]]."""
    import torch

    logits = logits.float()
    tokens = torch.from_numpy(np.concatenate(targets)).to(logits.device)
    at = torch.from_numpy(rows).to(logits.device)
    logps = (logits[at, tokens] - logits.logsumexp(-1)[at]).cpu().numpy()
    likeliest = (logits.argmax(-1)[at] == tokens).cpu().numpy()
    ends = np.cumsum([len(target) for target in targets])[:-1]
    return [
        Completion(part, bool(best.all()))
        for part, best in zip(np.split(logps, ends), np.split(likeliest, ends), strict=True)
    ]


def _keep(model: "PreTrainedModel", positions: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    """Ask for the head's work at these positions only."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise TypeError("the model has no logits_to_keep")
    return {"logits_to_keep": positions}


def _can_pack(model: "PreTrainedModel") -> bool:
    """Try a small tree: does every sequence get in it what it gets alone?"""
    if model not in _packs:
        vocabulary = model.config.get_text_config().vocab_size
        ids = np.random.default_rng(0).integers(0, vocabulary, 24).tolist()
        sequences = [(ids[:12], 8), (ids[:8] + ids[12:18], 8), (ids[:4] + ids[18:], 4)]
        [row] = plan_rows(sequences, range(3), 100)
        try:
            together = dict(zip(row.predictors, _score_row(model, row), strict=True))
            gap = max(
                float(np.abs(together[place].logps - _score_batch(model, [sequence])[0].logps).max())
                for place, sequence in enumerate(sequences)
            )
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            gap, reason = float("inf"), str(error).split("\n")[0]
        else:
            reason = f"a token's log-probability moves by {gap:.2g} nats"
        _packs[model] = gap <= TOLERANCE[str(model.dtype).removeprefix("torch.")]
        if not _packs[model]:
            log.info("%s cannot read packed rows (%s): padded batches instead", type(model).__name__, reason)
    return _packs[model]


def _window(model: "PreTrainedModel") -> int:
    """Longest sequence whose attention a full causal mask describes."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = window and getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    return window if slides else 2**31


def _plan_batches(
    sequences: Sequence[tuple[Sequence[int], int]], places: Sequence[int], token_budget: int
) -> Iterator[list[int]]:
    """Batches of like length, the longest first, so that memory runs out at the beginning or never."""
    order = sorted(places, key=lambda place: (-len(sequences[place][0]), place))
    while order:
        size = max(1, token_budget // len(sequences[order[0]][0]))
        yield order[:size]
        order = order[size:]


def _score_batch(model: "PreTrainedModel", batch: Sequence[tuple[Sequence[int], int]]) -> list[Completion]:
    """Score sequences side by side, padded on the right."""
    import torch

    length = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids, _ in batch], device=model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (batch, length, vocab)
    completions = []
    for row, (tokens, start) in enumerate(batch):
        predicting = logits[row, start - 1 : len(tokens) - 1]
        completions += _read(predicting, np.arange(len(tokens) - start), [np.asarray(tokens[start:], dtype=np.int64)])
    return completions


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    size = min(len(left), len(right))
    different = left[:size] != right[:size]
    return int(different.argmax()) if different.any() else size
