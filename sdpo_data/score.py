"""Score every pair under one model: the log-probabilities of both answers, reference-free."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
import pydantic

from sdpo_data.config import Command, Settings, read_command
from sdpo_data.console import command, print_table, progress, say
from sdpo_data.difficulty import describe_scores
from sdpo_data.encode import Truncation, encode_pairs
from sdpo_data.models import load_model, load_tokenizer, model_key
from sdpo_data.pairs import PairsConfig, make_pairs
from sdpo_data.prefix import score_completions
from sdpo_data.tables import DROPPED, PAIRS, SCORES, SdpoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = str | Path | PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]

log = logging.getLogger(__name__)


class ScoreConfig(Settings):
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward pass. In bfloat16 log-probs move with the shape of the batch."""
    max_length: int = pydantic.Field(1024, ge=2)
    """Longest prompt + answer, tokens."""
    truncation: Truncation = "drop"
    """A pair with a longer side: drop it (counted), or cut that answer's end as TRL does."""
    token_budget: int = pydantic.Field(2048, ge=1)
    """Tokens per packed row at most. Changes speed and memory; the numbers only within float noise."""


def score_pairs(pairs: pl.DataFrame, model: "Model", config: ScoreConfig | None = None) -> pl.DataFrame:
    """Compute the summed log-probability of both answers of every pair under one model.

    Args:
        pairs: PAIRS frame.
        model: folder, hub id, embedded:NAME, a loaded model, or (model, tokenizer).
        config: dtype is used where the model is loaded here.

    Returns:
        SCORES frame, in the order of `pairs`; log-probabilities in nats. Pairs that cannot be
        scored (too long, an answer without tokens) are left out and logged with their reasons.

    Raises:
        SdpoError: no pair can be scored, or a log-probability is not finite.

    Source: log pi(y | x) of DPO (arXiv 2305.18290), summed over completion tokens, EOS included.
    """
    scores, _ = score_and_drop(pairs, model, config or ScoreConfig())
    return scores


def score_and_drop(pairs: pl.DataFrame, model: "Model", config: ScoreConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Do what `score_pairs` does, and return what was left out as a DROPPED frame beside it."""
    loaded, tokenizer, key = _loaded(model, config.dtype)
    encoded = encode_pairs(pairs, tokenizer, config.max_length, config.truncation)
    usable = encoded.filter(pl.col("problem").is_null())
    if usable.is_empty():
        reason = encoded["problem"][0] if encoded.height else "there is none"
        raise SdpoError(f"None of {encoded.height} pairs can be scored: {reason}. Raise score.max_length?")
    scores = score_encoded(usable, loaded, config.token_budget).join(
        pairs.select("pair_id", "source"), on="pair_id", maintain_order="left"
    )
    scores = scores.with_columns(model_key=pl.lit(key), dtype=pl.lit(str(loaded.dtype)[6:]))
    return scores.select(list(SCORES)), _as_dropped(encoded, pairs)


def score_encoded(encoded: pl.DataFrame, model: "PreTrainedModel", token_budget: int) -> pl.DataFrame:
    """Score pairs that are token ids already, in their order.

    Args:
        encoded: ENCODED frame without problems.
        model: loaded model, in eval mode.
        token_budget: tokens per packed row.

    Returns:
        pair_id, chosen_logp and rejected_logp (nats), the three token counts, and truncated.

    Raises:
        SdpoError: a log-probability is not finite.
    """
    sides = ("chosen", "rejected")
    sequences = [
        (prompt + answer, len(prompt))
        for side in sides
        for prompt, answer in encoded.select("prompt_ids", f"{side}_ids").iter_rows()
    ]
    logps = completion_logps(model, sequences, token_budget)
    scored = encoded.select(
        "pair_id",
        pl.Series("chosen_logp", logps[: encoded.height], pl.Float64),
        pl.Series("rejected_logp", logps[encoded.height :], pl.Float64),
        *(pl.col(f"{name}_ids").list.len().cast(pl.Int64).alias(f"{name}_tokens") for name in (*sides, "prompt")),
        "truncated",
    )
    bad = scored.filter(~(pl.col("chosen_logp").is_finite() & pl.col("rejected_logp").is_finite()))
    if bad.height:
        raise SdpoError(
            f"{bad.height} of {scored.height} pairs have a non-finite log-probability, e.g. pair_id "
            f"{bad['pair_id'][0]!r}. Score in float32 (score.dtype), or look whether the model's weights are finite."
        )
    return scored


def completion_logps(
    model: "PreTrainedModel", sequences: Sequence[tuple[list[int], int]], token_budget: int
) -> list[float]:
    """Sum the log-probabilities of each sequence's tokens from `start` on, with a progress bar.

    Args:
        model: loaded causal LM, in eval mode.
        sequences: (token ids, start), see `prefix.score_completions`.
        token_budget: tokens per packed row.

    Returns:
        One sum per sequence, nats, in the order given.
    """
    logps = [0.0] * len(sequences)
    with progress("score", len(sequences), "answers") as advance:
        for places, completions in score_completions(model, sequences, token_budget):
            for place, completion in zip(places, completions, strict=True):
                logps[place] = float(completion.logps.sum(dtype=np.float64))
            advance(len(places))
    return logps


def make_scores(call: Command, pairs: pl.DataFrame, *, asked: bool = False) -> pl.DataFrame:
    """Make RUN/scores.parquet, unless it is up to date; for --force see `make_pairs`."""
    config = call.settings["score"]
    assert isinstance(config, ScoreConfig)
    recipe = {"model": model_key(call.model), **config.model_dump(exclude={"token_budget"})}
    force = call.force and (asked or not call.run.is_current("scores", recipe, ["pairs"]))
    with call.run.stage("scores", recipe, ["pairs"], force=force) as stage:
        if stage.current:
            return call.run.scores
        started = time.monotonic()
        scores, dropped = score_and_drop(pairs, call.model, config)
        call.run.replace_dropped("score", dropped)
        seconds = time.monotonic() - started
        log.info("scored %d pairs in %.0f s (%.1f pairs/s)", scores.height, seconds, scores.height / seconds)
        return stage.write("scores", scores)


def main() -> None:
    """Score RUN's pairs under the reference model into RUN/scores.parquet; makes pairs.parquet if missing."""
    sections: dict[str, type[Settings]] = {"score": ScoreConfig, "pairs": PairsConfig}
    call = read_command("python -m sdpo_data.score", __doc__, "score", sections)
    made = call.run.lineage.get("scores")
    scores = make_scores(call, make_pairs(call), asked=True)
    call.save()
    if call.run.lineage["scores"] == made:
        say(f"up to date: {call.run.path / 'scores.parquet'}")
        return
    print_table(describe_scores(scores), f"{call.run.path / 'scores.parquet'}")


def _loaded(model: "Model", dtype: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, str]":
    """Give the model, its tokenizer and its key: that of the saved weights where they are at hand."""
    if isinstance(model, str | Path):
        return *load_model(model, dtype), model_key(model)
    loaded, tokenizer = model if isinstance(model, tuple) else (model, load_tokenizer(model.config._name_or_path))
    return loaded.eval(), tokenizer, model_key(loaded)


def _as_dropped(encoded: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    return (
        encoded.filter(pl.col("problem").is_not_null())
        .select("pair_id", reason="problem")
        .join(pairs, on="pair_id")
        .with_columns(
            stage=pl.lit("score"),
            row=pl.lit(None, pl.Int64),
            content=pl.struct(list(PAIRS)).struct.json_encode(),
        )
        .select(list(DROPPED))
    )


if __name__ == "__main__":
    command(main)
