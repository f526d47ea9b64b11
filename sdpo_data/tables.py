"""The tables that flow through the toolkit, and nothing else.

Read this file first: each schema below is one stage of the pipeline. A table is a polars
frame; `check` says in one sentence what is wrong with it. Derived quantities are
expressions, never stored columns, so they cannot go stale.
"""

import polars as pl

TEXT = "text"
MESSAGES = "messages"

PAIRS = pl.Schema(
    {  # one row per preference pair
        "pair_id": pl.String,  # hash of (system, prompt, chosen, rejected), and of tools where there are any
        "prompt_id": pl.String,  # hash of (system, prompt), and of tools: pairs of one prompt share it
        "source": pl.String,  # dataset the pair came from, e.g. "alpaca-eval/gpt4"
        "prompt": pl.String,  # plain text, or a JSON list of {"role", "content"}: see format
        "chosen": pl.String,
        "rejected": pl.String,
        "format": pl.String,  # TEXT or MESSAGES
        "system": pl.String,  # system message; null where the source has none
        "rating_chosen": pl.Float64,  # the judge's rating; null where the source has none
        "rating_rejected": pl.Float64,
        "tools": pl.String,  # what the model may call: a JSON list of JSON schemas; null where the source has none
    }
)
DROPPED = pl.Schema(
    {  # one row per pair that did not come through, and why
        "stage": pl.String,  # the command that dropped it: "pairs", "fix", "decontaminate", "score" or "partition"
        "source": pl.String,
        "row": pl.Int64,  # row in the source, counted from 0; null after reading
        "pair_id": pl.String,  # null where the row never became a pair
        "reason": pl.String,
        "content": pl.String,  # the row as it was read, as JSON
    }
)
FINDINGS = pl.Schema(
    {  # one row per check of the pairs, found or not: see doctor.py
        "check": pl.String,
        "severity": pl.String,  # "wrong": not to be trained on as it is; "look": may be meant so; "fine": not found
        "pairs": pl.Int64,  # affected
        "share": pl.Float64,  # of all pairs
        "pair_id": pl.String,  # the first affected; null where there is none
        "remedy": pl.String,  # for the length bias, the verdict
    }
)
SCORES = pl.Schema(
    {  # one row per pair: what one model thinks of it
        "pair_id": pl.String,
        "prompt_id": pl.String,  # pairs of one prompt are no independent draws: intervals are clustered by it
        "source": pl.String,
        "model_key": pl.String,  # which weights: see models.model_key
        "chosen_logp": pl.Float64,  # nats, summed over completion tokens, always <= 0
        "rejected_logp": pl.Float64,
        "chosen_tokens": pl.Int64,  # completion tokens counted in chosen_logp, always >= 1
        "rejected_tokens": pl.Int64,
        "prompt_tokens": pl.Int64,
        "truncated": pl.Boolean,  # an answer lost tokens to max_length
        "dtype": pl.String,  # of the forward pass
        "rating_chosen": pl.Float64,  # the judge's, from PAIRS; null where the source has none
        "rating_rejected": pl.Float64,
        "against_key": pl.String,  # weights of the second model (score.against); null without one
        "against_chosen_logp": pl.Float64,  # nats, under the second model, of the very same tokens
        "against_rejected_logp": pl.Float64,
    }
)
PARTITION = pl.Schema(
    {  # one row per pair and sDPO step that trains on it: one step each, unless steps are cumulative
        "pair_id": pl.String,
        "source": pl.String,
        "step": pl.Int64,  # 1 = easiest
        "rank": pl.Int64,  # training order over the whole run, from 0
        "difficulty": pl.Float64,  # higher = harder, always
        "definition": pl.String,  # name of the difficulty, see difficulty.py
    }
)
STEPS = pl.Schema(
    {  # one row per finished training step
        "arm": pl.String,
        "seed": pl.Int64,
        "step": pl.Int64,
        "start_key": pl.String,  # weights the step started from
        "reference_key": pl.String,  # weights it was regularised towards
        "model_key": pl.String,  # weights it wrote
        "model": pl.String,  # their folder
        "pairs": pl.Int64,
        "tokens": pl.Int64,  # prompt + chosen + rejected tokens trained on, all epochs
        "updates": pl.Int64,  # optimiser updates
        "seconds": pl.Float64,
        "first_loss": pl.Float64,  # mean DPO loss of the first update, nats
        "last_loss": pl.Float64,
        "max_start_gap": pl.Float64,  # largest |policy - reference| log-prob before update 1, nats
        "margin_ref_mean": pl.Float64,  # mean logp_margin of the step's pairs under its reference, nats
        "shared_from": pl.String,  # the unit whose result this is: computed once, for arms that agree; else null
    }
)
METRICS = pl.Schema(
    {  # one row per logged training metric
        "arm": pl.String,
        "seed": pl.Int64,
        "step": pl.Int64,
        "update": pl.Int64,
        "name": pl.String,
        "value": pl.Float64,
    }
)
ITEMS = pl.Schema(
    {  # one row per model, task and evaluated question
        "arm": pl.String,
        "seed": pl.Int64,
        "step": pl.Int64,  # 0 = base model
        "model_key": pl.String,
        "protocol": pl.String,
        "task": pl.String,
        "item_id": pl.String,
        "subject": pl.String,  # MMLU's subject; the task's name elsewhere
        "cluster": pl.String,  # what it was made from: HellaSwag's source document; elsewhere the question itself
        "correct": pl.Float64,  # 0 or 1; null for mc2, which has no single right answer
        "score": pl.Float64,  # what the task's metric averages: acc, acc_norm or mc2
        "gold_logp": pl.Float64,  # nats, of the right answer (mc2: of the best right one)
        "choice_logps": pl.List(pl.Float64),  # nats, in the order of the choices
    }
)
RESULTS = pl.Schema(
    {  # one row per model, task and metric
        "arm": pl.String,
        "seed": pl.Int64,
        "step": pl.Int64,  # 0 = base model
        "model_key": pl.String,
        "protocol": pl.String,  # rows of different protocols are never compared
        "task": pl.String,  # one of the four, or "h4" for their mean
        "metric": pl.String,
        "value": pl.Float64,  # points of 100
        "stderr": pl.Float64,  # standard error of value, points; null where the items show no spread
        "n": pl.Int64,  # questions behind value
        "n_full": pl.Int64,  # questions the task has: n < n_full is a limited run
        "subset": pl.String,  # "all" or "clean"
    }
)
UNIT = ["arm", "seed", "step"]
"""The columns that name a model of a run; step 0 of arm "base" is the one before step 1."""
DOCUMENTS = pl.Schema(
    {  # one row per text that an evaluation shows a model
        "protocol": pl.String,
        "task": pl.String,
        "item_id": pl.String,  # as in ITEMS
        "text": pl.String,
    }
)
CONTAMINATION = pl.Schema(
    {  # one row per pair, evaluated item and rule by which the item stands in the pair
        "pair_id": pl.String,
        "task": pl.String,
        "item_id": pl.String,
        "rule": pl.String,  # "question", "8-gram" or "13-gram": see decontaminate.py
        "matched": pl.String,  # the words of the pair
    }
)
NULLABLE = {
    "system", "rating_chosen", "rating_rejected", "tools",  # PAIRS, SCORES
    "against_key", "against_chosen_logp", "against_rejected_logp",  # SCORES
    "row", "pair_id",  # DROPPED; of FINDINGS pair_id alone
    "correct", "gold_logp", "stderr",  # ITEMS, RESULTS
    "max_start_gap", "shared_from",  # STEPS: an arm whose start is not its reference has no gap
}  # fmt: skip
LATER = {"tools"}  # columns that a table made before they were there lacks: all null there

LOGP_MARGIN = pl.col("chosen_logp") - pl.col("rejected_logp")
"""gamma of arXiv 2403.19270, nats, summed: above 0 the model prefers the chosen answer."""

MARGIN_PER_TOKEN = pl.col("chosen_logp") / pl.col("chosen_tokens") - pl.col("rejected_logp") / pl.col("rejected_tokens")
"""Difference of the answers' mean log-probabilities, nats per token."""

REWARD_ACCURACY = (LOGP_MARGIN > 0).mean()
"""Share of pairs whose chosen answer the model prefers: the paper's word, reference-free."""

TOKEN_DIFFERENCE = pl.col("chosen_tokens") - pl.col("rejected_tokens")
"""How much longer the chosen answer is, tokens: what a difficulty should not merely repeat."""


class SdpoError(ValueError):
    """Something the user can fix: bad data, a bad setting, a missing file."""


def check(frame: pl.DataFrame, schema: pl.Schema, name: str) -> pl.DataFrame:
    """Return `frame` with exactly the columns of `schema`, or say what is wrong with it.

    Raises:
        SdpoError: a column is missing, has another type, or holds nulls where it may not;
            or the key repeats: pair_id of PAIRS and SCORES, (pair_id, step) of PARTITION.
    """
    frame = frame.with_columns(pl.lit(None, schema[name]).alias(name) for name in LATER & schema.keys() - frame.columns)
    missing = [column for column in schema if column not in frame.columns]
    if missing:
        raise SdpoError(f"{name} is missing column {missing[0]!r}. It has {frame.columns}; it needs {list(schema)}.")
    frame = frame.select(list(schema))
    for column, dtype in schema.items():
        if frame[column].dtype != dtype:
            raise SdpoError(f"{name}.{column} is {frame[column].dtype}, expected {dtype}.")
        nulls = frame[column].null_count()
        if nulls and not (column in NULLABLE and not (column == "pair_id" and schema not in (DROPPED, FINDINGS))):
            first = frame.with_row_index("_row").filter(pl.col(column).is_null())["_row"][0]
            raise SdpoError(
                f"{name}.{column} has {nulls} null value(s), first at row {first}. "
                "Drop those rows or fill them before going on."
            )
    key = ["pair_id", "step"] if schema == PARTITION else ["pair_id"]
    if schema in (PAIRS, SCORES, PARTITION) and frame["pair_id"].n_unique() < frame.height:  # the fast case
        repeated = frame.filter(pl.struct(key).is_duplicated())
        if repeated.height:
            where = f" in step {repeated['step'][0]}" if schema == PARTITION else ""
            raise SdpoError(
                f"{name} has {repeated['pair_id'].n_unique()} repeated pair_id(s), e.g. "
                f"{repeated['pair_id'][0][:40]!r}{where}. Was the frame concatenated twice?"
            )
    return frame
