"""Score every pair under one model: the log-probabilities of both answers, reference-free.

What was scored before, in any run, comes from the score store; the rest is computed by the prefix
engine in bins, each kept as soon as it is done.

Examples:
    python -m sdpo_data.score runs/a --model my-org/my-sft                   # scores.parquet
    accelerate launch -m sdpo_data.score runs/a --dtype bfloat16             # bins spread over the devices
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
import pydantic

from sdpo_data import workers
from sdpo_data.config import Command, Settings, read_command
from sdpo_data.console import command, say
from sdpo_data.describe import print_report
from sdpo_data.encode import Truncation, encode_pairs
from sdpo_data.models import load_model, load_tokenizer, model_key, stated_length
from sdpo_data.pairs import PairsConfig, make_pairs
from sdpo_data.scorer import Scorer, complete
from sdpo_data.store import ScoreStore
from sdpo_data.tables import DROPPED, PAIRS, SCORES, SdpoError, check
from sdpo_data.tree import Request, request_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = str | Path | PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]

log = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
BLOCK = 2**16  # pairs whose tokens are in memory at a time
RESCORED = 0.01  # share of pairs scored again in float32 where the dtype is coarser, at least RESCORED_LEAST
RESCORED_LEAST = 8


class ScoreConfig(Settings):
    dtype: Literal["float32", "bfloat16", "float16", "bfloat16_autocast"] = "float32"
    """Of the forward pass. In bfloat16 log-probs move with what is computed beside them: see the noise band.
    bfloat16_autocast keeps the weights in float32, as training with train.dtype bfloat16 does: then step 1 finds
    its reference log-probs in the store, where after bfloat16 it scores its pairs again."""
    max_length: int = pydantic.Field(1024, ge=2)
    """Longest prompt + answer, tokens."""
    truncation: Truncation = "drop"
    """A pair with a longer side: drop it (counted), or cut that answer's end as TRL does."""
    token_budget: int | None = pydantic.Field(None, ge=1)
    """Tokens per forward pass at most; None for what suits the device. Lower it where memory runs out."""
    keep_token_logps: bool = False
    """Keep the log-probability of every completion token too, as two list columns of scores.parquet."""
    against: str | None = None
    """Second model, with the same tokenizer, for the difficulty implicit_reward: a folder, hub id or embedded:NAME."""
    store: str | None = None
    """Folder of the score store, shared by runs; None for the cache folder."""


def score_pairs(pairs: pl.DataFrame, model: "Model", config: ScoreConfig | None = None) -> pl.DataFrame:
    """Compute the summed log-probability of both answers of every pair under one model.

    Args:
        pairs: PAIRS frame.
        model: folder, hub id, embedded:NAME, a loaded model, or (model, tokenizer).
        config: dtype is used where the model is loaded here.

    Returns:
        SCORES frame, in the order of `pairs`; log-probabilities in nats. Pairs that cannot be
        scored (too long, an answer without tokens) are left out and logged with their reasons.
        With keep_token_logps also chosen_token_logps and rejected_token_logps, lists of nats.

    Raises:
        SdpoError: no pair can be scored, one is longer than what the model was made to read, or a
            log-probability is not finite; the second model is the first, or has another tokenizer.

    Source: log pi(y | x) of DPO (arXiv 2305.18290), summed over completion tokens, EOS included.
    """
    scores, _ = score_and_drop(pairs, model, config or ScoreConfig())
    return scores


def score_and_drop(pairs: pl.DataFrame, model: "Model", config: ScoreConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Do what `score_pairs` does, and return what was left out as a DROPPED frame beside it."""
    pairs = check(pairs, PAIRS, "pairs")
    loaded, tokenizer, key = _loaded(model, config.dtype)
    scores, dropped = _score(pairs, loaded, tokenizer, key, config)
    if config.against is not None:
        scores = _beside(scores, pairs, tokenizer, config)
    return scores, dropped


def rescore_sample(scores: pl.DataFrame, pairs: pl.DataFrame, model: "Model", config: ScoreConfig) -> pl.DataFrame:
    """Score about 1 % of the pairs again in float32: what a coarser dtype did to their scores.

    Args:
        scores: SCORES of the pairs in a coarser dtype.
        model: the same model; a loaded one is widened for the time of the call.

    Returns:
        SCORES frame of the sample, which depends on the pairs' ids alone.
    """
    size = max(RESCORED_LEAST, math.ceil(RESCORED * scores.height))
    sample = pairs.join(scores.select("pair_id"), on="pair_id").sort("pair_id").head(size)
    settings = config.model_copy(update={"dtype": "float32", "keep_token_logps": False})
    if isinstance(model, str | Path):
        return score_pairs(sample, model, settings)
    loaded, tokenizer, _ = _loaded(model, "float32")
    dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    try:
        again = score_pairs(sample, (loaded.float(), tokenizer), settings)
        return again.with_columns(model_key=pl.lit(scores["model_key"][0]))  # the same model, only wider
    finally:
        for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))


def score_encoded(encoded: pl.DataFrame, pairs: pl.DataFrame, scorer: Scorer) -> pl.DataFrame:
    """Score pairs that are token ids already, in their order, from the store or by computing them.

    Args:
        encoded: ENCODED frame without problems.
        pairs: PAIRS frame that holds them.

    Returns:
        SCORES frame without a second model's columns filled; with the scorer's token_logps also the lists.

    Raises:
        SdpoError: a pair is longer than what the model was made to read; a log-probability is not
            finite.
    """
    _refuse_longer_than_read(encoded, scorer.model)
    requests = _requests(encoded)
    keys = [request_key(request) for request in requests]
    found = complete(dict(zip(keys, requests, strict=True)), scorer)
    answers = pl.DataFrame({"request": keys}).join(found, on="request", how="left", maintain_order="left")
    sides = {"chosen": answers.head(encoded.height), "rejected": answers.tail(encoded.height)}
    scored = encoded.select(
        "pair_id",
        *(sides[side]["logp"].alias(f"{side}_logp") for side in SIDES),
        *(pl.col(f"{name}_ids").list.len().cast(pl.Int64).alias(f"{name}_tokens") for name in (*SIDES, "prompt")),
        *(sides[side]["token_logps"].alias(f"{side}_token_logps") for side in SIDES if scorer.token_logps),
        "truncated",
        model_key=pl.lit(scorer.key),
        dtype=pl.lit(scorer.dtype),
        **{name: pl.lit(None, SCORES[name]) for name in SCORES if name.startswith("against")},
    )
    bad = scored.filter(~(pl.col("chosen_logp").is_finite() & pl.col("rejected_logp").is_finite()))
    if bad.height:
        raise SdpoError(
            f"{bad.height} of {scored.height} pairs have a non-finite log-probability, e.g. pair_id "
            f"{bad['pair_id'][0]!r}. Score in float32 (score.dtype), or look whether the model's weights are finite."
        )
    said = pairs.select("pair_id", "prompt_id", "source", "rating_chosen", "rating_rejected")
    lists = [f"{side}_token_logps" for side in SIDES if scorer.token_logps]
    return scored.join(said, on="pair_id", how="left", maintain_order="left").select(*SCORES, *lists)


def make_scores(call: Command, pairs: pl.DataFrame, *, asked: bool = False) -> pl.DataFrame:
    """Make RUN/scores.parquet, unless it is up to date; for --force see `make_pairs`.

    Scores in a coarser dtype than float32 get a noise.parquet beside them: about 1 % of the pairs again, in float32.
    """
    config = call.settings["score"]
    assert isinstance(config, ScoreConfig)
    recipe = {"model": model_key(call.model), **config.model_dump(exclude={"token_budget", "store", "against"})}
    recipe["against"] = model_key(config.against) if config.against else None
    force = call.force and (asked or not call.run.is_current("scores", recipe, ["pairs"]))
    with workers.main_stage(call.run, "scores", recipe, ["pairs"], force=force) as stage:
        if stage.current:
            return call.run.scores
        scores, dropped = score_and_drop(pairs, call.model, config)
        coarse = config.dtype != "float32"
        noise = rescore_sample(scores, pairs, call.model, config) if coarse else SCORES.to_frame()
        if workers.is_main():
            call.run.replace_dropped("score", dropped)
            if coarse:
                stage.write("noise", noise)
            else:
                (call.run.path / "noise.parquet").unlink(missing_ok=True)  # of a dtype before
            stage.write("scores", scores)
        return scores


def main() -> None:
    """Score RUN's pairs under the reference model into RUN/scores.parquet; makes pairs.parquet if missing."""
    sections: dict[str, type[Settings]] = {"score": ScoreConfig, "pairs": PairsConfig}
    call = read_command("python -m sdpo_data.score", __doc__, "score", sections)
    made = call.run.lineage.get("scores")
    pairs = workers.main_first(lambda: make_pairs(call), lambda: call.run.pairs)
    scores = make_scores(call, pairs, asked=True)
    if not workers.is_main():
        return
    call.save()
    if call.run.lineage["scores"] == made:
        say(f"up to date: {call.run.path / 'scores.parquet'}")
        return
    noise = (call.run.path / "noise.parquet").exists()
    print_report(scores, rescored=check(call.run.read("noise"), SCORES, "noise.parquet") if noise else None)


def _loaded(model: "Model", dtype: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, str]":
    """Give the model, its tokenizer and its key: that of the saved weights where they are at hand."""
    weights = "float32" if dtype == "bfloat16_autocast" else dtype
    if isinstance(model, str | Path):
        return *load_model(model, weights), model_key(model)
    loaded, tokenizer = model if isinstance(model, tuple) else (model, load_tokenizer(model.config._name_or_path))
    own = str(loaded.dtype).removeprefix("torch.")
    if dtype == "bfloat16_autocast" and own != weights:
        raise SdpoError(
            f"score.dtype {dtype} needs a model in {weights}, and this one is in {own}: load it in {weights}."
        )
    return loaded.eval(), tokenizer, model_key(loaded)


def _score(
    pairs: pl.DataFrame, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", key: str, config: ScoreConfig
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Score pairs block by block, those of one prompt together; give SCORES in their order, and DROPPED."""
    autocast = "bfloat16" if config.dtype == "bfloat16_autocast" else None
    dtype = config.dtype if autocast else str(model.dtype).removeprefix("torch.")
    store = ScoreStore(config.store, key, dtype)
    scorer = Scorer(model, key, store, config.token_budget, config.keep_token_logps, autocast)
    scores, dropped = [], []
    for block in pairs.sort("system", "prompt", "pair_id").iter_slices(BLOCK):
        encoded = encode_pairs(block, tokenizer, config.max_length, config.truncation)
        usable = encoded.filter(pl.col("problem").is_null())
        if usable.height:
            scores.append(score_encoded(usable, block, scorer))
        dropped.append(_as_dropped(encoded, block))
    lost = pl.concat([DROPPED.to_frame(), *dropped])
    if not scores:
        reason = lost["reason"][0] if lost.height else "there is none"
        raise SdpoError(f"None of {pairs.height} pairs can be scored: {reason}. Raise score.max_length?")
    if lost.height:
        reasons = lost["reason"].value_counts(sort=True).rows()
        log.info(
            "not scored: %d of %d pairs (%s)", lost.height, pairs.height, ", ".join(f"{n} {r}" for r, n in reasons)
        )
    ordered = pairs.select("pair_id").join(pl.concat(scores), on="pair_id", maintain_order="left")
    for line in scorer.work.describe(ordered):
        log.info("%s", line)
    return ordered, lost


def _beside(
    scores: pl.DataFrame, pairs: pl.DataFrame, tokenizer: "PreTrainedTokenizerBase", config: ScoreConfig
) -> pl.DataFrame:
    """Fill in what the second model says of the very same tokens."""
    assert config.against is not None
    key = model_key(config.against)
    if key == scores["model_key"][0]:
        raise SdpoError(
            f"score.against {config.against} has the weights of the model that is scored: its implicit reward is 0 for "
            "every pair by definition. Name another model, such as the one it was tuned from."
        )
    model, own, _ = _loaded(config.against, config.dtype)
    if own.get_vocab() != tokenizer.get_vocab():
        raise SdpoError(
            f"score.against {config.against} has another tokenizer: its log-probabilities would be of other tokens. "
            "Name a model of the same family."
        )
    settings = config.model_copy(update={"keep_token_logps": False})
    beside, _ = _score(pairs.join(scores.select("pair_id"), on="pair_id"), model, tokenizer, key, settings)
    columns = beside.select(
        "pair_id",
        against_key="model_key",
        against_chosen_logp="chosen_logp",
        against_rejected_logp="rejected_logp",
    )
    filled = scores.drop(name for name in SCORES if name.startswith("against"))
    joined = filled.join(columns, on="pair_id", how="left", maintain_order="left")
    return joined.select(*SCORES, *(name for name in scores.columns if name not in SCORES))


def _refuse_longer_than_read(encoded: pl.DataFrame, model: "PreTrainedModel") -> None:
    """Past that length a model with learned positions has no answer, and one with rotary ones gives a wrong one."""
    length = stated_length(model)
    answers = pl.max_horizontal(pl.col(f"{side}_ids").list.len() for side in SIDES)
    pairs = encoded.select("pair_id", tokens=pl.col("prompt_ids").list.len() + answers)
    longer = pairs.filter(pl.col("tokens") > length) if length else pairs.clear()
    if longer.height:
        pair_id, tokens = longer.sort("tokens").row(-1)
        raise SdpoError(
            f"{longer.height} of {pairs.height} pairs are longer than the {length} tokens that {type(model).__name__} "
            f"was made to read, e.g. pair_id {pair_id!r} with {tokens}. Set score.max_length (and train.max_length) to "
            f"{length} at most, so that they are dropped or cut."
        )


def _requests(encoded: pl.DataFrame) -> list[Request]:
    """Give the chosen answers' requests, then the rejected ones', as arrays."""
    prompts = _arrays(encoded["prompt_ids"])
    return [
        (np.concatenate([prompt, answer]), len(prompt))
        for side in SIDES
        for prompt, answer in zip(prompts, _arrays(encoded[f"{side}_ids"]), strict=True)
    ]


def _arrays(lists: pl.Series) -> Sequence[np.ndarray]:
    return np.split(lists.explode().to_numpy(), np.cumsum(lists.list.len().to_numpy())[:-1])


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
