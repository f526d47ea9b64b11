"""Answer requests for log-probabilities: from the score store, or by the prefix engine, bin by bin."""

import contextlib
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from sdpo_data import workers
from sdpo_data.console import progress
from sdpo_data.passes import is_out_of_memory
from sdpo_data.prefix import plan_work, row_tokens, score_bin
from sdpo_data.probe import read_model, window_length
from sdpo_data.store import PLAN, SHARD, ScoreStore
from sdpo_data.tables import SdpoError
from sdpo_data.throughput import Work
from sdpo_data.tree import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Scorer:
    """A model ready to score, with what it was asked before and an account of its work."""

    model: "PreTrainedModel"
    key: str
    store: ScoreStore
    token_budget: int | None = None
    token_logps: bool = False
    autocast: str | None = None
    """Compute in this dtype though the weights have another, as mixed-precision training does."""
    work: Work = field(default_factory=Work)

    @property
    def dtype(self) -> str:
        """What the numbers depend on beside the weights: their dtype, or that of the autocast."""
        return f"{self.autocast}_autocast" if self.autocast else str(self.model.dtype).removeprefix("torch.")

    def precision(self) -> "contextlib.AbstractContextManager[Any]":
        """Give the context to compute in."""
        if not self.autocast:
            return contextlib.nullcontext()
        import torch

        return torch.autocast(self.model.device.type, getattr(torch, self.autocast))


def complete(requests: dict[str, Request], scorer: Scorer) -> pl.DataFrame:
    """Answer requests from the store, and compute and keep what it does not hold.

    The bins of an unfinished run come first, as they were; the rest is planned anew. Of several
    processes each takes every n-th bin; what they have done they read from the store.

    Args:
        requests: `tree.request_key` -> request.

    Returns:
        SHARD rows, one per request.
    """
    store, keys = scorer.store, list(requests)
    known = _believed(store.find(keys, token_logps=scorer.token_logps), requests, scorer)
    plan = workers.share(_plan(requests, set(known["request"]), scorer))
    bins = plan.partition_by("bin", maintain_order=True)
    missing = plan["request"].to_list()
    planned = set(missing)
    asked = [request for key, request in requests.items() if key in planned]
    scorer.work.add_plan(asked, sum(bin_["tokens"][0] for bin_ in bins), known.height)
    if workers.is_main() and len(bins) > 1:
        store.begin(plan)
    own = bins[workers.rank() :: workers.count()]
    tokens = sum(bin_["tokens"][0] for bin_ in own)
    bar = progress(scorer.work.describe_plan() if missing else "score", tokens, "tokens", scorer.work.describe_rate)
    with bar as advance, scorer.work.timed(scorer.model, tokens):
        for bin_ in own:
            rows = _compute(bin_, requests, scorer, advance)
            if rows["logp"].is_finite().all():
                store.write(rows)
            else:  # never kept; the caller says which pair it is
                known = pl.concat([known, rows])
    workers.wait()
    if missing:
        store.refresh()
        if workers.is_main():
            store.finish()
        known = pl.concat([known, store.find(missing, token_logps=scorer.token_logps)])
    lost = len(requests) - known["request"].n_unique()
    if lost and workers.count() > 1:  # a process by itself has all that it computed
        raise SdpoError(
            f"{lost:,} of {len(requests):,} answers are not in this process's score store {store.folder}, though "
            "another process has or computed them. Set score.store to one folder that all processes share; or, if that "
            "process says that a log-probability is not finite, do what it says."
        )
    return known.unique("request", maintain_order=True)


def _plan(requests: dict[str, Request], known: set[str], scorer: Scorer) -> pl.DataFrame:
    """PLAN rows, with the bins' tokens, of what is not known: unfinished bins first, then new ones."""
    missing = {key: request for key, request in requests.items() if key not in known}
    if not missing:
        return PLAN.to_frame()
    size = row_tokens(scorer.model, scorer.token_budget)
    wanted = pl.col("request").is_in(list(missing)) & (pl.col("row_tokens") == size)
    begun = _exact(scorer.store.unfinished().filter(wanted.all().over("bin")), requests, scorer)
    going_on = set(begun["request"])
    rest = [key for key in missing if key not in going_on]
    places = plan_work(scorer.model, [missing[key] for key in rest], scorer.token_budget) if rest else []
    rows = []
    for bin_ in places:
        own = [rest[place] for place in bin_.sequences]
        name = hashlib.sha256(f"{size} {bin_.packed} {' '.join(own)}".encode()).hexdigest()[:32]
        rows += [(name, place, key, bin_.packed, size, bin_.tokens) for place, key in enumerate(own)]
    return pl.concat([begun, pl.DataFrame(rows, PLAN, orient="row")])


def _believed(known: pl.DataFrame, requests: dict[str, Request], scorer: Scorer) -> pl.DataFrame:
    """Leave out SHARD rows that do not say how they were computed, where that matters: past a sliding window.

    Such a tree would be wrong, and a probe could overlook it once. All others are what they would be today.
    """
    past = pl.Series(
        [len(requests[key][0]) > window_length(scorer.model) for key in known["request"]], dtype=pl.Boolean
    )
    return known.filter(~(past & known["packed"].is_null()))


def _exact(begun: pl.DataFrame, requests: dict[str, Request], scorer: Scorer) -> pl.DataFrame:
    """Leave out bins of PLAN rows that would be computed as trees longer than the model can be read in today."""
    if begun.is_empty():
        return begun
    lengths = [len(requests[key][0]) for key in begun["request"]]
    longest = read_model(scorer.model, max(lengths)).packed_length
    too_long = begun["packed"] & (pl.Series(lengths, dtype=pl.Int64) > longest)
    return begun.filter(~pl.col("bin").is_in(begun.filter(too_long)["bin"].to_list()))


def _compute(bin_: pl.DataFrame, requests: dict[str, Request], scorer: Scorer, advance: Any) -> pl.DataFrame:
    first = bin_.row(0, named=True)
    own = [requests[key] for key in bin_["request"]]
    try:
        with scorer.precision():
            completions = score_bin(scorer.model, own, first["row_tokens"], advance, packed=first["packed"])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SdpoError(
            f"Memory ran out in a forward pass of {first['row_tokens']:,} tokens. Set score.token_budget to "
            f"{first['row_tokens'] // 2:,}, or score.dtype to bfloat16; what was scored before is kept."
        ) from error
    return bin_.select(
        "request",
        logp=pl.Series([float(completion.logps.sum(dtype=np.float64)) for completion in completions], dtype=pl.Float64),
        tokens=pl.Series([len(completion.logps) for completion in completions], dtype=pl.Int32),
        bin="bin",
        place="place",
        row_tokens="row_tokens",
        packed="packed",
        token_logps=pl.Series(
            [completion.logps if scorer.token_logps else None for completion in completions], dtype=SHARD["token_logps"]
        ),
    )
