"""Score RUN's held-out pairs under the base model and every finished step: which step is best, not asking H4.

Choosing a step by H4 and reporting its H4 would be choosing on the test.

Examples:
    python -m sdpo_eval.held_out runs/a                     # held_out_scores/*.parquet, and the steps by accuracy
    python -m sdpo_eval.held_out runs/a --token-budget 8192 # this once: the settings stay those of scores.parquet
    accelerate launch -m sdpo_eval.held_out runs/a          # on several devices
"""

import logging
from pathlib import Path
from typing import Any

import polars as pl

from sdpo_data import workers
from sdpo_data.config import read_command
from sdpo_data.console import command, print_table, say
from sdpo_data.models import model_key
from sdpo_data.run import Run, only_kept
from sdpo_data.score import ScoreConfig, score_pairs
from sdpo_data.tables import LOGP_MARGIN, PAIRS, SCORES, STEPS, UNIT, SdpoError, check
from sdpo_eval.margins import HELD_OUT_SCORES, read_held_out, summarise_margins
from sdpo_eval.stats import ALPHA, Differences, compare_checkpoints, judge

UNREAD = ("against", "keep_token_logps")  # settings of `score` that mean nothing here
log = logging.getLogger(__name__)

BEST_STEPS = pl.Schema(
    {  # one row per arm and seed
        "arm": pl.String,
        "seed": pl.Int64,
        "best": pl.Int64,  # step of the highest reward accuracy; of equal ones that of the higher mean margin
        "last": pl.Int64,
        "effect": pl.Float64,  # reward accuracy of best - last, points
        "stderr": pl.Float64,
        "low": pl.Float64,  # of the interval at 1 - 0.05 / steps that could have been best instead
        "high": pl.Float64,
        "n": pl.Int64,  # pairs
        "p": pl.Float64,  # adjusted for having chosen the best of several (Bonferroni)
        "verdict": pl.String,  # of best against last
    }
)


def score_held_out(
    run: Run, base: str | Path, config: ScoreConfig | None = None, *, force: bool = False
) -> pl.DataFrame:
    """Score held_out.parquet under the base model and every finished step, equal weights once.

    Each model is a unit of work of its own: a killed run repeats at most the one it was in.

    Args:
        base: the model before step 1.
        config: how pairs are scored; as the run's own were, to compare with them.
        force: score again what is finished.

    Returns:
        HELD_OUT_SCORES frame of all models.

    Raises:
        SdpoError: no pair was held out; a model's folder does not hold the weights its step wrote;
            a model was scored with other settings (and not `force`).
    """
    config = (config or ScoreConfig()).model_copy(
        update={name: ScoreConfig.model_fields[name].default for name in UNREAD}
    )
    pairs = check(run.held_out, PAIRS, "held_out.parquet")
    if pairs.is_empty():
        raise SdpoError(f"{run.path}/held_out.parquet holds no pair. Set pairs.hold_out in a new run folder.")
    frames: dict[str, pl.DataFrame] = {}
    steps = only_kept(run.steps, "the held-out scores").select(*UNIT, "model", "model_key")
    models = [("base", 0, 0, str(base), model_key(base)), *steps.rows()]
    for arm, seed, step, model, key in models:
        table = f"held_out_scores/{arm}-{seed}-{step}"
        recipe = {"model": key, **config.model_dump(exclude={"token_budget", "store", *UNREAD})}
        with workers.main_stage(run, table, recipe, ["held_out"], force=force) as stage:
            if stage.current:
                frames[key] = check(run.read(table), SCORES, table)
                continue
            if key not in frames:
                frames[key] = _scored(pairs, model, key, config)
            unit = zip(UNIT, (arm, seed, step), strict=True)
            columns = [pl.lit(value, STEPS[name]).alias(name) for name, value in unit]
            if workers.is_main():
                stage.write(table, frames[key].with_columns(columns).select(list(HELD_OUT_SCORES)))
    return read_held_out(run)


def _scored(pairs: pl.DataFrame, model: str, key: str, config: ScoreConfig) -> pl.DataFrame:
    scores = score_pairs(pairs, model, config)
    if (found := scores["model_key"][0]) != key:
        raise SdpoError(f"{model} holds the weights {found}, but its step wrote {key}. Train the step again.")
    return scores


def find_best_steps(scores: pl.DataFrame) -> pl.DataFrame:
    """Find each arm's and seed's best step by reward accuracy on held-out pairs, and hold it against the last one.

    The base model stands for step 0 of every arm. The best of k steps is partly luck: its p-value
    against the last one is multiplied by the k - 1 steps that could have been chosen. Pairs of one
    prompt are one draw. The verdict is on these checkpoints.

    Args:
        scores: HELD_OUT_SCORES frame.

    Returns:
        BEST_STEPS frame.
    """
    base, rows = scores.filter(arm="base"), []
    for (arm, seed), own in scores.filter(pl.col("arm") != "base").group_by("arm", "seed", maintain_order=True):
        steps = pl.concat([base, own])
        judged = summarise_margins(steps, ["step"]).sort("accuracy", "mean", "step", descending=[True, True, False])
        best, last = judged["step"][0], judged["step"].max()
        others = judged.height - 1
        right = steps.filter(pl.col("step").is_in([best, last])).select(
            "step", "pair_id", "prompt_id", right=100.0 * (LOGP_MARGIN > 0)
        )
        both = right.filter(step=best).join(right.filter(step=last), on="pair_id").sort("pair_id")
        values = (both["right"] - both["right_right"]).to_numpy()
        effect = compare_checkpoints(
            [Differences.of(values, clusters=both["prompt_id"].to_numpy())], alpha=ALPHA / others
        )
        p = None if effect.p is None else min(1.0, effect.p * others)
        known = (effect.value, effect.stderr, effect.low, effect.high, effect.n, p, judge(effect.value, p))
        rows.append((arm, seed, best, last, *known))
    return pl.DataFrame(rows, BEST_STEPS, orient="row")


def main() -> None:
    """Write RUN/held_out_scores/*.parquet, and show reward accuracy and margin by step."""
    call = read_command("python -m sdpo_eval.held_out", __doc__, "score", {"score": ScoreConfig}, unread=UNREAD)
    config = call.settings["score"]
    assert isinstance(config, ScoreConfig)
    made = call.run.lineage
    scores = score_held_out(call.run, call.model, config, force=call.force)
    if not workers.is_main():
        return
    if call.run.lineage == made:
        say(f"up to date: {call.run.path / 'held_out_scores'}")
        return
    measured = summarise_margins(scores, UNIT)
    shown: dict[str, Any] = {"accuracy": pl.col("accuracy").round(1), "margin": pl.col("mean").round(3)}
    title = f"{call.run.path / 'held_out_scores'}: reward accuracy (percent) and mean margin (nats) on held-out pairs"
    print_table(measured.select(*UNIT, **shown, pairs="n"), title)


if __name__ == "__main__":
    command(main)
