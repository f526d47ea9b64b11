"""What every model of a run thinks of the pairs held out: the margins, their means, and the pairs as questions."""

from collections.abc import Sequence

import polars as pl

from sdpo_data.intervals import clustered_means
from sdpo_data.messages import plain_texts
from sdpo_data.run import Run
from sdpo_data.tables import DOCUMENTS, ITEMS, LOGP_MARGIN, MARGIN_PER_TOKEN, SCORES, STEPS, UNIT, check

HELD_OUT = "held_out"
"""Name, as a task, of the question which answer of a held-out pair is likelier."""
HELD_OUT_SCORES = pl.Schema({**{name: STEPS[name] for name in UNIT}, **SCORES})
"""SCORES of the held-out pairs under each model; step 0 of arm "base" is the base model."""


def read_held_out(run: Run) -> pl.DataFrame:
    """Read what `held_out.score_held_out` has written so far: a HELD_OUT_SCORES frame."""
    tables = [f"held_out_scores/{file.stem}" for file in sorted(run.path.glob("held_out_scores/*.parquet"))]
    frames = [check(run.read(table), HELD_OUT_SCORES, table) for table in tables]
    return pl.concat([HELD_OUT_SCORES.to_frame(), *frames]).sort(*UNIT, "pair_id")


def as_items(scores: pl.DataFrame) -> pl.DataFrame:
    """Put every held-out pair as a question of two choices: right where the chosen answer is the likelier one.

    So held-out preference accuracy is compared as the score of any task is, pairs of one prompt being one draw.

    Args:
        scores: HELD_OUT_SCORES frame.

    Returns:
        ITEMS frame of task "held_out"; choice_logps are chosen, rejected. The protocol names the dtype:
        scores of different ones are not compared.
    """
    right = (LOGP_MARGIN > 0).cast(pl.Float64)
    return scores.select(
        *UNIT,
        "model_key",
        protocol=pl.format("{}@{}", pl.lit(HELD_OUT), "dtype"),
        task=pl.lit(HELD_OUT),
        item_id="pair_id",
        subject=pl.lit(HELD_OUT),
        cluster="prompt_id",
        correct=right,
        score=right,
        gold_logp="chosen_logp",
        choice_logps=pl.concat_list("chosen_logp", "rejected_logp"),
    ).select(list(ITEMS))


def as_documents(pairs: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    """Give the prompts of held-out pairs as the texts of those questions: a DOCUMENTS frame.

    Args:
        pairs: PAIRS frame.
        scores: HELD_OUT_SCORES frame, which says under which protocols they were asked.
    """
    texts = pairs.select("pair_id", text=plain_texts(pairs, "prompt"))
    asked = as_items(scores).select("protocol", "task", "item_id").unique(maintain_order=True)
    return asked.join(texts, left_on="item_id", right_on="pair_id").select(list(DOCUMENTS))


def summarise_margins(scores: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """Average margins and reward accuracies per group, with errors that know that pairs share prompts.

    Args:
        scores: SCORES and the columns `by`.

    Returns:
        The columns `by`, then mean, stderr (nats), accuracy, accuracy_stderr, per_token,
        per_token_stderr (percent of pairs whose summed or per-token margin is positive), n.

    Source: see `clustered_means`.
    """
    values = scores.select(
        *by,
        "prompt_id",
        mean=LOGP_MARGIN,
        accuracy=100.0 * (LOGP_MARGIN > 0),
        per_token=100.0 * (MARGIN_PER_TOKEN > 0),
    )
    return clustered_means(values, by).drop("clusters").rename({"mean_stderr": "stderr"})


def measure_displacement(held_out_scores: pl.DataFrame) -> pl.DataFrame:
    """Measure how far each model moved both answers of the held-out pairs, from the base model.

    Args:
        held_out_scores: HELD_OUT_SCORES frame.

    Returns:
        arm, seed, step, answer ("chosen" or "rejected"), mean and stderr of the change of the
        answer's log-probability (nats, clustered by prompt), n. Empty without a base model.

    Source: likelihood displacement, arXiv 2410.08847, seen there as a falling chosen log-probability.
    """
    base = held_out_scores.filter(arm="base").select("pair_id", was_chosen="chosen_logp", was_rejected="rejected_logp")
    both = held_out_scores.filter(pl.col("arm") != "base").join(base, on="pair_id")
    moved = [
        both.select(*UNIT, "prompt_id", answer=pl.lit(side), mean=pl.col(f"{side}_logp") - pl.col(f"was_{side}"))
        for side in ("chosen", "rejected")
    ]
    means = clustered_means(pl.concat(moved), [*UNIT, "answer"])
    return means.drop("clusters").rename({"mean_stderr": "stderr"})
