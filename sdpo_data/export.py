"""Hand the steps to another trainer: ordered pairs per step, and configs that keep the order and the references.

RUN/export then holds steps/step_1.parquet, ..., a folder per trainer with a config per step and run.sh, and a
README of what each trainer keeps. The training settings are those of config.yaml's section train.

Examples:
    python -m sdpo_data.export runs/a --to trl
    python -m sdpo_data.export runs/a --to trl llama_factory axolotl openrlhf datasets
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pydantic

from sdpo_data.assets import is_embedded, model_folder
from sdpo_data.config import Settings, read_command, read_section
from sdpo_data.console import command, print_table, say
from sdpo_data.messages import decode_messages
from sdpo_data.run import write_atomically
from sdpo_data.tables import MESSAGES, PAIRS, PARTITION, TEXT, SdpoError, check
from sdpo_data.trainers import TRAINERS, Job, Row, llama_factory_info, llama_factory_row
from sdpo_data.training import StepSettings, TrainerSettings, at_step

log = logging.getLogger(__name__)

Target = Literal["trl", "llama_factory", "axolotl", "openrlhf", "datasets"]
FOLDER = "export"
ASSUMED = {"loss": ["sigmoid"], "schedule": "per_step", "optimizer": "reset", "trl": {}}  # of every config written here
ANSWERS = ("chosen", "rejected")
SIDES = ("prompt", *ANSWERS)
COLUMNS = ("pair_id", "source", "step", "rank", "format", *SIDES)


class ExportConfig(Settings):
    to: list[Target] = pydantic.Field(["trl", "datasets"], min_length=1)
    """Trainers to write configs for; datasets: a folder per step for datasets.load_from_disk."""
    device_pairs: int = pydantic.Field(2, ge=1)
    """Pairs per forward pass in those configs; must divide train.batch_pairs."""


class TrainSection(TrainerSettings):
    """Section train as it stands in config.yaml, with what only our own training knows."""

    model_config = pydantic.ConfigDict(extra="allow")


def export_steps(
    pairs: pl.DataFrame,
    partition: pl.DataFrame,
    model: str,
    out: str | Path,
    config: ExportConfig | None = None,
    training: TrainerSettings | None = None,
) -> pl.DataFrame:
    """Write the steps' pairs in training order, and what other trainers need to keep it.

    Args:
        pairs: PAIRS frame that holds all of the partition's.
        partition: PARTITION frame; a pair may stand in several steps.
        model: the reference model of step 1: folder, hub id or embedded:NAME.
        out: folder to write into. What lies in out/models, which the trainers write, is left alone.
        training: learning rate, batch and so on of the configs.

    Returns:
        A row per step: step, pairs, and for openrlhf the pairs it leaves out.

    Raises:
        SdpoError: a pair of the partition is not in `pairs`, a step mixes plain text and messages, or a
            trainer would drop pairs or show the model another text.
    """
    config, training, out = config or ExportConfig(), training or TrainerSettings(), Path(out)
    steps = _ordered(pairs, partition)
    names = [name for name in dict.fromkeys(config.to) if name in TRAINERS]
    settings = {step: _of_step(training, place, len(steps)) for place, step in enumerate(steps, 1)}
    for name in names:
        for step, rows in steps.items():
            _refuse(name, step, rows, settings[step], config)
    start = str(model_folder(model).resolve()) if is_embedded(model) or Path(model).exists() else model
    write_atomically(out / "steps", lambda folder: _write_steps(folder, steps, as_folders="datasets" in config.to))
    for name in names:
        jobs = _chain(name, steps, start, settings, config)
        write_atomically(out / name, lambda folder, name=name, jobs=jobs: _write_trainer(folder, name, jobs, steps))
    summary = _summary(steps, settings, names)
    text = _readme(summary, names, training, as_folders="datasets" in config.to)
    write_atomically(out / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
    return summary


def main() -> None:
    """Write RUN/export from RUN's pairs and partition."""
    call = read_command("python -m sdpo_data.export", __doc__, "export", {"export": ExportConfig})
    config = call.settings["export"]
    assert isinstance(config, ExportConfig)
    training = read_section(call.run, "train", TrainSection)
    recipe = {"model": call.model, **config.model_dump(), "train": training.model_dump()}
    with call.run.stage("export", recipe, ["pairs", "partition"], force=call.force) as stage:
        if stage.current:
            say(f"up to date: {call.run.path / FOLDER}")
            return
        out = call.run.path / FOLDER
        summary = export_steps(call.run.pairs, call.run.partition, call.model, out, config, training)
        stage.outputs += [f"{FOLDER}/README.md", *(f"{FOLDER}/steps/step_{step}.parquet" for step in summary["step"])]
    call.save()
    for left in _not_handed_on(training):
        say(f"not handed on: {left}")
    print_table(summary, f"{out}: see its README.md")


def _of_step(training: TrainerSettings, step: int, steps: int) -> StepSettings:
    own = at_step(training, step, steps, "the partition")
    return StepSettings(**{name: own[name] for name in StepSettings.model_fields})


def _ordered(pairs: pl.DataFrame, partition: pl.DataFrame) -> dict[int, list[Row]]:
    """Give the rows of every step in training order; a pair may stand in several steps."""
    pairs = check(pairs, PAIRS, "pairs")
    if partition.is_empty():
        raise SdpoError("There is no step to export: the partition is empty.")
    check(partition.clear(), PARTITION, "partition")
    steps: dict[int, list[Row]] = {}
    for (step,), part in partition.sort("step", "rank").group_by("step", maintain_order=True):
        part = check(part, PARTITION, f"step {step} of partition").select("pair_id", "step", "rank")
        joined = part.join(pairs, on="pair_id", how="left", maintain_order="left")
        missing = joined.filter(pl.col("format").is_null())
        if missing.height:
            raise SdpoError(
                f"{missing.height} pair(s) of step {step} are not in pairs, e.g. {missing['pair_id'][0]!r}. "
                "Make the partition anew from these pairs: python -m sdpo_data.partition RUN --force"
            )
        if joined["format"].n_unique() > 1:
            counts = Counter(joined["format"])
            raise SdpoError(
                f"Step {step} holds {counts[TEXT]} pairs of plain text and {counts[MESSAGES]} of messages; trainers "
                "read one kind. Read the pairs with pairs.prompt_format messages, or partition by source."
            )
        steps[int(str(step))] = [_row(pair) for pair in joined.iter_rows(named=True)]
    return steps


def _row(pair: Row) -> Row:
    """Write a pair as TRL reads it, the system message first in the prompt."""
    sides = {side: pair[side] for side in SIDES}
    if pair["format"] == MESSAGES:
        sides = {side: decode_messages(text, pair["pair_id"], side) for side, text in sides.items()}
    if pair["system"] is not None:
        sides["prompt"] = [{"role": "system", "content": pair["system"]}, *sides["prompt"]]
    return {name: pair[name] for name in COLUMNS if name not in SIDES} | sides | {"tools": pair["tools"]}


def _refuse(name: str, step: int, rows: Sequence[Row], training: StepSettings, config: ExportConfig) -> None:
    """Refuse what the trainer would drop or change, before anything is written."""
    refused = [(row["pair_id"], reason) for row in rows if (reason := TRAINERS[name].refuse(row))]
    if refused:
        pair_id, reason = refused[0]
        raise SdpoError(
            f"export.to {name}: {len(refused)} of {len(rows)} pairs of step {step} cannot go there, e.g. {pair_id!r}: "
            f"{reason}. Leave {name} out, or those pairs."
        )
    if name == "openrlhf" and len(rows) < training.batch_pairs:
        raise SdpoError(
            f"export.to openrlhf: the {len(rows)} pairs of step {step} fill no batch of train.batch_pairs "
            f"{training.batch_pairs}, and OpenRLHF trains on whole batches alone. Lower it in config.yaml."
        )
    if training.batch_pairs % config.device_pairs:
        raise SdpoError(
            f"train.batch_pairs {training.batch_pairs} is not a multiple of export.device_pairs {config.device_pairs}."
        )


def _chain(
    name: str, steps: dict[int, list[Row]], start: str, settings: dict[int, StepSettings], config: ExportConfig
) -> list[Job]:
    """Give the job of every step: each starts from, and refers to, what the one before wrote."""
    jobs = []
    for step, rows in steps.items():
        out = f"models/{name}/step_{step}"
        as_messages = not isinstance(rows[0]["prompt"], str)
        jobs.append(Job(step, len(rows), as_messages, start, out, settings[step], config.device_pairs))
        start = out
    return jobs


def _write_steps(folder: Path, steps: dict[int, list[Row]], *, as_folders: bool) -> None:
    folder.mkdir(parents=True)
    for step, rows in steps.items():
        names = [*COLUMNS, *(["tools"] if any(row["tools"] for row in rows) else [])]
        dataset = _dataset([{name: row[name] for name in names} for row in rows])
        dataset.to_parquet(folder / f"step_{step}.parquet")
        if as_folders:
            dataset.save_to_disk(folder / f"step_{step}")


def _write_trainer(folder: Path, name: str, jobs: list[Job], steps: dict[int, list[Row]]) -> None:
    trainer = TRAINERS[name]
    lines = ["#!/usr/bin/env bash", f"# {trainer.version}; what it keeps stands in ../README.md", "set -euo pipefail"]
    lines += ['cd "$(dirname "$0")/.."', *(line for job in jobs for line in trainer.run(job))]
    files = dict(trainer.shared)
    for job in jobs:
        files |= trainer.files(job)
    files[f"{name}/run.sh"] = "\n".join(lines) + "\n"
    if name == "llama_factory":
        files["llama_factory/dataset_info.json"] = llama_factory_info(list(steps)) + "\n"
    folder.mkdir(parents=True)
    for path, text in files.items():
        (folder / Path(path).name).write_text(text, encoding="utf-8")
    if name == "llama_factory":
        for step, rows in steps.items():
            _dataset([llama_factory_row(row) for row in rows]).to_parquet(folder / f"step_{step}.parquet")


def _dataset(rows: list[Row]) -> Any:
    """Make a dataset; messages with more than role and content, such as tool calls, are kept as they are, as JSON."""
    import datasets

    datasets.disable_progress_bars()
    sides = [side for side in SIDES if isinstance(rows[0].get(side), list)]
    if not any(set(message) - {"role", "content"} for row in rows for side in sides for message in row[side]):
        return datasets.Dataset.from_list(rows)
    plain = datasets.Dataset.from_list(
        [{name: cell for name, cell in row.items() if name not in sides} for row in rows]
    )
    features = {name: plain.features.get(name) or datasets.List(datasets.Json()) for name in rows[0]}
    return datasets.Dataset.from_list(
        rows, datasets.Features(features)
    )  # else Arrow fills every call's keys in everywhere


def _summary(steps: dict[int, list[Row]], settings: dict[int, StepSettings], names: Sequence[str]) -> pl.DataFrame:
    columns = {"step": list(steps), "pairs": [len(rows) for rows in steps.values()]}
    if "openrlhf" in names:
        columns["left out by openrlhf"] = [len(rows) % settings[step].batch_pairs for step, rows in steps.items()]
    return pl.DataFrame(columns)


def _not_handed_on(training: TrainerSettings) -> list[str]:
    """Name the settings of ours that no config written here has."""
    own = training.model_extra or {}
    return [f"train.{name}: {own[name]}" for name, usual in ASSUMED.items() if own.get(name, usual) != usual]


def _readme(summary: pl.DataFrame, names: Sequence[str], training: TrainerSettings, *, as_folders: bool) -> str:
    steps = summary["step"].to_list()
    table = ["| " + " | ".join(summary.columns) + " |", "|" + "---|" * summary.width]
    table += ["| " + " | ".join(map(str, row)) + " |" for row in summary.iter_rows()]
    folders = f" steps/step_{steps[0]} is the same for datasets.load_from_disk." if as_folders else ""
    about = (
        "steps/step_T.parquet holds the pairs of step T in training order: pair_id, source, step, rank, format, "
        f"prompt, chosen, rejected.{folders} The model that step T - 1 wrote, whole, is both the start and the "
        "reference of step T: every config names it. Start a trainer with its run.sh; it writes into models/."
    )
    parts = ["# Steps of a stepwise DPO (sDPO, arXiv 2403.19270) for other trainers", about, "\n".join(table)]
    if training.lora_rank:
        parts.append("The adapters of each step are merged before the next: else its reference were the first model.")
    if left := _not_handed_on(training):
        parts.append(f"Not handed on, and to be set by hand where the trainer has it: {'; '.join(left)}.")
    parts += [f"## {name}: {TRAINERS[name].version}\n\n{TRAINERS[name].promise}" for name in names]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    command(main)
