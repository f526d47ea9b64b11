"""What a call would train: arms and what tells them apart, units with pairs, tokens and updates. Runs nothing."""

import json

import polars as pl

from sdpo_data.console import print_table, say
from sdpo_data.run import Run
from sdpo_train.arms import compare_arms, variants
from sdpo_train.config import TrainConfig
from sdpo_train.steps import Chain, chain

TOKENS = pl.sum_horizontal("prompt_tokens", "chosen_tokens", "rejected_tokens")


def print_plan(run: Run, config: TrainConfig, model: str, *, as_json: bool) -> None:
    """Show the arms, and every unit of work with its size and whether it is done."""
    units, arms = plan_units(run, config, model), compare_arms(variants(config), run.partition)
    if as_json:
        say(json.dumps({"arms": arms.to_dicts(), "units": units.to_dicts()}, indent=1))
        return
    print_table(arms, "arms, computed from their declarations")
    print_table(units, "units of work: each can be run by itself with --unit")


def plan_units(run: Run, config: TrainConfig, model: str) -> pl.DataFrame:
    """List the units of work of a run.

    Returns:
        A row per unit: unit (arm/seed/step), pairs, tokens (prompt + chosen + rejected, all epochs; null
        where the arm decides only then which pairs), updates, state ("done" or "to do").
    """
    partition, scores = run.partition, run.scores
    chains = [chain(run, one, seed, partition, model, scores) for one in variants(config) for seed in config.seeds]
    return pl.DataFrame([row for own in chains for row in _units(own, scores)])


def _units(own: Chain, scores: pl.DataFrame) -> list[dict[str, object]]:
    rows = []
    for step in own.steps:
        pairs = own.order.filter(pl.col("step") == step).select("pair_id")
        epochs = own.config[step - 1].epochs
        known = not (own.variant.arm.adaptive and step > 1 and own.row(step) is None)
        tokens = pairs.join(scores, on="pair_id", how="left").select(TOKENS.sum()).item() * epochs if known else None
        state = "to do" if own.row(step) is None else "done"
        unit = f"{own.variant.label}/{own.seed}/{step}"
        rows.append(
            {"unit": unit, "pairs": pairs.height, "tokens": tokens, "updates": own.updates(step), "state": state}
        )
    return rows
