"""How much work scoring was, how near the floor, and how near what the device can do."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from sdpo_data import workers
from sdpo_data.tree import Request, count_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEER_BATCH = 16  # answers per padded batch, as they come: of 8 pairs, TRL 1.16's default reference pass


@dataclass
class Work:
    """An account of requests answered: what was computed, and what computing them apart would have cost."""

    known: int = 0
    """Answers that came from the store."""
    computed: int = 0
    """Answers computed."""
    tokens: int = 0
    """Tokens computed for them."""
    alone: int = 0
    """Tokens if every answer were computed with its own prompt, without padding."""
    padded: int = 0
    """Tokens if they were computed so in batches of PEER_BATCH, padded to the longest."""
    floor: int = 0
    """Tokens if every shared prefix were computed once: nothing exact can do with fewer."""
    reads: int = 0
    """Completion tokens, each of which needs the head once."""
    seconds: float = 0.0
    """Of this process."""
    own_tokens: int = 0
    """Tokens this process computed."""
    backbone: int = 0
    """Weights that a token is multiplied with before the head (of a mixture of experts: all of them)."""
    head: int = 0
    """Weights of the head."""
    device_flops: float = 0.0
    """Per second, in this dtype: measured with one large matrix product."""

    def add_plan(self, requests: Sequence[Request], tokens: int, known: int) -> None:
        """Count what is to be computed, in the order it was asked for, and what is known."""
        self.known += known
        self.computed += len(requests)
        self.tokens += tokens
        lengths = [len(ids) for ids, _ in requests]
        self.alone += sum(lengths)
        batches = (lengths[first : first + PEER_BATCH] for first in range(0, len(lengths), PEER_BATCH))
        self.padded += sum(len(batch) * max(batch) for batch in batches)
        self.floor += count_tokens(requests)
        self.reads += sum(len(ids) - start for ids, start in requests)

    @contextlib.contextmanager
    def timed(self, model: "PreTrainedModel", tokens: int) -> Iterator[None]:
        """Time the computing of `tokens` tokens by this process."""
        if not tokens:
            yield
            return
        self.device_flops = self.device_flops or measure_flops(model)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        apart = {id(part.weight) for part in (head, embedding) if part is not None}
        matrices = [weight for weight in model.parameters() if weight.dim() > 1 and id(weight) not in apart]
        self.backbone = sum(weight.numel() for weight in matrices)
        self.head = head.weight.numel() if head is not None else 0
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.own_tokens += tokens

    def describe_plan(self) -> str:
        """Say in a few words what sharing saves, and what padding would have cost besides."""
        return (
            f"score ({self.tokens / self.floor:.2f} of the floor, {self.alone - self.tokens:,} tokens saved, "
            f"{self.padded - self.alone:,} of padding avoided)"
        )

    def describe_rate(self, speed: float) -> str:
        """Say what share of the device's measured rate so many tokens per second are."""
        if not self.device_flops:
            return ""
        return f", {speed * self.flops_per_token / self.device_flops:.0%} of matmul"

    @property
    def flops_per_token(self) -> float:
        """Multiplications and additions with weights, the head's spread over all tokens."""
        return 2.0 * (self.backbone + self.head * self.reads / self.tokens)

    def describe(self, scores: pl.DataFrame) -> Iterator[str]:
        """Say it in a line or two.

        Args:
            scores: SCORES in data order, of all that was asked for.
        """
        yield f"scored {scores.height:,} pairs: {self.known:,} answers from the store, {self.computed:,} computed"
        if not self.own_tokens:
            return
        speed = self.own_tokens / self.seconds
        several = f" on each of {workers.count()} processes" if workers.count() > 1 else ""
        yield (
            f"{speed:,.0f} tokens/s{several} over {self.seconds:,.1f} s, "
            f"{speed * self.flops_per_token / self.device_flops:.0%} of the {self.device_flops / 1e9:,.0f} GFLOP/s "
            f"measured in a plain matrix product; {self.tokens:,} tokens computed, {self.tokens / self.floor:.2f} of "
            f"the floor ({self.floor:,}; {self.alone:,} without sharing, {self.padded:,} in padded batches of "
            f"{PEER_BATCH})"
        )


def measure_flops(model: "PreTrainedModel") -> float:
    """Time one large matrix product in the model's dtype on its device: operations per second."""
    import torch

    size, wide = (1024, 2048) if model.device.type == "cpu" else (8192, 8192)
    with torch.inference_mode():
        left = torch.ones((size, wide), dtype=model.dtype, device=model.device)
        right = torch.ones((wide, wide), dtype=model.dtype, device=model.device)
        times = []
        for _ in range(4):  # the first warms up
            _wait_for(model)
            started = time.perf_counter()
            torch.mm(left, right)
            _wait_for(model)
            times.append(time.perf_counter() - started)
    return 2.0 * size * wide * wide / min(times)


def _wait_for(model: "PreTrainedModel") -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
