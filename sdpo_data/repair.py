"""The repairs that leave no choice, of what the doctor finds; all else is left as it is."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from sdpo_data.console import say
from sdpo_data.doctor import EMPTY, IDENTICAL, SAME_PAIR, doubled, look_at_tokens, squash_texts, tokenizer_of
from sdpo_data.messages import messages_as_json, pair_ids
from sdpo_data.run import Run
from sdpo_data.tables import DROPPED, MESSAGES, PAIRS, SdpoError, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sdpo_data.doctor import Model

STAGE = "fix"


@dataclass(frozen=True)
class Fixed:
    """Pairs as they are to be trained on, those dropped with a reason, and how many had a token cut off."""

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    cut: int


def fix_pairs(pairs: pl.DataFrame, model: "Model | None" = None) -> Fixed:
    """Repair what has one right repair.

    A BOS written at the start of a prompt or an EOS at the end of an answer is cut off where the
    model would read it twice; the pair gets the ids of its new content. A pair that is empty, whose
    answers differ only in blanks, or that repeats an earlier one but for blanks, is dropped.

    Args:
        pairs: PAIRS frame.
        model: as for check_pairs. Without one no token is cut off.
    """
    pairs, cut = check(pairs, PAIRS, "pairs"), 0
    if model is not None and pairs.height:
        pairs, cut = _cut_doubled(pairs, tokenizer_of(model))
    reason = (
        pl.when(EMPTY).then(pl.lit("empty text"))
        .when(IDENTICAL).then(pl.lit("identical answers"))
        .when(pl.struct(SAME_PAIR).is_first_distinct().not_()).then(pl.lit("repeated pair"))
    )  # fmt: skip
    marked = pairs.with_columns(squash_texts(pairs).select(reason=reason).to_series())
    dropped = marked.filter(pl.col("reason").is_not_null()).with_columns(
        stage=pl.lit(STAGE), row=pl.lit(None, pl.Int64), content=pl.struct(list(PAIRS)).struct.json_encode()
    )
    return Fixed(marked.filter(pl.col("reason").is_null()).select(list(PAIRS)), dropped.select(list(DROPPED)), cut)


def fix_run(run: Run, model: str) -> pl.DataFrame:
    """Repair RUN/pairs.parquet and held_out.parquet; give the pairs.

    Raises:
        SdpoError: no pair would be left.
    """
    trained, held = fix_pairs(run.pairs, model), fix_pairs(run.held_out, model)
    dropped, cut = pl.concat([trained.dropped, held.dropped]), trained.cut + held.cut
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped["reason"].value_counts(sort=True).rows()) or "none"
    if trained.pairs.is_empty():
        raise SdpoError(f"--fix would leave none of {run.pairs.height} pairs ({reasons}). Look at them with --check.")
    say(f"--fix cut a doubled token off {cut:,} pairs, dropped {dropped.height:,} ({reasons}), and left the rest.")
    if cut or dropped.height:
        with run.stage(STAGE, {"model": model}, ["pairs"], force=True) as stage:
            before = run.dropped.filter(pl.col("stage") == STAGE)
            run.replace_dropped(STAGE, pl.concat([before, dropped]).unique(maintain_order=True))
            stage.write("held_out", held.pairs)
            stage.write("pairs", trained.pairs)
    return trained.pairs


def _cut_doubled(pairs: pl.DataFrame, tokenizer: "PreTrainedTokenizerBase") -> tuple[pl.DataFrame, int]:
    looked = look_at_tokens(pairs, pairs, tokenizer).select(
        prompt=doubled("prompt_ids", tokenizer.bos_token_id),
        chosen=doubled("chosen_ids", tokenizer.eos_token_id),
        rejected=doubled("rejected_ids", tokenizer.eos_token_id),
    )
    rows, cut = pairs.to_dicts(), 0
    for row, twice in zip(rows, looked.iter_rows(named=True), strict=True):
        before = dict(row)
        for side in ("prompt", "chosen", "rejected"):
            if twice[side]:
                row[side] = _without(row, side, str(tokenizer.bos_token if side == "prompt" else tokenizer.eos_token))
        if row != before:
            row |= pair_ids(*(row[name] for name in ("system", "prompt", "chosen", "rejected", "tools")))
            cut += 1
    return pl.DataFrame(rows, PAIRS), cut


def _without(row: dict, side: str, token: str) -> str:
    """Cut `token` off the start of a prompt or the end of an answer, as often as it stands there."""
    place = 0 if side == "prompt" else -1
    messages = json.loads(row[side]) if row["format"] == MESSAGES else [{"content": row[side]}]
    text = messages[place]["content"]
    while token and (text.startswith(token) if side == "prompt" else text.endswith(token)):
        text = text.removeprefix(token) if side == "prompt" else text.removesuffix(token)
    messages[place]["content"] = text
    return messages_as_json(messages) if row["format"] == MESSAGES else text
