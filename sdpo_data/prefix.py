"""Log-probabilities of many continuations, each shared prefix computed once: the one engine under all.

`tree.py` says what is computed together; here a model computes it. Rows of a prefix tree go through
the model's own forward with a mask in which siblings do not see each other, on top of a KV cache of
their ancestors. The head works on the positions that predict a completion, a few rows at a time.

Whether a model can be read this way is measured, not looked up: where it does not give the same
answer as for sequences alone (ALiBi, recurrent state, beyond a sliding window), they come in padded
batches of like length instead.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from sdpo_data import workers
from sdpo_data.assets import cache_folder
from sdpo_data.flex import flex_attention, tree_mask
from sdpo_data.head import block_rows, logits_to_logps, read_logps, run_head
from sdpo_data.models import NOT_NUMBERS
from sdpo_data.run import write_atomically
from sdpo_data.tables import SdpoError
from sdpo_data.tree import Bin, Request, Row, plan_bins, plan_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

log = logging.getLogger(__name__)

ROW_TOKENS = {"cpu": 512, "cuda": 8192}  # of a forward pass: beyond 512, dense masks cost a CPU more than they save
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}  # nats a token, at the probe
FLEX = ("cuda",)  # devices on which FlexAttention is tried; dense masks in short rows elsewhere
PROBE = 24  # tokens of the smallest probe
ROUNDING = 3  # times what a plain forward differs from itself, which is allowed to a tree too
SLICE = 4  # numbers of each weight that tell it from another model's
WINDOWS = {  # settings that name one, tokens -> the kind of layer it is for
    "sliding_window": "sliding_attention",
    "attention_chunk_size": "chunked_attention",
}
UNREADABLE = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    IndexError,
)  # from what knows no trees


@dataclass(frozen=True)
class Completion:
    """What a model says of one continuation."""

    logps: np.ndarray  # (tokens,) float32, nats
    greedy: bool  # every token is the likeliest one


@dataclass(frozen=True)
class Reading:
    """How a model can be read; measured once for every config, weights, dtype and device."""

    packed_length: int
    """Longest sequence that gets in a tree what it gets alone, tokens; 0 if none does."""
    probed: int
    """Longest sequence that was tried."""
    split_head: bool
    """The head can be run by itself, on some positions only."""
    flex: bool = False
    """Trees are right with FlexAttention, and the device is one where it pays."""


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
        reads = _tree(model, requests, row_tokens, flex=read_model(model).flex) if packed else _batch(model, requests)
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
    logps, likeliest = read_logps(model, _tree_states(model, row, None, flex=flex), row.readers, row.targets)
    ends = np.cumsum([len(ids) - start for ids, start in own])[:-1]
    stand = np.split(np.argsort(row.places), ends)  # of each request of the row, where its tokens were read
    order = np.concatenate([stand[place] for place in np.argsort(bin_.sequences)])
    back = torch.from_numpy(order).to(logps.device)
    return logps[back], likeliest[back]


Read = tuple[np.ndarray, "torch.Tensor", "torch.Tensor", int]
"""Places in the bin's completions, their log-probabilities, whether they are the likeliest, tokens computed."""


def _tree(model: "PreTrainedModel", requests: Sequence[Request], row_tokens: int, *, flex: bool) -> Iterator[Read]:
    from transformers.cache_utils import DynamicCache

    rows = plan_rows(requests, row_tokens)
    cache = DynamicCache() if len(rows) > 1 else None
    for row in rows:
        if cache is not None and len(row.columns) > len(row.tokens):
            _keep(cache, row.kept)
        elif cache is not None:
            cache = DynamicCache()  # nothing of the row before is seen
        states = _tree_states(model, row, cache, flex=flex)
        if len(row.readers):
            yield row.places, *read_logps(model, states, row.readers, row.targets), len(row.tokens)
        else:
            yield row.places, *_nothing(states), len(row.tokens)


def _tree_states(
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


def _batch(model: "PreTrainedModel", requests: Sequence[Request]) -> Iterator[Read]:
    """Compute sequences side by side, padded on the right.

    Where the head cannot be run by itself every position goes through it: then so many sequences at
    a time that their logits keep to HEAD_BYTES, or one that is larger by itself.
    """
    import torch

    length = max(len(ids) for ids, _ in requests)
    split = read_model(model).split_head
    size = len(requests) if split else max(1, block_rows(model, model.device) // length)
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
        if split:
            states = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
            logps, likeliest = read_logps(model, states, readers, targets)
        else:
            logits = model(**inputs).logits.flatten(0, 1)[torch.from_numpy(readers).to(model.device)]
            logps, likeliest = logits_to_logps(logits, torch.from_numpy(targets).to(logits.device))
        yield np.arange(place, place + len(readers)), logps, likeliest, ids.size
        place += len(readers)


def _nothing(states: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    return states.new_zeros(0, dtype=torch.float32), states.new_zeros(0, dtype=torch.bool)


_readings: dict[str, Reading] = {}


def read_model(model: "PreTrainedModel", length: int = PROBE) -> Reading:
    """Measure how a model can be read, as deep as `length` tokens; remembered on disk, as a probe takes seconds.

    A probe of random tokens is computed as a tree cut into rows, and as plain sequences. The tree is
    right where it differs no more than TOLERANCE anywhere, or on average (root mean square) no more than
    ROUNDING times what a plain forward differs from itself in two pieces: rounding grows with depth.
    Beyond the length where it is not, shorter ones are tried. What is beyond a window that the config
    names is not tried: weights may hide there what others show.
    """
    name = _identity(model)
    memo = cache_folder() / "readings" / f"{name}.json"
    if name not in _readings and memo.exists():
        _readings[name] = Reading(**json.loads(memo.read_text()))
    known = _readings.get(name)
    if known is None or (length > known.probed and known.packed_length == known.probed):
        _readings[name] = known = _probe(model, max(PROBE, length))
        content = json.dumps(asdict(known))
        write_atomically(memo, lambda temporary: temporary.write_text(content))
    return known


def _identity(model: "PreTrainedModel") -> str:
    """Name what a probe's result depends on: architecture, weights, dtype, device, tolerance, the libraries."""
    import torch
    import transformers

    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_NUMBERS}
    what = [type(model).__name__, config, model.config._attn_implementation, str(model.dtype), model.device.type]
    what += [_weights_hash(model), TOLERANCE[str(model.dtype).removeprefix("torch.")]]
    text = json.dumps([*what, torch.__version__, transformers.__version__], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _weights_hash(model: "PreTrainedModel") -> str:
    """Hash SLICE numbers from the middle of every weight: milliseconds that tell models of one config apart."""
    import torch

    slices: dict[torch.device, list[torch.Tensor]] = {}
    for weight in model.parameters():
        if weight.device.type != "meta":  # those that lie in a file until their turn
            middle = weight.detach().reshape(-1)[weight.numel() // 2 :][:SLICE]
            slices.setdefault(weight.device, []).append(middle.float())
    content = [torch.cat(parts).cpu().numpy().tobytes() for parts in slices.values()]  # a copy per device
    return xxhash.xxh3_128_hexdigest(b"".join(content))


def _probe(model: "PreTrainedModel", length: int) -> Reading:
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, 2 * length + PROBE)
    with torch.inference_mode():
        try:
            logits = model(input_ids=torch.from_numpy(ids[None, :PROBE]).to(model.device), use_cache=False).logits[0]
            split = run_head(model, _states(model, ids[:PROBE]))
        except UNREADABLE as error:
            _note_unreadable(model, error)
            return Reading(0, length, split_head=False)
        allowed = TOLERANCE[str(model.dtype).removeprefix("torch.")]
        if (logits - split).abs().max() > allowed:
            return Reading(0, length, split_head=False)
        for flex in (True, False) if model.device.type in FLEX else (False,):
            fits = min(length, window_length(model))
            while fits and not all(
                _tree_is_right(model, ids, depth, allowed, flex=flex) for depth in {min(fits, PROBE), fits}
            ):
                fits = fits // 2 if fits > PROBE // 2 else 0
            if fits:
                return Reading(fits, length, split_head=True, flex=flex)
    return Reading(0, length, split_head=True)


def _tree_is_right(model: "PreTrainedModel", ids: np.ndarray, length: int, allowed: float, *, flex: bool) -> bool:
    """Compare a sequence in a tree of three levels, cut into rows, with the sequence alone."""
    branches = [ids[: part * length // 3] for part in (2, 1)]
    siblings = [np.concatenate([branch, ids[length:]])[: len(branch) + PROBE // 3] for branch in branches]
    requests: list[Request] = [(ids[:length], 1), *((sibling, 1) for sibling in siblings if len(sibling) <= length)]
    try:
        [bin_] = plan_bins(requests, 2 * length + PROBE)
        own = [requests[place] for place in bin_.sequences]
        together = np.zeros(sum(len(sequence) - 1 for sequence, _ in own), dtype=np.float32)
        for places, logps, _, _ in _tree(model, own, max(1, length // 2), flex=flex):
            together[places] = logps.float().cpu().numpy()
    except UNREADABLE as error:
        _note_unreadable(model, error)
        return False
    ends = np.cumsum([len(sequence) - 1 for sequence, _ in own])[:-1]
    for place, packed in zip(bin_.sequences, np.split(together, ends), strict=True):
        if place and length > PROBE:  # the longest tells of depth, a short probe of branches
            continue
        tokens = np.asarray(requests[place][0])
        alone = _logps(model, tokens, _states(model, tokens))
        gaps = packed - alone
        if not np.abs(gaps).max() <= allowed and not _size(gaps) <= ROUNDING * _rounding(model, tokens, alone):
            return False
    return True


def _logps(model: "PreTrainedModel", tokens: np.ndarray, states: "torch.Tensor") -> np.ndarray:
    logps, _ = read_logps(model, states, np.arange(len(tokens) - 1), tokens[1:])
    return logps.float().cpu().numpy()


def _rounding(model: "PreTrainedModel", tokens: np.ndarray, alone: np.ndarray) -> float:
    """Measure how far a plain forward is from itself in two pieces, the second reading the first's cache: `_size`."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    try:
        pieces = [
            model.base_model(
                input_ids=torch.from_numpy(np.asarray(piece, dtype=np.int64))[None].to(model.device),
                past_key_values=cache, use_cache=True,
            ).last_hidden_state[0]
            for piece in np.array_split(tokens, 2)
        ]  # fmt: skip
    except UNREADABLE as error:
        _note_unreadable(model, error)
        return 0.0
    return _size(_logps(model, tokens, torch.cat(pieces)) - alone)


def _size(gaps: np.ndarray) -> float:
    """Root mean square, nats a token: steadier than the largest of thousands."""
    return float(np.sqrt(np.mean(np.square(gaps, dtype=np.float64))))


def _note_unreadable(model: "PreTrainedModel", error: Exception) -> None:
    """Say why a model is not read in trees; want of memory is no such reason, and must not be remembered as one."""
    if "memory" in str(error):
        raise SdpoError(
            f"Memory ran out in a probe of how {type(model).__name__} can be read. Set score.max_length lower, or "
            "score.dtype to bfloat16."
        ) from error
    log.info("%s cannot be read in prefix trees: %s", type(model).__name__, " ".join(str(error).split())[:200])


def _states(model: "PreTrainedModel", ids: np.ndarray) -> "torch.Tensor":
    """Run one plain sequence through the model up to its head: (tokens, hidden)."""
    import torch

    inputs = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(model.device)
    return model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0]


def window_length(model: "PreTrainedModel") -> int:
    """Longest sequence that lies within every window the config names: a tree's mask knows of none."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    windows = [
        getattr(config, name, None)
        for name, kind in WINDOWS.items()
        if kinds is None or kind in kinds  # a window that no layer uses is none
    ]
    return min((window for window in windows if isinstance(window, int) and window > 1), default=2**31)
