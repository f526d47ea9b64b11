"""How a model can be read: measured against a plain forward, not looked up by name.

A model whose trees are not what its sequences are alone (ALiBi, recurrent state, no position ids,
beyond a sliding window) is read in padded batches; a probe of random tokens finds out.
"""

import json
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from sdpo_data.assets import cache_folder
from sdpo_data.head import read_logps, run_head
from sdpo_data.models import NOT_NUMBERS
from sdpo_data.passes import is_out_of_memory, plain_states, tree_pass
from sdpo_data.run import write_atomically
from sdpo_data.tables import SdpoError
from sdpo_data.tree import Request, plan_bins

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}  # nats a token, at the probe
FLEX = ("cuda",)  # devices on which FlexAttention is tried; dense masks in short rows elsewhere
PROBE = 24  # tokens of the smallest probe
ROUNDING = 3  # times what a plain forward differs from itself, which is allowed to a tree too
MOST = 0.99  # of the tokens must keep to that; a few answer to the last bit with a thousand times as much
MUCH = 10  # times TOLERANCE is no rounding of most tokens
SPIKE = 100  # times what most may differ by is no rounding of a single token
STRETCHED = ("longrope", "dynamic")  # positions that depend on the length read, past that of training
SLICE = 4  # numbers of each weight that tell it from another model's
WINDOWS = {  # settings that name one, tokens -> the kind of layer it is for
    "sliding_window": "sliding_attention",
    "attention_chunk_size": "chunked_attention",
}
UNREADABLE = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)  # from what knows no trees


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


_readings: dict[str, Reading] = {}


def read_model(model: "PreTrainedModel", length: int = PROBE) -> Reading:
    """Measure how a model can be read, as deep as `length` tokens; remembered on disk, as a probe takes seconds.

    A probe of random tokens is computed as a tree cut into rows, and as plain sequences. The tree is
    right where MOST tokens differ by no more than TOLERANCE, or than ROUNDING times what a plain forward
    differs from itself in two pieces if that is not MUCH, and none by SPIKE times that. (Of 2,436
    random tokens, SmolLM2 and what was trained from it move at three to six by 1e-4 to 1e-3 nats, where
    float32 itself is 2e-3 off.)
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
    """Name what a probe's result depends on: architecture, weights, dtype, device, its limits, the libraries."""
    import torch
    import transformers

    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_NUMBERS}
    what = [type(model).__name__, config, model.config._attn_implementation, str(model.dtype), model.device.type]
    what += [_weights_hash(model), window_length(model)]
    what += [TOLERANCE[str(model.dtype).removeprefix("torch.")], ROUNDING, MOST, MUCH, SPIKE]
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
            split = run_head(model, plain_states(model, ids[:PROBE]))
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
        for places, logps, _, _ in tree_pass(model, own, max(1, length // 2), flex=flex):
            together[places] = logps.float().cpu().numpy()
    except UNREADABLE as error:
        _note_unreadable(model, error)
        return False
    ends = np.cumsum([len(sequence) - 1 for sequence, _ in own])[:-1]
    for place, packed in zip(bin_.sequences, np.split(together, ends), strict=True):
        if place and length > PROBE:  # the longest tells of depth, a short probe of branches
            continue
        tokens = np.asarray(requests[place][0])
        alone = _logps(model, tokens, plain_states(model, tokens))
        gaps = np.abs(packed - alone)
        most = allowed
        if allowed < _most(gaps) <= MUCH * allowed:  # beyond, the pieces may be wrong in the same way
            most = max(most, ROUNDING * _rounding(model, tokens, alone))
        if not (_most(gaps) <= most and gaps.max() <= SPIKE * most):
            return False
    return True


def _logps(model: "PreTrainedModel", tokens: np.ndarray, states: "torch.Tensor") -> np.ndarray:
    logps, _ = read_logps(model, states, np.arange(len(tokens) - 1), tokens[1:])
    return logps.float().cpu().numpy()


def _rounding(model: "PreTrainedModel", tokens: np.ndarray, alone: np.ndarray) -> float:
    """Measure how far a plain forward is from itself in two pieces, the second reading the first's cache: `_most`."""
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
        if is_out_of_memory(error):
            _note_unreadable(model, error)
        return 0.0  # what cannot be cached tells nothing of rounding
    return _most(np.abs(_logps(model, tokens, torch.cat(pieces)) - alone))


def _most(gaps: np.ndarray) -> float:
    """Give what MOST gaps do not exceed, nats a token; of few gaps, the largest; not a number if one is none."""
    return float(np.quantile(gaps, MOST, method="higher"))


def _note_unreadable(model: "PreTrainedModel", error: Exception) -> None:
    """Say why a model is not read in trees; want of memory is no such reason, and must not be remembered as one."""
    if is_out_of_memory(error):
        raise SdpoError(
            f"Memory ran out in a probe of how {type(model).__name__} can be read. Set score.max_length lower, or "
            "score.dtype to bfloat16."
        ) from error
    log.info("%s cannot be read in prefix trees: %s", type(model).__name__, " ".join(str(error).split())[:200])


def window_length(model: "PreTrainedModel") -> int:
    """Longest sequence that lies within every window the config names, and within positions that do not change.

    A tree's mask knows of no window, and its rows would each get the positions of their own length.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    limits = [
        getattr(config, name, None)
        for name, kind in WINDOWS.items()
        if kinds is None or kind in kinds  # a window that no layer uses is none
    ]
    rope = getattr(config, "rope_parameters", None) or {}
    names = ("original_max_position_embeddings", "max_position_embeddings")
    whole = next((length for name in names if (length := getattr(config, name, None))), 0)
    ways = [rope, *(of_kind for of_kind in rope.values() if isinstance(of_kind, dict))]
    stretched = [way for way in ways if way.get("rope_type") in STRETCHED]
    limits += [way.get("original_max_position_embeddings") or whole for way in stretched]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 1), default=2**31)
