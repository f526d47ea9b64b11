"""What one step is asked to do, whoever asks and whoever does it. No torch."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from sdpo_train.config import NOT_NUMBERS, NOT_NUMBERS_OF_TRL, StepConfig

Parts = Literal["given", "rising", "falling"]


@dataclass(frozen=True)
class StepWork:
    """Everything one step needs beside its settings; what it gives back is its STEPS row."""

    arm: str
    seed: int
    step: int
    pairs: pl.DataFrame
    """PAIRS in training order."""
    start: str
    """Folder or name of the model the policy starts from."""
    start_key: str
    """The key its weights must have."""
    reference: str
    reference_key: str
    scores: pl.DataFrame | None
    """SCORES of all pairs under S, if known: what the reference must agree with where it is S."""
    out: Path
    """Folder to write."""
    base: str | None = None
    """Folder or name of S, for what is told of the distance from it; None for the start."""
    held_out: pl.DataFrame | None = None
    """PAIRS that no step trains on, to tell what is forgotten."""
    partition: pl.DataFrame | None = None
    """PARTITION of the whole arm, each pair once, `difficulty` what its steps were filled by: which of them a held-out
    pair would have been in. None where that cannot be told: see `steps.tell_parts`."""
    held_out_parts: pl.DataFrame | None = None
    """PARTITION of the held-out pairs that partition.hold_out took: where there are any, they alone count."""
    parts: Parts = "given"
    """Whether `held_out_parts` are the arm's own, or are to be told by difficulty, which rises or falls from step to
    step."""
    definition: str = "margin_per_token"
    """The difficulty whose drift is told."""
    updates_before: int = 0
    """Updates of the arm's earlier steps, and of all its steps: where on a whole-run schedule this one is."""
    updates_in_all: int | None = None
    moments: Path | None = None
    """Folder of the step whose optimizer state is carried on."""
    store: str | None = None
    """Score store; None for the cache folder."""
    token_budget: int | None = None
    """Tokens of a forward pass when scoring; None for what suits the device."""

    def key(self, config: StepConfig) -> str:
        """Name what the step computes: equal keys give equal weights, whatever the arm is called."""
        what = recipe(config) | {
            "seed": self.seed,
            "start": self.start_key,
            "reference": self.reference_key,
            "pairs": self.pairs["pair_id"].to_list(),
            "schedule_at": [self.updates_before, self.updates_in_all] if config.schedule == "whole_run" else None,
            "moments": self.start_key if self.moments else None,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


TrainStep = Callable[[StepWork, StepConfig], dict[str, Any]]


def recipe(config: StepConfig) -> dict[str, Any]:
    """Give the settings that change the numbers of one step."""
    trl = {name: value for name, value in config.trl.items() if name not in NOT_NUMBERS_OF_TRL}
    return config.model_dump(exclude=NOT_NUMBERS) | {"trl": trl}


def count_updates(pairs: int, config: StepConfig) -> int:
    """Count the optimiser updates over so many pairs, with one step's settings."""
    return -(-pairs // config.batch_pairs) * config.epochs
