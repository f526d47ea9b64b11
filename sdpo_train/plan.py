"""What a call would train: arms and what tells them apart, units with their size and cost. Runs nothing."""

import hashlib
import json
from typing import Any

import polars as pl

from sdpo_data.console import print_table, say
from sdpo_data.run import Run
from sdpo_train import cost
from sdpo_train.arms import compare_arms, variants
from sdpo_train.config import ROW_TOKENS, StepConfig, TrainConfig
from sdpo_train.steps import Chain, chain
from sdpo_train.work import recipe


def print_plan(run: Run, config: TrainConfig, model: str, *, as_json: bool) -> None:
    """Show the arms, and every unit of work with its size, what it costs, and whether it is done."""
    units, arms = plan_units(run, config, model), compare_arms(variants(config), run.partition, run.scores)
    if as_json:
        say(json.dumps({"arms": arms.to_dicts(), "units": units}, indent=1))
        return
    print_table(arms, "arms, computed from their declarations")
    again = sum(unit["scored_again"] for unit in units)
    rows = [
        {
            "unit": unit["unit"],
            "state": unit["state"],
            **{name: unit[name] for name in ("pairs", "tokens")},
            **({"scored again": unit["scored_again"]} if again else {}),
            "updates": unit["updates"],
            "memory, GiB": unit["memory"] / 2**30,
            "minutes": None
            if unit["seconds"] is None
            else "{:.1f} to {:.1f}".format(*(s / 60 for s in unit["seconds"])),
        }
        for unit in units
    ]
    print_table(pl.DataFrame(rows, infer_schema_length=None), "units of work: each can be run by itself with --unit")
    if again:
        own, known = StepConfig(dtype=config.dtype).scored_in, ", ".join(run.scores["dtype"].unique().sort())
        say(
            f"scored again: {run.path / 'scores.parquet'} is in {known}, but training computes in {own}, so {again:,} "
            f"tokens take a forward pass more, unless the score store has them; score.dtype {own} saves it."
        )
    for name in ("basis", "advice"):
        for said in dict.fromkeys(unit[name] for unit in units if unit[name]):
            say(f"{'time' if name == 'basis' else 'memory'}: {said}")


def plan_units(run: Run, config: TrainConfig, model: str) -> list[dict[str, Any]]:
    """List the units of work of a run, each as `cost.plan_unit` tells it for this machine, and with its state.

    Of an adaptive arm's later steps it is not known before which pairs they take: their tokens, memory
    and time are those of the pairs that S finds next.

    Where SCORES are in another dtype than training computes in, a pair is scored once more by the first
    unit that is to be held to S on it: its `scored_again`.

    Returns:
        Rows with `unit` (arm/seed/step), `state` (done, to do, or the unit that it is the same as), and
        what `cost.plan_unit` tells.
    """
    partition, scores = run.partition, run.scores
    steps = run.steps.filter(pl.col("shared_from").is_null())
    device, available = _device()
    known: dict[str, Any] = {
        "available": available,
        "scored": (cost.count_tokens(scores), run.lineage.get("scores", {}).get("seconds", 0.0)),
        "trained": (int(steps["tokens"].sum()), float(steps["seconds"].sum())) if steps.height else None,
    }
    shape, seen, rows = cost.read_shape(model), {}, []
    scored = pl.Series("pair_id", [], pl.String)  # under S by the units so far, which keep it for the others
    for own in (chain(run, one, seed, partition, model, scores) for one in variants(config) for seed in config.seeds):
        for step, settings in enumerate(own.config, 1):
            pairs = own.order.filter(pl.col("step") == step).select("pair_id").join(scores, on="pair_id")
            unit = cost.Unit(
                row_tokens=settings.token_budget or ROW_TOKENS[device],
                longest=settings.max_length,
                lora_rank=settings.lora_rank,
                gradient_checkpointing=settings.gradient_checkpointing,
                dtype=settings.dtype,
                device=device,
            )
            again = pairs.clear()
            if step == 1 or own.variant.arm.reference == "base":
                again = pairs.filter(pl.col("dtype") != settings.scored_in, ~pl.col("pair_id").is_in(scored.implode()))
                scored = scored.append(pairs["pair_id"])
            size = cost.plan_unit(
                shape, pairs, unit, epochs=settings.epochs, batch_pairs=settings.batch_pairs,
                scored_again=0 if own.row(step) else cost.count_tokens(again), **known,
            )  # fmt: skip
            name = f"{own.variant.label}/{own.seed}/{step}"
            first = seen.setdefault(_content(own, step), name)
            state = "done" if own.row(step) else "to do" if first == name else f"as {first}"
            rows.append({"unit": name, "state": state, **size})
    return rows


def _content(own: Chain, step: int) -> str:
    """Tell what a step computes before anything is trained: equal contents are computed once."""
    arm = own.variant.arm
    if not step:
        return "S"
    if arm.adaptive and step > 1:
        return f"{own.name} {step}"
    ids = own.order.filter(pl.col("step") == step).sort("rank")["pair_id"].to_list()
    models = [_content(own, step - 1 if which == "previous" else 0) for which in (arm.start, arm.reference)]
    place = [own.updates(one) for one in own.steps] if own.config[step - 1].schedule == "whole_run" else None
    what = [recipe(own.config[step - 1]), own.seed, ids, models, place]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _device() -> tuple[cost.Device, int]:
    """Give the device that training here would use, and the bytes it has left."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.mem_get_info()[0]
    return "cpu", cost.available_memory()
