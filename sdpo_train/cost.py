"""What a unit of training will need before it runs: memory from the model's file headers, time from a measured rate.

No torch. Both are estimates: what was measured of them stands in LOG.md.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl

from sdpo_data.assets import model_folder
from sdpo_data.tables import SdpoError

MASTER = 4  # bytes of a weight, of its gradient and of each of Adam's two moments: all float32
WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number of the forward pass
KEPT_OF_HIDDEN = {"float32": 40, "bfloat16": 34}
"""Bytes a layer keeps per token and hidden unit: what two norms get and give, in float32 always, what attention and
feed-forward part get, q, k and v of every head, and what attention gives. Counted with PyTorch's hooks for saved
tensors on Llama of transformers 5.23 (Mistral and Qwen2 are alike); beside them four vectors of the feed-forward width.
"""
PROCESS = {"cpu": 2**30, "cuda": 2**29}  # bytes before any model: Python with torch and TRL, or a GPU's context
SPARE = 0.1  # share of the count by which a full fine-tune was above it
SPARE_LORA = 0.45  # with LoRA on a CPU, where it was above it by more; why was not found: saved tensors are as counted
TILE = 2**28  # bytes of logits at once: the head runs over completion tokens in tiles
Device = Literal["cpu", "cuda"]
TIMES_FORWARD = 3.0
"""Forward and backward against the forward alone: arXiv 2203.15556, appendix F."""
AT_MOST = 16.0
"""Highest measured (LOG.md): padding, unshared prompts, updates, loading and saving, and other work on the machine."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides its cost, from config.json and the headers of its safetensors files."""

    parameters: int
    """Tied weights once."""
    matrices: tuple[tuple[int, int], ...]
    """Shapes of the layers' matrices, which LoRA adapts: neither embeddings nor head."""
    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward part."""


@dataclass(frozen=True)
class Unit:
    """What of a unit of work decides its memory: settings as TrainConfig has them, and its longest row."""

    row_tokens: int
    """Tokens of a forward pass at most, where no pair has more: train.token_budget or what suits the device."""
    longest: int
    """Tokens of the longest prompt + answer: at most max_length."""
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Device = "cpu"


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the peak, per part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, a block's logits included."""
    cast: int
    """Weights a second time, in bfloat16, where the forward pass is in it."""
    saving: int
    """Weights a second time, as bytes while they are saved from RAM; nothing is kept for a backward pass then."""
    process: int
    spare: int
    """What measured peaks were above the count of the others, at most (LOG.md)."""
    reference: int
    """Not needed here, and not in the total: what a reference model in memory would add."""

    @property
    def total(self) -> int:
        return self.spare + self._counted

    @property
    def _counted(self) -> int:
        work = self.gradients + self.activations + self.cast
        return self.process + self.weights + self.optimizer + max(work, self.saving)


@dataclass(frozen=True)
class Duration:
    """Seconds, from at best to at most, and what that is told from."""

    low: float
    high: float
    basis: str


def read_shape(model: str | Path) -> Shape:
    """Read what decides the cost of a model; no weights are read.

    Args:
        model: folder, hub id, or embedded:NAME.

    Raises:
        SdpoError: there is no such model, or its files do not say it.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    folder = model_folder(str(model))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_text_config()
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        layers, hidden = config.num_hidden_layers, config.hidden_size
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise SdpoError(f"What model {model} costs cannot be read from {folder}: {said}") from error
    if getattr(config, "tie_word_embeddings", False) and len(shapes) > 1:
        shapes.pop("lm_head.weight", None)
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and _is_in_a_layer(name)]
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return Shape(parameters, tuple(matrices), layers, hidden, inner or 4 * hidden)  # type: ignore[arg-type]


def estimate_memory(shape: Shape, unit: Unit) -> Memory:
    """Estimate a unit's memory at its peak, on one device, without sharding.

    What a layer keeps for its backward pass is that of the usual decoder (two norms, attention
    without its matrix in memory, a gated feed-forward part); of a mixture of experts all are
    weights, and one is activations.

    Source: 16 bytes a weight for training in float32 with Adam: arXiv 1910.02054, section 3, less
        their half-precision copies. Activations counted: see KEPT_OF_HIDDEN.
    """
    adapted = unit.lora_rank * sum(rows + columns for rows, columns in shape.matrices)
    trained = adapted if unit.lora_rank else shape.parameters
    weights = MASTER * (shape.parameters + adapted)
    cast = sum(rows * columns for rows, columns in shape.matrices) * 2 if unit.dtype == "bfloat16" else 0
    memory = Memory(
        weights=weights,
        gradients=MASTER * trained,
        optimizer=2 * MASTER * trained,
        activations=_activations(shape, unit) + TILE,
        cast=cast,
        saving=MASTER * shape.parameters if unit.device == "cpu" else 0,
        process=PROCESS[unit.device],
        spare=0,
        reference=MASTER * shape.parameters if not unit.lora_rank else 0,
    )
    share = SPARE_LORA if unit.lora_rank and unit.device == "cpu" else SPARE
    return replace(memory, spare=round(share * memory._counted))


def estimate_duration(
    tokens: int,
    *,
    scored_again: int = 0,
    scored: tuple[int, float] | None = None,
    trained: tuple[int, float] | None = None,
) -> Duration | None:
    """Estimate how long a unit takes.

    Args:
        tokens: prompt + chosen + rejected tokens, all epochs.
        scored_again: such tokens that take a forward pass before.
        scored: such tokens and seconds of scoring the pairs: of SCORES and lineage.json.
        trained: such tokens and seconds of finished steps: of STEPS. These tell more, and go first.

    Returns:
        None where nothing was measured.
    """
    if trained and trained[0] and trained[1]:
        seconds = (tokens + scored_again / TIMES_FORWARD) * trained[1] / trained[0]
        return Duration(0.75 * seconds, 1.5 * seconds, f"finished steps: {trained[0] / trained[1]:,.0f} tokens/s")
    if scored and scored[0] and scored[1]:
        token = scored[1] / scored[0]
        basis = (
            f"{TIMES_FORWARD:g} to {AT_MOST:g} times scoring at {scored[0] / scored[1]:,.0f} tokens/s; too low if "
            "those scores came from the store"
        )
        low, high = ((times * tokens + scored_again) * token for times in (TIMES_FORWARD, AT_MOST))
        return Duration(low, high, basis)
    return None


def plan_unit(
    shape: Shape,
    scores: pl.DataFrame,
    unit: Unit,
    *,
    epochs: int,
    batch_pairs: int,
    available: int,
    scored_again: int = 0,
    scored: tuple[int, float] | None = None,
    trained: tuple[int, float] | None = None,
) -> dict[str, Any]:
    """Estimate all of one unit: a row of --plan, which JSON can hold.

    Args:
        scores: SCORES of the pairs it trains on.
        unit: its settings; `longest` is max_length, and the longest row counts where that is less.
        available: bytes that can be had on the device.
        scored_again: see `estimate_duration`, like `scored` and `trained`.

    Returns:
        pairs, tokens (all epochs), scored_again (tokens), updates, longest (tokens), memory and its parts
        (bytes), seconds (low and high) with what they are told from, and advice: null where unknown or not
        needed.
    """
    unit = replace(unit, longest=min(unit.longest, longest_row(scores)))
    tokens = epochs * count_tokens(scores)
    memory = estimate_memory(shape, unit)
    duration = estimate_duration(tokens, scored_again=scored_again, scored=scored, trained=trained)
    return {
        "pairs": scores.height,
        "tokens": tokens,
        "scored_again": scored_again,
        "updates": epochs * math.ceil(scores.height / batch_pairs),
        "longest": unit.longest,
        "memory": memory.total,
        "memory_of": asdict(memory),
        "seconds": None if duration is None else [duration.low, duration.high],
        "basis": None if duration is None else duration.basis,
        "advice": advise(shape, unit, available),
    }


def count_tokens(scores: pl.DataFrame) -> int:
    """Prompt, chosen and rejected tokens of SCORES together, the prompt once."""
    return int(scores.select(pl.sum_horizontal("prompt_tokens", "chosen_tokens", "rejected_tokens").sum()).item())


def longest_row(scores: pl.DataFrame) -> int:
    """Tokens of the longest prompt + answer of SCORES."""
    length = pl.col("prompt_tokens") + pl.max_horizontal("chosen_tokens", "rejected_tokens")
    return int(scores.select(length.max()).item())


def available_memory() -> int:
    """Bytes of RAM that can still be had; of a GPU ask torch."""
    import psutil

    return int(psutil.virtual_memory().available)


def advise(shape: Shape, unit: Unit, available: int) -> str | None:
    """Say which settings to change where a unit does not fit, in the order of what they cost.

    They are taken one upon another until it fits: token_budget down to one pair (costs little), then
    gradient_checkpointing (a third more time), then lora_rank (another kind of training), then
    max_length (cuts or drops pairs).

    Args:
        available: bytes that can be had on the device.

    Returns:
        A sentence; None where it fits.
    """
    needed = estimate_memory(shape, unit).total
    if needed <= available:
        return None
    said = f"It needs about {_gib(needed)} GiB, and {_gib(available)} are available."
    steps: list[str] = []
    for name, value, changed in list_savings(unit):
        total = estimate_memory(shape, changed).total
        if total >= needed:
            continue
        steps.append(f"train.{name}: {value} ({_gib(total)} GiB)")
        unit, needed = changed, total
        if total <= available:
            return f"{said} Set {', then '.join(steps)}."
    tried = f" Even with {', '.join(steps)} it does not fit:" if steps else ""
    return f"{said}{tried} take a smaller model, or a device with more memory."


def list_savings(unit: Unit) -> Iterator[tuple[str, str, Unit]]:
    """Give the settings that save memory, those not made yet, with values to try: the cheapest first.

    Yields:
        Name of the setting in section train, its value, and the unit with it and all before it.
    """
    if unit.row_tokens > 2 * unit.longest:
        unit = replace(unit, row_tokens=2 * unit.longest)
        yield "token_budget", str(unit.row_tokens), unit
    if not unit.gradient_checkpointing:
        unit = replace(unit, gradient_checkpointing=True)
        yield "gradient_checkpointing", "true", unit
    if not unit.lora_rank:
        unit = replace(unit, lora_rank=16)
        yield "lora_rank", "16", unit
    if unit.longest > 1:
        yield "max_length", str(unit.longest // 2), replace(unit, longest=unit.longest // 2)


def _activations(shape: Shape, unit: Unit) -> int:
    """Bytes kept for the backward pass of the largest forward pass: the longest pair, if its answers share nothing."""
    tokens = max(unit.row_tokens, 2 * unit.longest)
    width = WIDTH[unit.dtype]
    layer = KEPT_OF_HIDDEN[unit.dtype] * shape.hidden + 4 * width * shape.inner + width * unit.longest  # its mask
    if unit.gradient_checkpointing:
        return tokens * (shape.layers * shape.hidden * MASTER + layer)
    return tokens * shape.layers * layer


def _is_in_a_layer(name: str) -> bool:
    """Whether a matrix stands in a layer: those outside are embeddings and the head."""
    return any(part.isdigit() for part in name.split("."))


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f}"
