"""What a call would train: arms and what tells them apart, units with their size and cost. Runs nothing."""

import json
from typing import Any

import polars as pl

from sdpo_data.console import print_table, say
from sdpo_data.run import Run
from sdpo_train import cost
from sdpo_train.arms import compare_arms, variants
from sdpo_train.config import TrainConfig
from sdpo_train.steps import Chain, chain

ROW_TOKENS = 512  # what prefix.py takes per forward pass on a CPU; the plan is of the machine that prints it


def print_plan(run: Run, config: TrainConfig, model: str, *, as_json: bool) -> None:
    """Show the arms, and every unit of work with its size, what it costs, and whether it is done."""
    units, arms = plan_units(run, config, model), compare_arms(variants(config), run.partition)
    if as_json:
        say(json.dumps({"arms": arms.to_dicts(), "units": units}, indent=1))
        return
    print_table(arms, "arms, computed from their declarations")
    rows = [
        {
            "unit": unit["unit"],
            "state": unit["state"],
            **{name: unit[name] for name in ("pairs", "tokens", "updates")},
            "memory, GiB": unit["memory"] / 2**30,
            "minutes": None
            if unit["seconds"] is None
            else "{:.1f} to {:.1f}".format(*(s / 60 for s in unit["seconds"])),
        }
        for unit in units
    ]
    print_table(pl.DataFrame(rows, infer_schema_length=None), "units of work: each can be run by itself with --unit")
    for name in ("basis", "advice"):
        for said in dict.fromkeys(unit[name] for unit in units if unit[name]):
            say(f"{'time' if name == 'basis' else 'memory'}: {said}")


def plan_units(run: Run, config: TrainConfig, model: str) -> list[dict[str, Any]]:
    """List the units of work of a run, each as `cost.plan_unit` tells it, with `unit` (arm/seed/step) and `state`.

    Of an adaptive arm's later steps it is not known before which pairs they take: their tokens, memory
    and time are those of the pairs that S finds next.
    """
    partition, scores, shape = run.partition, run.scores, cost.read_shape(model)
    seconds = run.lineage.get("scores", {}).get("seconds", 0.0)
    steps = run.steps.filter(pl.col("shared_from").is_null())
    known: dict[str, Any] = {
        "available": cost.available_memory(),
        "scored": (cost.count_tokens(scores), seconds),
        "trained": (int(steps["tokens"].sum()), float(steps["seconds"].sum())) if steps.height else None,
    }
    chains = [chain(run, one, seed, partition, model, scores) for one in variants(config) for seed in config.seeds]
    return [row for own in chains for row in _units(own, scores, shape, known)]


def _units(own: Chain, scores: pl.DataFrame, shape: cost.Shape, known: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for step, config in enumerate(own.config, 1):
        pairs = own.order.filter(pl.col("step") == step).select("pair_id").join(scores, on="pair_id")
        unit = cost.Unit(
            row_tokens=config.token_budget or ROW_TOKENS,
            longest=config.max_length,
            lora_rank=config.lora_rank,
            gradient_checkpointing=config.gradient_checkpointing,
            dtype=config.dtype,
        )
        size = cost.plan_unit(shape, pairs, unit, epochs=config.epochs, batch_pairs=config.batch_pairs, **known)
        state = "to do" if own.row(step) is None else "done"
        rows.append({"unit": f"{own.variant.label}/{own.seed}/{step}", "state": state, **size})
    return rows
