"""Several runs in one report: their evidence as one, every arm named by its run, and what tells the runs apart."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from sdpo_eval.blocks import Block, Drawing, Heading, Prose, Quotes, Table
from sdpo_eval.contrasts import CompareConfig
from sdpo_eval.evidence import Evidence

BASE = "base"
LEFT_OUT = {"length_confound"}  # of what is told run by run: figures with a mark per pair


def merge_evidence(runs: Sequence[Evidence]) -> Evidence:
    """Make one of several runs' evidence: arm "sdpo" of runs/a becomes "a: sdpo".

    The base model stays "base", once, where all runs began with the same weights. Pairs and
    their partition stay apart: they may differ. Held-out scores and references are taken over
    where they are of the same pairs under the same base model.

    Args:
        runs: at least two; the first is set against each of the others.
    """
    names = name_runs(runs)
    first, keys = runs[0], {key for one in runs for key in _base_keys(one)}
    same_base = len(keys) < 2
    same_pairs = same_base and all(_same(first.held_out_scores, one.held_out_scores) for one in runs[1:])

    def together(table: str) -> pl.DataFrame:
        frames = []
        for name, one in zip(names, runs, strict=True):
            frame = getattr(one, table)
            is_base, named = pl.col("arm") == BASE, pl.format("{}: {}", pl.lit(name), "arm")
            if same_base and one is not first:
                known = frames[0].filter(is_base)
                fresh = [column for column in ("task", "protocol", "subset") if column in frame.columns]
                own_base = frame.filter(is_base)
                own_base = own_base.join(known, on=fresh, how="anti") if fresh else own_base.clear()
                frame = pl.concat([own_base, frame.filter(~is_base)])
            kept = is_base if same_base else pl.lit(value=False)
            frames.append(frame.with_columns(arm=pl.when(kept).then("arm").otherwise(named)))
        return pl.concat(frames)

    main = _main_arm(runs)
    named = zip(names, runs, strict=True)
    lineage = {f"{name}: {unit}": made for name, one in named for unit, made in one.lineage.items()}
    scores = pl.concat([one.scores for one in runs]).unique("pair_id", maintain_order=True)
    return replace(
        first,
        lineage=lineage,
        results=together("results"),
        steps=together("steps"),
        metrics=together("metrics"),
        items=together("items"),
        references=together("references") if same_base else first.references.clear(),
        orders=first.orders.clear(),  # each is made from its own run's partition
        scores=scores if same_base else scores.clear(),
        held_out_scores=together("held_out_scores") if same_pairs else first.held_out_scores.clear(),
        held_out=first.held_out if same_pairs else first.held_out.clear(),
        compare=CompareConfig(
            primary=f"{names[0]}: {main} - {names[1]}: {main}", primary_task=first.compare.primary_task
        ),
        runs=tuple(names),
    )


def _main_arm(runs: Sequence[Evidence]) -> str:
    """Name the arm that the runs are compared by: sdpo, else the first one of the first run."""
    if all("sdpo" in one.results["arm"] for one in runs) or runs[0].steps.is_empty():
        return "sdpo"
    return str(runs[0].steps["arm"][0])


def name_runs(runs: Sequence[Evidence]) -> list[str]:
    """Name runs by their folders; by the whole path where two folders are called alike."""
    short = [one.path.resolve().name.replace(" - ", "-").replace(": ", " ") for one in runs]
    return short if len(set(short)) == len(short) else [str(one.path).replace(" - ", "-") for one in runs]


def tell_each(runs: Sequence[Evidence], tell: Callable[[Evidence], Iterator[Block]]) -> Iterator[Block]:
    """Tell of every run by itself what one report tells of its run; names of tables and figures get the run's number.

    Runs whose pairs, partition and scores are those of an earlier one are named with it and told once. Pairs word for
    word, and figures of every single pair, are left to each run's own report: they would outgrow the page.
    """
    names, told = name_runs(runs), list[Evidence]()
    for number, (name, run) in enumerate(zip(names, runs, strict=True), 1):
        twin = next((place for place, other in enumerate(told) if _same_data(run, other)), None)
        told.append(run)
        yield Heading(name)
        if twin is not None:
            yield Prose(f"The same pairs, parts and scores as {names[twin]}.")
            continue
        kept = (block for block in tell(run) if not (isinstance(block, Drawing) and block.name in LEFT_OUT))
        for block in number_blocks(kept, number):
            if isinstance(block, Heading):
                yield Heading(f"{name}: {block.text}")
            elif not isinstance(block, Quotes):
                yield block


def number_blocks(blocks: Iterable[Block], number: int) -> Iterator[Block]:
    """Give tables and figures the number of their run: names are ids in the page and keys in the JSON."""
    for block in blocks:
        if isinstance(block, Table | Drawing):
            yield replace(block, name=f"{block.name}_{number}")
        else:
            yield block


def _same_data(one: Evidence, two: Evidence) -> bool:
    def same(first: pl.DataFrame | None, second: pl.DataFrame | None) -> bool:
        return first is second if first is None or second is None else first.equals(second)

    tables = ("pairs", "dropped", "findings", "contamination", "scores", "partition")
    clean = (run.results.filter(subset="clean").drop("arm") for run in (one, two))
    return all(same(getattr(one, name), getattr(two, name)) for name in tables) and next(clean).equals(next(clean))


def tell_differences(runs: Sequence[Evidence]) -> Iterator[Block]:
    """Show how the runs were made differently: the settings that are not alike, and the pairs they share."""
    names = name_runs(runs)
    flat = [dict(_flatten(one.settings)) for one in runs]
    keys = sorted(key for key in set().union(*flat) if len({str(settings.get(key)) for settings in flat}) > 1)
    rows = [
        {"setting": key} | {name: _said(settings.get(key)) for name, settings in zip(names, flat, strict=True)}
        for key in keys
    ]
    if rows:
        yield Table("settings", "Settings that differ; what is not in a config.yaml is left blank", rows)
    else:
        yield Prose("The runs have the same settings in their config.yaml.")
    counts = []
    for name, one in zip(names, runs, strict=True):
        shared = runs[0].partition.join(one.partition.select("pair_id", other="step"), on="pair_id")
        counts.append(
            {
                "run": name,
                "pairs": one.partition.height,
                "parts": one.partition["step"].n_unique(),
                "difficulty": ", ".join(one.partition["definition"].unique().sort()),
                "shared_with_the_first": shared.height,
                "of_these_in_the_same_part": shared.filter(pl.col("step") == pl.col("other")).height,
            }
        )
    yield Heading("The pairs they trained on")
    yield Table("partitions", "Pairs and parts of each run", counts)


def _base_keys(one: Evidence) -> set[str]:
    scored = one.scores["model_key"].unique().to_list()
    return {*scored, *one.results.filter(arm=BASE)["model_key"].to_list()}


def _same(first: pl.DataFrame, second: pl.DataFrame) -> bool:
    return set(first["pair_id"].unique()) == set(second["pair_id"].unique())


def _flatten(settings: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def _said(value: Any) -> str | None:
    return None if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
