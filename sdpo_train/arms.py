"""Arms of an experiment: what each changes in the partition, the reference or the start. No torch."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from sdpo_data.tables import PARTITION, SdpoError, check

Model = Literal["previous", "base"]


@dataclass(frozen=True)
class Arm:
    """One way of going through the pairs; the fields are all that tells arms apart."""

    summary: str
    one_step: bool = False
    """All pairs in one step, in one shuffle, instead of the partition's steps."""
    start: Model = "previous"
    """Model a step's policy starts from: the model of the step before, or S."""
    reference: Model = "previous"
    """Model a step is regularised towards."""


ARMS = {
    "sdpo": Arm("steps from easy to hard, each from and towards the model of the step before (arXiv 2403.19270)"),
    "dpo": Arm("plain DPO: all pairs in one step, from and towards S", one_step=True),
}


def arm_named(name: str) -> Arm:
    """Look an arm up.

    Raises:
        SdpoError: there is none of that name.
    """
    if name not in ARMS:
        raise SdpoError(f"train.arms has {name!r}, which is not an arm. There are: {', '.join(ARMS)}.")
    return ARMS[name]


def arm_partition(arm: Arm, partition: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Give the pairs the steps and the order in which this arm and seed trains on them.

    Seed 0 of an arm with steps keeps the partition's own order; every other seed, and every arm
    of one step, draws the order inside its steps anew.

    Returns:
        PARTITION frame, sorted by rank.
    """
    partition = check(partition, PARTITION, "partition").sort("rank")
    if arm.one_step:
        partition = partition.with_columns(step=pl.lit(1, pl.Int64))
    elif seed == 0:
        return partition
    drawn = np.random.default_rng([seed, 1]).permutation(partition.height)
    shuffled = partition.sort("pair_id").with_columns(drawn=drawn).sort("step", "drawn")
    return shuffled.with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int64)).select(list(PARTITION))
