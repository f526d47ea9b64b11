"""Arms of an experiment: what each changes in the order, the reference or the start. No torch."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Literal

import polars as pl

from sdpo_data import orders
from sdpo_data.tables import PARTITION, SdpoError, check
from sdpo_train.config import StepConfig, TrainConfig, step_config
from sdpo_train.cost import count_tokens
from sdpo_train.work import count_updates

Model = Literal["previous", "base"]


@dataclass(frozen=True)
class Arm:
    """One way of going through the pairs; the fields are all that tells arms apart."""

    summary: str
    order: orders.Order = "easy_to_hard"
    """Which pairs a step trains on (easy_to_hard: the partition's own); steps keep their sizes."""
    one_step: bool = False
    """All pairs in one step: one schedule, one optimizer, one reference."""
    cumulative: bool = False
    """Step t trains on parts 1 to t."""
    selective: bool = False
    """Leave out the hardest share of the pairs (train.selective_share)."""
    adaptive: bool = False
    """After each step, score what is left with the new model, and take the easiest of it."""
    start: Model = "previous"
    """Model a step's policy starts from: the model of the step before, or S."""
    reference: Model = "previous"
    """Model a step is regularised towards."""
    beta_over_steps: bool = False
    """Divide beta by the partition's number of steps."""


ARMS = {
    "sdpo": Arm("steps from easy to hard, each from and towards the model of the step before (arXiv 2403.19270)"),
    "sdpo_fixed": Arm("easy to hard, but every step is regularised towards S", reference="base"),
    "random": Arm("steps of random pairs, moving reference: the paper's sDPO Rand.", order="random"),
    "random_fixed": Arm("steps of random pairs, regularised towards S", order="random", reference="base"),
    "dpo": Arm(
        "plain DPO: all pairs in one step, shuffled, from and towards S; T steps have as many updates or up to "
        "T - 1 an epoch more, as a step's last one may have fewer pairs",
        order="random",
        one_step=True,
    ),
    "dpo_sorted": Arm("plain DPO in one step, in the order of the curriculum", one_step=True),
    "dpo_beta_over_t": Arm(
        "plain DPO at beta / T: T steps on one reward have the optimum of one DPO at beta / T",
        order="random",
        one_step=True,
        beta_over_steps=True,
    ),
    "hard_to_easy": Arm("the steps the other way round", order="hard_to_easy"),
    "stratified": Arm("steps that each have the mix of the whole", order="stratified"),
    "length_only": Arm("steps by token difference: is difficulty more than length?", order="token_difference"),
    "target_from_s": Arm(
        "the paper's Figure 3: every step starts from S, towards the model of the step before; so only the last part "
        "is trained on, and there is no zero margin at the start",
        start="base",
    ),
    "cumulative": Arm("step t trains on parts 1 to t", cumulative=True),
    "adaptive": Arm("after each step the pairs that are left are scored and cut anew", adaptive=True),
    "selective": Arm("easy to hard without the hardest pairs (arXiv 2502.09650)", selective=True),
}
CORE = ("sdpo", "sdpo_fixed", "random", "random_fixed")  # {easy to hard, random} x {moving, fixed} reference


@dataclass(frozen=True)
class Variant:
    """An arm with its settings: one row of an experiment, a folder in the run."""

    label: str
    arm: Arm
    config: TrainConfig


def arm_named(name: str) -> Arm:
    """Look an arm up.

    Raises:
        SdpoError: there is none of that name.
    """
    if name not in ARMS:
        raise SdpoError(f"train.arms has {name!r}, which is not an arm. There are: {', '.join(ARMS)}; core, all.")
    return ARMS[name]


def variants(config: TrainConfig) -> list[Variant]:
    """Give every arm asked for, at every point of the grid of train.tune, under its own label."""
    names = []
    for name in config.arms:
        names += {"all": list(ARMS), "core": list(CORE)}.get(name, [name])
    grid: list[dict[str, float]] = [
        dict(zip(map(str, config.tune), point, strict=True)) for point in itertools.product(*config.tune.values())
    ]
    found = []
    for name, point in itertools.product(dict.fromkeys(names), grid):
        label = ",".join([name, *(f"{key}={value:g}" for key, value in point.items())])
        found.append(Variant(label, arm_named(name), config.model_copy(update=point)))
    return found


def arm_config(variant: Variant, step: int, steps: int, partition: pl.DataFrame) -> StepConfig:
    """Give the settings of one step of an arm: the list's own value, and beta over T where the arm says so."""
    own = step_config(variant.config, step, steps, variant.label)
    if variant.arm.beta_over_steps:
        own = own.model_copy(update={"beta": own.beta / partition["step"].n_unique()})
    return own


def arm_partition(
    arm: Arm, partition: pl.DataFrame, seed: int, scores: pl.DataFrame | None = None, selective_share: float = 0.5
) -> pl.DataFrame:
    """Give the pairs the steps and the order in which this arm and seed trains on them.

    Seed 0 of an arm that keeps the partition's steps keeps its order too; every other seed draws
    the order inside the steps anew.

    Args:
        scores: SCORES under S; only `length_only` needs them.
        selective_share: share of the pairs that `selective` leaves out.

    Returns:
        PARTITION frame, sorted by rank.

    Raises:
        SdpoError: the arm is by length, and there are no scores; or it cannot be cut so.
    """
    own = check(partition, PARTITION, "partition").sort("rank")
    if arm.selective:
        own = orders.drop_hardest(own, selective_share)
    if arm.order == "random" and arm.one_step:
        return orders.merge_steps(own, seed=seed)
    if arm.order != "easy_to_hard":
        own = orders.rearrange(own, arm.order, seed=seed, scores=scores)
    elif seed:
        own = orders.order_within(own, "shuffle", seed=seed)
    if arm.cumulative:
        own = orders.accumulate(own, seed=seed)
    if arm.one_step:  # of a cumulative partition every pair once, where it comes first
        own = own.unique("pair_id", keep="first", maintain_order=True)
        return own.with_columns(step=pl.lit(1, pl.Int64), rank=pl.int_range(pl.len(), dtype=pl.Int64))
    return own


def compare_arms(found: list[Variant], partition: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    """Say which arms differ in what, computed from their declarations, and where they are not equal in size.

    Args:
        scores: SCORES of the pairs under S.

    Returns:
        A row per arm: arm, what it is, its steps, pairs, tokens (prompt + chosen + rejected, all epochs)
        and updates, and all in which it differs from the first one. Of `adaptive` the tokens are those
        of the pairs that S finds easiest.
    """
    rows = []
    for one in found:
        order = arm_partition(one.arm, partition, 0, scores, one.config.selective_share)
        row = {"steps": order["step"].n_unique(), "pairs": order.height, "tokens": 0, "updates": 0}
        for step, part in enumerate(order.partition_by("step"), 1):
            config = arm_config(one, step, row["steps"], partition)
            row["tokens"] += count_tokens(part.select("pair_id").join(scores, on="pair_id")) * config.epochs
            row["updates"] += count_updates(part.height, config)
        fields = {
            key: value for key, value in dataclasses.asdict(one.arm).items() if key not in ("summary", "one_step")
        }
        points = {key: getattr(one.config, key) for key in one.config.tune}
        rows.append((one, row, fields | points | row))
    first = rows[0][2]
    differ = [
        "; ".join(f"{key} {first[key]} -> {all_[key]}" for key in first if all_[key] != first[key]) for *_, all_ in rows
    ]
    columns = [
        {"arm": one.label, "what": one.arm.summary, **row, f"against {rows[0][0].label}": text or "the same"}
        for (one, row, _), text in zip(rows, differ, strict=True)
    ]
    return pl.DataFrame(columns)
