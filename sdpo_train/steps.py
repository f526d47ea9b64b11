"""The stepwise loop: which step starts from and refers to which model, what is done, what is next.

Needs no torch: the work of one step is passed in.
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from sdpo_data import orders, workers
from sdpo_data.config import merge_config
from sdpo_data.difficulty import difficulty_named
from sdpo_data.run import Run, write_atomically
from sdpo_data.tables import METRICS, PAIRS, PARTITION, SCORES, STEPS, TOKEN_DIFFERENCE, SdpoError, check
from sdpo_train.arms import Variant, arm_config, arm_partition, variants
from sdpo_train.card import write_card
from sdpo_train.config import StepConfig, TrainConfig
from sdpo_train.failures import stopped_by_signals
from sdpo_train.work import StepWork, TrainStep, count_updates, recipe

log = logging.getLogger(__name__)

Rescore = Callable[[pl.DataFrame, str, "Inputs", StepConfig], pl.DataFrame]
"""PAIRS, a model's folder, where its scores are kept, settings -> SCORES."""


@dataclass
class Chain:
    """One arm under one seed: a line of models, each made from those before it."""

    run: Run
    variant: Variant
    seed: int
    order: pl.DataFrame
    """PARTITION as this arm and seed trains on it."""
    base: tuple[str, str]
    """Name and key of S."""
    config: list[StepConfig] = field(default_factory=list)
    """Settings of each step."""

    @property
    def name(self) -> str:
        return f"arms/{self.variant.label}/seed_{self.seed}"

    @property
    def folder(self) -> Path:
        return self.run.path / self.name

    @property
    def steps(self) -> range:
        return range(1, len(self.config) + 1)

    def unit(self, step: int) -> tuple[str, int, int]:
        """Name a step as --unit does: arm, seed, step."""
        return self.variant.label, self.seed, step

    def row(self, step: int) -> dict[str, Any] | None:
        """Give the STEPS row of a finished step."""
        path = self.folder / "steps.parquet"
        rows = pl.read_parquet(path).filter(pl.col("step") == step) if path.exists() else STEPS.to_frame()
        return rows.row(0, named=True) if rows.height else None

    def model(self, step: int) -> tuple[str, str]:
        """Give name and key of M_step; of S for step 0.

        Raises:
            SdpoError: that step is not finished.
        """
        if not step:
            return self.base
        if (row := self.row(step)) is None:
            raise SdpoError(
                f"{self.name}/step_{step + 1} starts from step {step}, which is not finished. "
                f"Train it first: --unit {self.variant.label}/{self.seed}/{step}"
            )
        return str(self.folder / f"step_{step}"), row["model_key"]  # wherever the run lies now

    def updates(self, step: int) -> int:
        return count_updates(self.order.filter(pl.col("step") == step).height, self.config[step - 1])


@dataclass(frozen=True)
class Inputs:
    """What all units of a run work on."""

    config: TrainConfig
    pairs: pl.DataFrame
    scores: pl.DataFrame | None
    held_out: pl.DataFrame | None
    held_out_parts: pl.DataFrame | None
    store: str | None
    token_budget: int | None
    force: bool
    train_step: TrainStep | None
    rescore: Rescore | None


def run_sdpo(
    pairs: pl.DataFrame,
    partition: pl.DataFrame,
    model: str | Path,
    out: str | Path,
    *,
    scores: pl.DataFrame | None = None,
    config: TrainConfig | None = None,
    units: Sequence[str] = (),
    force: bool = False,
    store: str | None = None,
    token_budget: int | None = None,
    train_step: TrainStep | None = None,
    rescore: Rescore | None = None,
) -> pl.DataFrame:
    """Align `model` step by step: each step starts from, and refers to, the model before it.

    A step counts as done when its row is in arms/<arm>/seed_<s>/steps.parquet, which is written
    last. A killed run, started again, goes on inside the step it died in. What another arm has
    already done under another name (step 1 of arms that agree there) is shared, not repeated.

    Args:
        pairs: PAIRS frame.
        partition: PARTITION frame; its rank is the training order.
        model: the reference model S: folder, hub id or embedded:NAME.
        out: run folder; models go to arms/<arm>/seed_<s>/step_<t>. The inputs are saved there too.
        scores: SCORES of the pairs under S. Whoever made them left them in the score store, which saves step 1 a pass.
        units: only these, as arm/seed/step; all of config's arms and seeds if empty.
        force: train finished steps again.
        store: folder of the score store; the cache folder unless given.
        token_budget: tokens per forward pass when scoring.
        train_step: what one step does; `sdpo_train.dpo.train_step` unless given.
        rescore: how `adaptive` scores what is left; `sdpo_train.dpo.rescore` unless given.

    Returns:
        STEPS frame of all arms and seeds asked for, finished ones included.

    Raises:
        SdpoError: a step was finished with other settings; train.trl is not for DPOConfig; a start or
            reference does not have the weights its arm declares; another process is at work on the
            same step.
        KeyboardInterrupt: a SIGTERM or Ctrl-C came; the same call goes on from there.

    Source: arXiv 2403.19270, section 3.2: M_t = DPO(start M_{t-1}, reference M_{t-1}, D_t).
    """
    config = config or TrainConfig()
    found = variants(config)
    pairs, partition = check(pairs, PAIRS, "pairs"), check(partition, PARTITION, "partition")
    unknown = partition.join(pairs, on="pair_id", how="anti")
    if unknown.height:
        raise SdpoError(
            f"partition has {unknown.height} pair(s) that pairs does not have, e.g. {unknown['pair_id'][0]!r}. "
            "Were they made from different data?"
        )
    run = Run(out)
    if workers.is_main():
        _save_inputs(run, {"pairs": (pairs, PAIRS), "partition": (partition, PARTITION), "scores": (scores, SCORES)})
    workers.wait()
    held_out, held_out_parts = _held_out(run, pairs)
    given = Inputs(config, pairs, scores, held_out, held_out_parts, store, token_budget, force, train_step, rescore)
    chains = [
        chain(run, one, seed, partition, str(model), scores, force=force) for one in found for seed in config.seeds
    ]
    wanted = _wanted(chains, units)
    undone = any(one.row(step) is None for one in chains for step in one.steps if one.unit(step) in wanted)
    if config.trl and train_step is None and (undone or force):
        from sdpo_train.trainer import check_trl_section  # before hours of training, not after

        check_trl_section(config)
    with stopped_by_signals():
        for one in chains:
            for step in one.steps:
                if one.unit(step) in wanted:
                    _run_unit(one, step, given)
                    if config.keep == "last" and workers.is_main():
                        _prune(chains, given)
            if one.row(one.steps[-1]) is not None:
                if workers.is_main() and train_step is None:
                    write_card(run, one.variant.label, one.seed)
                if config.export_dtype or config.push_to_hub:
                    _publish(one, given, alone=len(chains) == 1)
    done = [pl.read_parquet(path) for one in chains if (path := one.folder / "steps.parquet").exists()]
    return check(pl.concat([STEPS.to_frame(), *(rows.select(list(STEPS)) for rows in done)]), STEPS, "steps")


def chain(
    run: Run,
    variant: Variant,
    seed: int,
    partition: pl.DataFrame,
    base: str,
    scores: pl.DataFrame | None,
    *,
    force: bool = False,
) -> Chain:
    """Lay out one arm under one seed: its order, its settings step by step; with force as if nothing were done."""
    from sdpo_data.models import model_key  # reads the weights' files: no torch

    config = variant.config
    order = arm_partition(variant.arm, partition, seed, scores, config.selective_share)
    steps = order["step"].n_unique()
    own = Chain(run, variant, seed, order, (base, model_key(base)))
    own.config = [arm_config(variant, step, steps, partition) for step in range(1, steps + 1)]
    kept = own.folder / "partition.parquet"
    if variant.arm.adaptive and kept.exists() and not force:  # what finished steps trained on, their successors do not
        own.order = check(pl.read_parquet(kept), PARTITION, str(kept))
    return own


def _held_out(run: Run, pairs: pl.DataFrame) -> tuple[pl.DataFrame | None, pl.DataFrame | None]:
    """PAIRS that no step trains on, and PARTITION of those whose part is known; None where there are none."""
    there = {name: (run.path / f"{name}.parquet").exists() for name in ("held_out", "held_out_parts")}
    aside = [run.held_out] if there["held_out"] else []
    parts = check(run.read("held_out_parts"), PARTITION, "held_out_parts") if there["held_out_parts"] else None
    if parts is not None:
        aside.append(parts.select("pair_id").join(pairs, on="pair_id", maintain_order="left"))
    return (pl.concat(aside) if aside else None), parts


def _wanted(chains: list[Chain], units: Sequence[str]) -> set[tuple[str, int, int]]:
    there = {one.unit(step) for one in chains for step in one.steps}
    if not units:
        return there
    asked = set()
    for unit in units:
        parts = unit.rsplit("/", 2)
        if len(parts) != 3 or not (parts[1].isdigit() and parts[2].isdigit()):
            raise SdpoError(f"--unit {unit!r} is not arm/seed/step, such as sdpo/0/2.")
        key = (parts[0], int(parts[1]), int(parts[2]))
        if key not in there:
            known = ", ".join(sorted("/".join(map(str, one)) for one in there)[:8])
            raise SdpoError(f"--unit {unit!r} is not part of this run. There are, for example: {known}. See --plan.")
        asked.add(key)
    return asked


def _work(own: Chain, step: int, given: Inputs) -> StepWork:
    """Say what a step is to do: from which model, held to which, on which pairs."""
    arm, config = own.variant.arm, own.config[step - 1]
    start, reference = (
        {"previous": own.model(step - 1), "base": own.base}[which] for which in (arm.start, arm.reference)
    )
    order = own.order.filter(pl.col("step") == step).sort("rank")
    return StepWork(
        arm=own.variant.label,
        seed=own.seed,
        step=step,
        pairs=order.select("pair_id").join(given.pairs, on="pair_id", maintain_order="left"),
        start=start[0],
        start_key=start[1],
        reference=reference[0],
        reference_key=reference[1],
        scores=given.scores,
        out=own.folder / f"step_{step}",
        base=own.base[0],
        held_out=given.held_out,
        held_out_parts=given.held_out_parts,
        **tell_parts(own, given.scores),
        definition=own.order["definition"][0],
        updates_before=sum(own.updates(earlier) for earlier in range(1, step)),
        updates_in_all=sum(own.updates(one) for one in own.steps),
        moments=Path(start[0]) if config.optimizer == "carry" and step > 1 and arm.start == "previous" else None,
        store=given.store,
        token_budget=given.token_budget,
    )


def _run_unit(own: Chain, step: int, given: Inputs) -> None:
    """Train one step, share it with an arm that has it already, or find it finished."""
    unit, config = f"{own.name}/step_{step}", own.config[step - 1]
    if own.variant.arm.adaptive and step > 1 and own.row(step) is None:
        own.order = _adapted(own, step, given)
    work = _work(own, step, given)
    numbers = recipe(config) | {"start": work.start_key, "reference": work.reference_key, "work": work.key(config)}
    force = given.force or own.row(step) is None  # a row that a forced step before it took away
    with workers.main_stage(own.run, unit, numbers, ["pairs", "partition"], force=force) as stage:
        if stage.current:
            return
        if workers.is_main():
            for left in work.out.parent.glob(f".{work.out.name}.*.tmp"):  # by a kill; the lease is ours now
                shutil.rmtree(left, ignore_errors=True)
            merge_config(own.run, {"model": own.base[0], "train": given.config.model_dump(mode="json")})
            write_atomically(own.folder / "partition.parquet", own.order.write_parquet)
        twin = None if given.force else workers.from_main(lambda: _twin(own.run, unit, numbers["work"], config))
        if twin is not None:
            row = _share(own.run, twin, work) if workers.is_main() else {}
        else:
            log.info("%s seed %d step %d: %d pairs from %s", work.arm, own.seed, step, work.pairs.height, work.start)
            row = (given.train_step or _dpo_step())(work, config)
        if workers.is_main():
            _add_row(own.folder / "steps.parquet", row)
            shutil.rmtree(work.out.with_name(f"{work.out.name}.unfinished"), ignore_errors=True)
            stage.outputs += [unit, f"{own.name}/steps.parquet"]


def tell_parts(own: Chain, scores: pl.DataFrame | None) -> dict[str, Any]:
    """Say by what the part of a held-out pair is told, to know what is forgotten: `partition` and `parts` of StepWork.

    An arm that goes by difficulty, or by token difference, tells it by that. In an arm of random or
    stratified steps a held-out pair belongs to no step more than to another, and in one of a single
    step nothing is earlier: nothing is told there. `adaptive` ranks what is left by newer models: only
    its first part is one of S's.
    """
    arm = own.variant.arm
    if arm.order in ("random", "stratified") or arm.one_step:
        return {}
    rows = own.order.unique("pair_id", keep="first", maintain_order=True)  # a cumulative arm's where they come first
    if arm.order == "token_difference":
        assert scores is not None  # or it could not be ordered so
        lengths = scores.select("pair_id", difficulty=TOKEN_DIFFERENCE.cast(pl.Float64))
        rows = rows.drop("difficulty").join(lengths, on="pair_id", maintain_order="left")
        rows = rows.with_columns(definition=pl.lit("chosen_tokens - rejected_tokens")).select(list(PARTITION))
    whole = rows.group_by("source").agg(pl.col("step").n_unique())["step"].max() == 1
    if not (whole or difficulty_named(rows["definition"][0]).single_pairs):
        return {}  # a share over many pairs places no single one
    if arm.adaptive:
        rows = rows.with_columns(step=pl.when(pl.col("step") == 1).then(1).otherwise(own.steps.stop).cast(pl.Int64))
    keeps = arm.order == "easy_to_hard" and not (arm.selective or arm.adaptive)
    return {"partition": rows, "parts": "given" if keeps else "falling" if arm.order == "hard_to_easy" else "rising"}


def _adapted(own: Chain, step: int, given: Inputs) -> pl.DataFrame:
    """PARTITION with what is left after the steps before ranked anew under the last model: the easiest go next."""
    definition = difficulty_named(own.order["definition"][0])
    if not definition.single_pairs:
        raise SdpoError(
            f"Arm adaptive ranks single pairs anew after each step, but partition.difficulty is {definition.name!r}, a "
            "share over many. Set partition.difficulty to margin_per_token, or leave the arm out."
        )
    model, _ = own.model(step - 1)
    done, left = own.order.filter(pl.col("step") < step), own.order.filter(pl.col("step") >= step)
    pairs = left.select("pair_id").join(given.pairs, on="pair_id", maintain_order="left")
    scores = (given.rescore or _dpo_rescore())(pairs, model, given, own.config[step - 1])
    now = scores.select("pair_id", difficulty=definition.measure(scores))
    sizes = left.group_by("step").len().sort("step")["len"].to_list()
    steps = pl.Series("step", [step + place for place, size in enumerate(sizes) for _ in range(size)], pl.Int64)
    ranked = left.drop("difficulty", "step").join(now, on="pair_id").sort("difficulty", "pair_id").with_columns(steps)
    again = orders.order_within(pl.concat([done, ranked.select(list(PARTITION))]), "shuffle", seed=own.seed)
    return pl.concat([done, again.filter(pl.col("step") >= step)]).with_columns(
        rank=pl.int_range(pl.len(), dtype=pl.Int64)
    )


def _twin(run: Run, unit: str, work_key: str, config: StepConfig) -> str | None:
    """Find a finished step of another arm that computed the very same thing, and still has its weights."""
    for other, made in run.lineage.items():
        folder = run.path / other
        needs = ["*.safetensors", *(["optimizer/*.safetensors"] if config.optimizer == "carry" else [])]
        if (
            other != unit
            and made["recipe"].get("work") == work_key
            and all(any(folder.glob(pattern)) for pattern in needs)
        ):
            return other
    return None


def _share(run: Run, twin: str, work: StepWork) -> dict[str, Any]:
    """Give a step the files of its twin, by hard links where the disk has them, under its own name."""
    log.info("%s seed %d step %d is the same as %s: shared", work.arm, work.seed, work.step, twin)
    named = [pl.lit(work.arm).alias("arm"), pl.lit(work.step, pl.Int64).alias("step")]

    def write(folder: Path) -> None:
        shutil.copytree(run.path / twin, folder, copy_function=_link)
        metrics = pl.read_parquet(folder / "metrics.parquet").with_columns(named).select(list(METRICS))
        (folder / "metrics.parquet").unlink()  # a link: the twin keeps its own
        metrics.write_parquet(folder / "metrics.parquet")

    write_atomically(work.out, write)
    parent, step = twin.rsplit("/step_", 1)
    row = pl.read_parquet(run.path / parent / "steps.parquet").filter(pl.col("step") == int(step)).row(0, named=True)
    return row | {"arm": work.arm, "step": work.step, "model": str(work.out), "shared_from": twin}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _prune(chains: list[Chain], given: Inputs) -> None:
    """Remove the weights of steps whose successor is done, but of a first step that another arm can still share.

    Their tables stay.
    """
    waiting = {_work(one, 1, given).key(one.config[0]) for one in chains if one.row(1) is None}
    made = chains[0].run.lineage
    for one in chains:
        for step in one.steps[:-1]:
            row = made.get(f"{one.name}/step_{step}")
            if row is None or one.row(step + 1) is None or row["recipe"].get("work") in waiting:
                continue
            folder = one.folder / f"step_{step}"
            for path in (*folder.glob("**/*.safetensors"), *folder.glob("*.safetensors.index.json")):
                path.unlink(missing_ok=True)  # another job may prune too


def _publish(own: Chain, given: Inputs, *, alone: bool) -> None:
    """Write, and upload where asked, the last model of a chain: each once."""
    from sdpo_train.publish import publish, upload

    config = given.config
    if config.push_to_hub and not alone:
        raise SdpoError(
            f"train.push_to_hub {config.push_to_hub!r} names one repository, but several arms or seeds were trained. "
            "Name a single arm and seed with --arms and --seeds; what is trained is kept."
        )
    model, key = own.model(own.steps[-1])
    unit, numbers = f"{own.name}/published", {"model": key, "export_dtype": config.export_dtype}
    with workers.main_stage(own.run, unit, numbers, force=given.force) as stage:
        if not stage.current and workers.is_main():
            publish(Path(model), own.run.path / unit, config.export_dtype or "float32")
            stage.outputs.append(unit)
    if config.push_to_hub and workers.is_main():
        upload(own.run, own.name, config.push_to_hub, force=given.force)
    workers.wait()


def _dpo_step() -> TrainStep:
    from sdpo_train.dpo import train_step  # torch and trl load only when there is a step to train

    return train_step


def _dpo_rescore() -> Rescore:
    from sdpo_train.dpo import rescore

    return rescore


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
        key = [column for column in ("pair_id", "step") if column in schema]
        if not path.exists():
            write_atomically(path, frame.write_parquet)
        elif not pl.read_parquet(path).select(list(schema)).sort(key).equals(frame.sort(key)):
            raise SdpoError(f"{path} already holds other {name}. Choose another run folder.")
