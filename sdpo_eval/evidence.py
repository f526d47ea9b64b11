"""What the report rests on: a run folder's tables, and the numbers that are drawn from them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import ruamel.yaml

from sdpo_data.intervals import clustered_means
from sdpo_data.run import Run
from sdpo_data.tables import (
    DROPPED,
    ITEMS,
    LOGP_MARGIN,
    MARGIN_PER_TOKEN,
    MESSAGES,
    METRICS,
    PAIRS,
    PARTITION,
    RESULTS,
    SCORES,
    STEPS,
    SdpoError,
    check,
)
from sdpo_eval.h4 import summarise_items

UNIT = ["arm", "seed", "step"]
Model = tuple[str, int, int]
"""arm, seed, step; step 0 is the base model."""


@dataclass(frozen=True)
class Evidence:
    """Everything a report is made from. A table whose command has not run yet is empty."""

    path: Path
    config: str
    settings: dict[str, Any]
    """What config.yaml says."""
    lineage: dict[str, Any]
    pairs: pl.DataFrame
    held_out: pl.DataFrame
    dropped: pl.DataFrame
    scores: pl.DataFrame
    partition: pl.DataFrame
    results: pl.DataFrame
    steps: pl.DataFrame
    metrics: pl.DataFrame
    items: pl.DataFrame
    references: pl.DataFrame
    """SCORES of every step's pairs under that step's reference, with arm, seed and step."""


def read_evidence(run: Run) -> Evidence:
    """Read what a run folder holds so far.

    Raises:
        SdpoError: a table cannot be read, or is not what its schema says.
    """

    def table(name: str, schema: pl.Schema) -> pl.DataFrame:
        there = (run.path / f"{name}.parquet").exists()
        return check(run.read(name), schema, f"{name}.parquet") if there else schema.to_frame()

    config = (run.path / "config.yaml").read_text("utf-8") if (run.path / "config.yaml").exists() else ""
    return Evidence(
        path=run.path,
        config=config,
        settings=_settings(run.path / "config.yaml", config),
        lineage=run.lineage,
        pairs=table("pairs", PAIRS),
        held_out=table("held_out", PAIRS),
        dropped=table("dropped", DROPPED),
        scores=table("scores", SCORES),
        partition=table("partition", PARTITION),
        results=table("results", RESULTS),
        steps=check(run.steps, STEPS, "steps.parquet"),
        metrics=check(run.metrics, METRICS, "metrics.parquet"),
        items=check(run.items, ITEMS, "items"),
        references=_references(run),
    )


def _settings(path: Path, text: str) -> dict[str, Any]:
    try:
        settings = ruamel.yaml.YAML(typ="safe").load(text) or {}
    except ruamel.yaml.error.YAMLError as error:
        raise SdpoError(f"{path} is not YAML: {' '.join(str(error).split())}. Mend it.") from None
    if not isinstance(settings, dict):
        raise SdpoError(f"{path} holds {type(settings).__name__}, expected sections such as 'partition:'. Mend it.")
    return settings


def _references(run: Run) -> pl.DataFrame:
    frames = [pl.DataFrame(schema={**{name: STEPS[name] for name in UNIT}, **SCORES})]
    for arm, seed, step in run.steps.select(UNIT).rows():
        path = run.path / f"arms/{arm}/seed_{seed}/step_{step}/reference_scores.parquet"
        if path.exists():
            scores = check(run.read(str(path.relative_to(run.path).with_suffix(""))), SCORES, str(path))
            unit = {"arm": pl.lit(arm), "seed": pl.lit(seed, pl.Int64), "step": pl.lit(step, pl.Int64)}
            frames.append(scores.with_columns(**unit).select(*UNIT, *SCORES))
    return pl.concat(frames)


def comparable_results(results: pl.DataFrame, subset: str = "all") -> pl.DataFrame:
    """Keep one protocol per task, the one most models were asked by: others must not share its column."""
    results = results.filter(pl.col("subset") == subset)
    asked = results.group_by("task", "protocol").agg(models=pl.len()).sort("models", "protocol", descending=True)
    return results.join(asked.unique("task", keep="first"), on=["task", "protocol"], how="semi", maintain_order="left")


def paired_differences(items: pl.DataFrame, results: pl.DataFrame, first: Model, second: Model) -> pl.DataFrame:
    """Average first - second over the questions that both answered: the differences are summed up as items are.

    Args:
        items: ITEMS frame.
        results: RESULTS, one protocol per task; only those protocols count.

    Returns:
        RESULTS frame, value and stderr of the difference in points; a row per shared task, and H4
        where all four are shared. It compares these two checkpoints, not the methods behind them.

    Source: item-paired standard errors, arXiv 2411.00640.
    """
    question = ["protocol", "task", "item_id"]
    items = items.join(results, on=["protocol", "task"], how="semi")
    other = _of(items, second).select(*question, other="score")
    both = _of(items, first).join(other, on=question, maintain_order="left")
    return summarise_items(both.with_columns(score=pl.col("score") - pl.col("other")).select(list(ITEMS)))


def _of(frame: pl.DataFrame, model: Model) -> pl.DataFrame:
    return frame.filter(arm=model[0], seed=model[1], step=model[2])


def measure_references(evidence: Evidence) -> pl.DataFrame:
    """Judge every step's pairs by the base model and by the step's own reference.

    Returns:
        arm, seed, step, reference (who judges), then mean and stderr of the margin (nats),
        accuracy and accuracy_stderr (reward accuracy, percent), n.
    """
    own = evidence.references
    base = own.select(*UNIT, "pair_id").join(evidence.scores, on="pair_id", maintain_order="left").select(own.columns)
    judged = pl.concat(
        [base.with_columns(reference=pl.lit("base model")), own.with_columns(reference=pl.lit("own reference"))]
    )
    return summarise_margins(judged, [*UNIT, "reference"])


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


def edge_pairs(evidence: Evidence) -> pl.DataFrame:
    """Pick the easiest, the median and the hardest pair of every step.

    Returns:
        step, place, difficulty, margin (nats), chosen_tokens, rejected_tokens, and the pair with
        its texts as a person reads them.
    """
    known = evidence.partition.join(evidence.pairs.drop("source"), on="pair_id").sort("step", "difficulty", "pair_id")
    picked = []
    for _, part in known.group_by("step", maintain_order=True):
        places = {"easiest": 0, "median": part.height // 2, "hardest": part.height - 1}
        picked += [part[row].with_columns(place=pl.lit(place)) for place, row in places.items()]
    if not picked:
        return known.with_columns(place=pl.lit(""))
    texts = [
        pl.struct(name, "format").map_elements(_readable, pl.String).alias(name)
        for name in ("prompt", "chosen", "rejected")
    ]
    scores = evidence.scores.select("pair_id", "chosen_tokens", "rejected_tokens", margin=LOGP_MARGIN)
    return pl.concat(picked).with_columns(texts).join(scores, on="pair_id", how="left", maintain_order="left")


def _readable(row: dict[str, str]) -> str:
    text, format_ = row.values()
    if format_ != MESSAGES:
        return text
    messages = json.loads(text)
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
