"""What the report rests on: a run folder's tables, and the numbers that are drawn from them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import ruamel.yaml

from sdpo_data.config import read_section
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
from sdpo_eval.contrasts import CompareConfig, Side, contrast_models

UNIT = ["arm", "seed", "step"]
Model = tuple[str, int, int]
"""arm, seed, step; step 0 is the base model."""
HELD_OUT_SCORES = pl.Schema({**{name: STEPS[name] for name in UNIT}, **SCORES})
"""SCORES of the held-out pairs under each model; step 0 of arm "base" is the base model."""


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
    held_out_scores: pl.DataFrame
    documents: pl.DataFrame
    """protocol, task, item_id and text of the questions."""
    compare: CompareConfig

    @cached_property
    def contrasts(self) -> pl.DataFrame:
        """What `pair_sides` sets against each other, judged by scores: a CONTRASTS frame."""
        return contrast_models(pair_sides(self), self.compare)


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
        held_out_scores=read_held_out(run),
        documents=run.questions,
        compare=read_section(run, "compare", CompareConfig),
    )


def read_held_out(run: Run) -> pl.DataFrame:
    """Read what `held_out.score_held_out` has written so far: a HELD_OUT_SCORES frame."""
    tables = [f"held_out_scores/{file.stem}" for file in sorted(run.path.glob("held_out_scores/*.parquet"))]
    frames = [check(run.read(table), HELD_OUT_SCORES, table) for table in tables]
    return pl.concat([HELD_OUT_SCORES.to_frame(), *frames]).sort(*UNIT, "pair_id")


def _settings(path: Path, text: str) -> dict[str, Any]:
    try:
        settings = ruamel.yaml.YAML(typ="safe").load(text) or {}
    except ruamel.yaml.error.YAMLError as error:
        raise SdpoError(f"{path} is not YAML: {' '.join(str(error).split())}. Mend it.") from None
    if not isinstance(settings, dict):
        raise SdpoError(f"{path} holds {type(settings).__name__}, expected sections such as 'partition:'. Mend it.")
    return settings


def _references(run: Run) -> pl.DataFrame:
    frames = [HELD_OUT_SCORES.to_frame()]
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


def find_base(results: pl.DataFrame) -> Model | None:
    rows = results.filter(arm="base", step=0).select(UNIT).rows()
    return rows[0] if rows else None


def find_lasts(results: pl.DataFrame) -> list[Model]:
    """Find the last model of every arm and seed, sdpo's first."""
    others = results.filter(pl.col("arm") != "base").group_by("arm", "seed").agg(pl.col("step").max())
    return others.sort(pl.col("arm") != "sdpo", "arm", "seed").select(UNIT).rows()


def pair_sides(evidence: Evidence) -> list[tuple[Side, Side]]:
    """Set every arm's last models against the base model, and sDPO's against every other arm's.

    Seeds that end at different steps make different sides; sides of several seeds each, none of
    them shared, are not set against each other.
    """
    results = comparable_results(evidence.results)
    items = evidence.items.join(results, on=["protocol", "task"], how="semi")

    def side(arm: str, step: int, seeds: list[int]) -> Side:
        own = items.filter(pl.col("arm") == arm, pl.col("step") == step, pl.col("seed").is_in(seeds))
        return Side(f"{arm} step {step}" if step else arm, arm, own)

    ends: dict[tuple[str, int], list[int]] = {}
    for arm, seed, step in find_lasts(results):
        ends.setdefault((arm, step), []).append(seed)
    lasts = [side(arm, step, seeds) for (arm, step), seeds in ends.items()]
    base = side("base", 0, [0]) if find_base(results) else None
    pairs = [(last, base) for last in lasts if base]
    pairs += [(one, two) for one in lasts for two in lasts if one.arm == "sdpo" != two.arm]
    return [(one, two) for one, two in pairs if _comparable(one, two)]


def _comparable(one: Side, two: Side) -> bool:
    ones, twos = ({seed for seed, _ in side.models} for side in (one, two))
    return bool(ones and twos) and (len(ones) == 1 or len(twos) == 1 or bool(ones & twos))


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
