"""The stepwise loop: which step starts from and refers to which model, what is done, what is next.

Needs no torch: the work of one step is passed in.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pydantic

from sdpo_data.config import Settings, merge_config
from sdpo_data.run import Run, write_atomically
from sdpo_data.tables import PAIRS, PARTITION, SCORES, STEPS, SdpoError, check
from sdpo_train.arms import Arm, arm_named, arm_partition

log = logging.getLogger(__name__)

NOT_NUMBERS = {"arms", "seeds", "token_budget"}  # settings that do not change what one step computes


class TrainConfig(Settings):
    arms: list[str] = pydantic.Field(["sdpo"], min_length=1)
    """Which arms to run: sdpo, dpo."""
    seeds: list[int] = pydantic.Field([0], min_length=1)
    """One run of every arm per seed: order inside the steps, LoRA initialisation."""
    beta: float = pydantic.Field(0.1, gt=0)
    """Strength of the pull towards the reference. alignment-handbook's Zephyr recipe has 0.01."""
    learning_rate: float = pydantic.Field(5e-7, gt=0)
    """Peak learning rate. LoRA wants about ten times that of a full fine-tune."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule, anew in every step."""
    warmup: float = pydantic.Field(0.1, ge=0, lt=1)
    """Share of a step's updates over which the learning rate rises."""
    epochs: int = pydantic.Field(1, ge=1)
    """Passes over a step's pairs."""
    batch_pairs: int = pydantic.Field(32, ge=1)
    """Pairs per optimiser update, over all devices."""
    token_budget: int | None = pydantic.Field(None, ge=1)
    """Tokens per forward pass at most, where a pair has no more; None for what suits the device. Lower it where
    memory runs out."""
    lora_rank: int = pydantic.Field(0, ge=0)
    """Rank of LoRA adapters on all linear layers, merged after every step; 0 trains all weights."""
    max_length: int = pydantic.Field(1024, ge=2)
    """Longest prompt + answer, tokens; must cut nothing that score.max_length did not cut."""


@dataclass(frozen=True)
class StepWork:
    """Everything one step needs; what it gives back is its STEPS row."""

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
    """SCORES that may already hold the reference log-probabilities, if their model_key says so."""
    out: Path
    """Folder to write."""


TrainStep = Callable[[StepWork, TrainConfig], dict[str, Any]]


def run_sdpo(
    pairs: pl.DataFrame,
    partition: pl.DataFrame,
    model: str | Path,
    out: str | Path,
    *,
    scores: pl.DataFrame | None = None,
    config: TrainConfig | None = None,
    force: bool = False,
    train_step: TrainStep | None = None,
) -> pl.DataFrame:
    """Align `model` step by step: each step starts from, and refers to, the model before it.

    A step counts as done when its row is in arms/<arm>/seed_<s>/steps.parquet, which is written
    last. A killed run, started again, repeats only the step it died in.

    Args:
        pairs: PAIRS frame.
        partition: PARTITION frame; its rank is the training order.
        model: the reference model S: folder, hub id or embedded:NAME.
        out: run folder; models go to arms/<arm>/seed_<s>/step_<t>. The inputs are saved there too.
        scores: SCORES of the pairs under S; saves a scoring pass in step 1.
        force: train finished steps again.
        train_step: what one step does; `sdpo_train.dpo.train_step` unless given.

    Returns:
        STEPS frame of all arms and seeds asked for, finished ones included.

    Raises:
        SdpoError: a step was finished with other settings; a start or reference does not have the
            weights its arm declares; another process is at work on the same step.

    Source: arXiv 2403.19270, section 3.2: M_t = DPO(start M_{t-1}, reference M_{t-1}, D_t).
    """
    config = config or TrainConfig()
    arms = {name: arm_named(name) for name in config.arms}
    pairs, partition = check(pairs, PAIRS, "pairs"), check(partition, PARTITION, "partition")
    unknown = partition.join(pairs, on="pair_id", how="anti")
    if unknown.height:
        raise SdpoError(
            f"partition has {unknown.height} pair(s) that pairs does not have, e.g. {unknown['pair_id'][0]!r}. "
            "Were they made from different data?"
        )
    run = Run(out)
    _save_inputs(run, {"pairs": (pairs, PAIRS), "partition": (partition, PARTITION), "scores": (scores, SCORES)})
    done = [
        _run_arm(run, name, arm, seed, pairs, partition, str(model), scores, config, force, train_step)
        for name, arm in arms.items()
        for seed in config.seeds
    ]
    return pl.concat(done)


def _run_arm(
    run: Run,
    name: str,
    arm: Arm,
    seed: int,
    pairs: pl.DataFrame,
    partition: pl.DataFrame,
    base: str,
    scores: pl.DataFrame | None,
    config: TrainConfig,
    force: bool,  # noqa: FBT001
    train_step: TrainStep | None,
) -> pl.DataFrame:
    from sdpo_data.models import model_key  # reads the weights' files: no torch

    folder = run.path / "arms" / name / f"seed_{seed}"
    order = arm_partition(arm, partition, seed)
    models = [(base, model_key(base))]  # (name, key) of S, M_1, M_2, ...
    for step in range(1, int(order["step"].max()) + 1):  # type: ignore[arg-type]
        start, reference = ({"previous": models[-1], "base": models[0]}[which] for which in (arm.start, arm.reference))
        unit = f"arms/{name}/seed_{seed}/step_{step}"
        recipe = config.model_dump(exclude=NOT_NUMBERS) | {"start": start[1], "reference": reference[1]}
        with run.stage(unit, recipe, ["pairs", "partition"], force=force) as stage:
            if not stage.current:
                merge_config(run, {"model": base, "train": config.model_dump(mode="json")})
                write_atomically(folder / "partition.parquet", order.write_parquet)
                step_pairs = (
                    order.filter(pl.col("step") == step)
                    .select("pair_id")
                    .join(pairs, on="pair_id", maintain_order="left")
                )
                work = StepWork(name, seed, step, step_pairs, *start, *reference, scores, run.path / unit)
                log.info("%s seed %d step %d: %d pairs from %s", name, seed, step, step_pairs.height, start[0])
                row = (train_step or _dpo_step())(work, config)
                _add_row(folder / "steps.parquet", row)
                stage.outputs += [unit, f"arms/{name}/seed_{seed}/steps.parquet"]
        row = pl.read_parquet(folder / "steps.parquet").filter(pl.col("step") == step).row(0, named=True)
        models.append((row["model"], row["model_key"]))
    return pl.read_parquet(folder / "steps.parquet").sort("step")


def _dpo_step() -> TrainStep:
    from sdpo_train.dpo import train_step  # torch and trl load only when there is a step to train

    return train_step


def _add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a finished step to STEPS; it, and what came after it before, give way."""
    old = pl.read_parquet(path).filter(pl.col("step") < row["step"]) if path.exists() else STEPS.to_frame()
    write_atomically(path, pl.concat([old, pl.DataFrame([row], STEPS)]).write_parquet)


def _save_inputs(run: Run, tables: dict[str, tuple[pl.DataFrame | None, pl.Schema]]) -> None:
    """Keep the inputs in the run folder, where report and evaluation look for them."""
    for name, (frame, schema) in tables.items():
        path = run.path / f"{name}.parquet"
        if frame is None:
            continue
        frame = frame.select(list(schema))
        if not path.exists():
            write_atomically(path, frame.write_parquet)
        elif not pl.read_parquet(path).select(list(schema)).sort("pair_id").equals(frame.sort("pair_id")):
            raise SdpoError(f"{path} already holds other {name}. Choose another run folder.")
