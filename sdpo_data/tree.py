"""Which tokens sequences share, and in which rows to compute each of them once. No torch.

Sequences are sorted, so that those with a common beginning stand together: written out depth first,
they are one prefix tree, a node a token. The nodes are cut into rows of a size that suits the device.
A node sees its ancestors and itself, and its position is its depth; ancestors that an earlier row
computed are read from the cache. So every sequence gets what it would get alone, and no token is
computed twice in a bin. Last tokens are only predicted, never read: they are no nodes.

        prompt -+- chosen (c3 c4 c5)       nodes      p0 p1 p2 c3 | c4 r3       rows of four
                +- rejected (r3 r4)        position    0  1  2  3 |  4  3
                                           row 2 keeps p0 p1 p2 c3 in the cache; r3 sees p0 p1 p2 r3, predicts r4
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

BIN_ROWS = 32  # a bin, which is what a kill can cost, is so many rows: half a minute of a small model on two cores

Request = tuple[Sequence[int] | np.ndarray, int]
"""Token ids, and where the completion starts: 1 <= start < len(ids), as a first token is never predicted."""


@dataclass(frozen=True)
class Row:
    """Nodes computed in one forward pass, standing on those of their ancestors that are in the cache."""

    tokens: np.ndarray  # (nodes,) token ids
    depth: np.ndarray  # (nodes,) position ids
    kept: np.ndarray  # (cached,) where these ancestors stand in the columns of the row before
    columns: np.ndarray  # (cached + nodes,) numbers in the bin of what is seen: cached ancestors, then the nodes
    end: np.ndarray  # (cached + nodes,) column j is seen by node i if columns[j] <= i < end[j]
    readers: np.ndarray  # (reads,) the node, counted in this row, that predicts a completion token
    targets: np.ndarray  # (reads,) the token id it is to predict
    places: np.ndarray  # (reads,) where that token stands in the bin's completions, one after the other


@dataclass(frozen=True)
class Bin:
    """Sequences computed together, by themselves: a unit of work, and of what a kill can cost."""

    sequences: tuple[int, ...]
    """Their places among the requests."""
    tokens: int
    """Tokens to compute: nodes of the tree, or those of a padded batch."""
    packed: bool
    """As a prefix tree in rows; if not, as a batch padded on the right."""


def plan_bins(requests: Sequence[Request], row_tokens: int, packed_length: int = 2**31) -> list[Bin]:
    """Cut requests into bins, those with the longest sequences first, so that memory runs out at once or never.

    The plan depends on the requests alone, not on their order. A bin ends where the next sequence
    shares least with it.

    Args:
        requests: what is to be scored.
        row_tokens: tokens of a forward pass.
        packed_length: longer sequences come in padded batches of like length.
    """
    arrays = [np.asarray(ids, dtype=np.int32) for ids, _ in requests]
    order = sorted(range(len(requests)), key=lambda place: (arrays[place].astype(">i4").tobytes(), requests[place][1]))
    packed = [place for place in order if len(arrays[place]) <= packed_length]
    alone = sorted((place for place in order if len(arrays[place]) > packed_length), key=lambda p: -len(arrays[p]))
    bins = _cut_tree(packed, [arrays[place] for place in packed], BIN_ROWS * row_tokens)
    while alone:
        length = len(arrays[alone[0]])
        batch, alone = alone[: max(1, row_tokens // length)], alone[max(1, row_tokens // length) :]
        bins.append(Bin(tuple(batch), length * len(batch), packed=False))
    return sorted(bins, key=lambda bin_: -max(len(arrays[place]) for place in bin_.sequences))


def _cut_tree(places: list[int], arrays: list[np.ndarray], bin_tokens: int) -> list[Bin]:
    bins: list[Bin] = []
    start = size = 0
    least = 2**31  # what all sequences of the bin so far share
    for here, ids in enumerate(arrays):
        shared = common_prefix(arrays[here - 1][:-1], ids[:-1]) if here > start else 0
        fresh = len(ids) - 1 - shared
        if here > start and ((size >= bin_tokens and shared <= least) or size + fresh > 2 * bin_tokens):
            bins.append(Bin(tuple(places[start:here]), size, packed=True))
            start, size, least, fresh = here, 0, 2**31, len(ids) - 1
        elif here > start:
            least = min(least, shared)
        size += fresh
    if places:
        bins.append(Bin(tuple(places[start:]), size, packed=True))
    return bins


def plan_rows(requests: Sequence[Request], row_tokens: int) -> list[Row]:
    """Write a bin's requests, sorted as `plan_bins` has them, out as a tree, and cut it into rows.

    Args:
        requests: of one bin, in its order.
        row_tokens: nodes per row; the last row has what is left.

    Returns:
        Rows to be computed in this order.
    """
    tokens, depth, end = (np.zeros(sum(len(ids) - 1 for ids, _ in requests), dtype=np.int64) for _ in range(3))
    path = np.zeros(0, dtype=np.int64)  # node at each depth of the sequence before
    before, used, reads = np.zeros(0, dtype=np.int64), 0, []
    for ids_, start in requests:
        ids = np.asarray(ids_, dtype=np.int64)
        shared = common_prefix(before, ids[:-1])
        fresh = np.arange(used, used + len(ids) - 1 - shared)
        end[path[shared:]] = used  # what the sequence before did not share, nothing later sees
        path = np.concatenate([path[:shared], fresh])
        tokens[fresh], depth[fresh] = ids[shared:-1], np.arange(shared, len(path))
        reads.append((path[start - 1 :], ids[start:]))
        before, used = ids[:-1], used + len(fresh)
    end[path] = used
    readers, targets = (np.concatenate(part) for part in zip(*reads, strict=True))
    order = np.argsort(readers, kind="stable")  # so that a row's reads stand together
    cuts = np.searchsorted(readers[order], range(0, used + row_tokens, row_tokens))
    rows, columns = [], np.zeros(0, dtype=np.int64)
    for first, (low, high) in zip(range(0, used, row_tokens), itertools.pairwise(cuts), strict=False):
        nodes = np.arange(first, min(first + row_tokens, used))
        kept = np.flatnonzero(end[columns] > first)  # what the row before saw and this one still does
        columns = np.concatenate([columns[kept], nodes])
        own = order[low:high]
        rows.append(
            Row(tokens[nodes], depth[nodes], kept, columns, end[columns], readers[own] - first, targets[own], own)
        )
    return rows


def count_tokens(requests: Sequence[Request]) -> int:
    """Count the nodes of the one prefix tree of all requests: the fewest tokens any plan can compute."""
    order = sorted(np.asarray(ids, dtype=">i4")[:-1].tobytes() for ids, _ in requests)
    texts = [np.frombuffer(text, dtype=">i4") for text in order]
    shared = (common_prefix(before, text) for before, text in itertools.pairwise(texts))
    return sum(map(len, texts)) - sum(shared)


def request_key(request: Request) -> str:
    """Name a request by its content: a hash of its token ids and of where its completion starts."""
    ids, start = request
    return xxhash.xxh3_128_hexdigest(np.asarray(ids, dtype="<i4").tobytes(), seed=start)


def common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    """Count the elements in which two arrays agree before they first differ."""
    size = min(len(left), len(right))
    different = left[:size] != right[:size]
    return int(different.argmax()) if different.any() else size
