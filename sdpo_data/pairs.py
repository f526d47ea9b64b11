"""Read preference data of many forms into PAIRS, and keep what did not fit with its reason.

A source is a file (.jsonl, .jsonl.gz, .json, .parquet, .csv), a folder saved by `datasets`, a hub
id (`org/name`, or `org/name:split`), or embedded:NAME. The form of its rows is found and shown.

Examples:
    python -m sdpo_data.pairs runs/a --source mine.jsonl org/dataset:train
    python -m sdpo_data.pairs runs/a --source mine.csv --columns prompt question chosen good rejected bad
    python -m sdpo_data.pairs runs/a --source a.jsonl b.jsonl --weights a 3 b 1    # three of a to one of b
    python -m sdpo_data.pairs runs/a --check --model my-org/my-sft    # what is wrong with them; --fix repairs
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pydantic

from sdpo_data.config import Command, Settings, read_command
from sdpo_data.console import command, print_table, say
from sdpo_data.doctor import check_pairs, show_findings
from sdpo_data.formats import read_row
from sdpo_data.messages import PromptFormat
from sdpo_data.rated import Choice, draw
from sdpo_data.repair import STAGE as FIX
from sdpo_data.repair import fix_run
from sdpo_data.run import Run
from sdpo_data.sources import fingerprint, read_rows, source_names
from sdpo_data.tables import DROPPED, PAIRS, SdpoError

log = logging.getLogger(__name__)

CONTENT_SHOWN = 20_000  # characters of a dropped row kept in dropped.parquet
BEYOND = "beyond pairs."
COLUMNS = (  # what a column map may name
    *("prompt", "chosen", "rejected", "system", "history", "source", "rating_chosen", "rating_rejected"),
    *("messages", "conversations", "rejected_response", "rejected_messages", "instruction", "question", "input"),
    *("chosen_response", "completions", "responses", "ratings", "ranks"),
)


class PairsConfig(Settings):
    source: list[str] = pydantic.Field(["embedded:alpaca-eval", "embedded:piqa"], min_length=1)
    """Where the pairs come from: files, folders, hub ids (org/name or org/name:split), embedded:NAME."""
    columns: dict[str, str] = pydantic.Field({})
    """Which column of the data is which of ours: prompt, chosen, rejected, system, source, ... For one
    source alone write SOURCE:prompt. An empty name leaves a column of ours out."""
    choose: Choice = "best_worst"
    """Of several rated answers to a prompt: the best against the worst, against one drawn of the others,
    or every two of them. Answers rated alike make no pair."""
    limit: int | None = pydantic.Field(None, ge=1)
    """Take at most this many pairs of each source, drawn by seed."""
    caps: dict[str, int] = pydantic.Field({})
    """Take at most so many pairs of the sources named here."""
    weights: dict[str, float] = pydantic.Field({})
    """Mix the sources by weight: the largest mixture in these proportions, no pair taken twice. Names every source."""
    hold_out: float = pydantic.Field(0.05, ge=0, lt=1)
    """Share of the prompts kept out of training, with all their pairs. Each prompt is drawn on its own:
    rows added later move none."""
    prompt_format: PromptFormat = "auto"
    """Plain-text prompts: auto keeps them raw unless they have a system message or Human/Assistant
    turns; messages makes each a user message; text keeps even those with turns raw."""
    seed: int = 0
    """Draws the limit, the mixture, the hold-out and choose's answer."""

    @pydantic.field_validator("caps", "weights")
    @classmethod
    def _are_positive(cls, shares: dict[str, float]) -> dict[str, float]:
        if not_positive := [name for name, share in shares.items() if share <= 0]:
            raise ValueError(f"{not_positive[0]!r} must have a number above 0")
        return shares


@dataclass(frozen=True)
class Collected:
    """What reading gave: pairs to train on, pairs held out, and rows that are neither."""

    pairs: pl.DataFrame
    held_out: pl.DataFrame
    dropped: pl.DataFrame


def read_pairs(source: str | Path | Sequence[str | Path], config: PairsConfig | None = None) -> pl.DataFrame:
    """Read every usable pair of one or several sources.

    Args:
        source: file, folder, hub id or embedded:NAME, or a list of them.
        config: its limit, prompt_format and seed are used; nothing is held out here.

    Returns:
        PAIRS frame, in the order of the sources. What was dropped is logged with its reasons;
        `collect_pairs` also returns it.

    Raises:
        SdpoError: a source cannot be read, or holds no usable pair.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    settings = (config or PairsConfig()).model_copy(update={"source": [str(s) for s in sources], "hold_out": 0.0})
    return collect_pairs(settings).pairs


def collect_pairs(config: PairsConfig) -> Collected:
    """Read the sources, drop what is unusable, repeated or contradictory, hold prompts out.

    A pair met again keeps its first source; answers to one prompt that are labelled both ways
    are dropped on both sides: so parts cut from the result are disjoint and consistent.

    Raises:
        SdpoError: a source cannot be read or holds no usable pair, or nothing is left to train on.
    """
    names = source_names(config.source)
    _refuse_unknown_names(config, names)
    pairs, dropped = [], []
    for source, name in names.items():
        kept, lost = _read_source(source, name, config)
        if kept.is_empty():
            raise SdpoError(f"pairs.source {source} gave no usable pair ({_counted(lost) or 'it is empty'}).")
        pairs.append(kept)
        dropped.append(lost)
    everything = pl.concat(pairs)
    everything = everything.with_columns(reason=_conflicts(everything))
    if config.limit is not None or config.caps or config.weights:
        everything = everything.with_columns(reason=_beyond_share(everything, config))
    dropped.append(_as_dropped(everything.filter(pl.col("reason").is_not_null())))
    kept, lost = everything.filter(pl.col("reason").is_null()), pl.concat(dropped)
    held = [prompt for prompt in kept["prompt_id"].unique() if _share(prompt, config.seed) < config.hold_out]
    out = pl.col("prompt_id").is_in(held)
    collected = Collected(kept.filter(~out).select(list(PAIRS)), kept.filter(out).select(list(PAIRS)), lost)
    if collected.pairs.is_empty():
        raise SdpoError(
            f"pairs.source {', '.join(config.source)} leaves no pair to train on: pairs.hold_out {config.hold_out:g} "
            f"keeps {collected.held_out.height} out, dropped are {_counted(lost) or 'none'}."
        )
    return collected


def make_pairs(call: Command, *, asked: bool = False) -> pl.DataFrame:
    """Make RUN/pairs.parquet, held_out.parquet and dropped.parquet, unless they are up to date.

    --force remakes them if they were `asked` for, and otherwise only if they differ.
    """
    config = call.settings["pairs"]
    assert isinstance(config, PairsConfig)
    recipe = config.model_dump() | {"files": {source: fingerprint(source) for source in config.source}}
    force = call.force and (asked or not call.run.is_current("pairs", recipe))
    with call.run.stage("pairs", recipe, force=force) as stage:
        if stage.current:
            return call.run.pairs
        collected = collect_pairs(config)
        stage.write("held_out", collected.held_out)
        call.run.replace_dropped("pairs", collected.dropped)
        for later in ("decontaminate", FIX):  # what they took out is back
            call.run.replace_dropped(later, DROPPED.to_frame())
        log.info(
            "read %d pairs of %d prompts, held out %d pairs",
            collected.pairs.height,
            collected.pairs["prompt_id"].n_unique(),
            collected.held_out.height,
        )
        return stage.write("pairs", collected.pairs)


def main() -> None:
    """Read preference pairs into RUN/pairs.parquet; --check says what is wrong with them, --fix repairs it."""
    from sdpo_data.score import ScoreConfig  # here: score.py reads pairs by this file

    call = read_command(
        "python -m sdpo_data.pairs",
        __doc__,
        "pairs",
        {"pairs": PairsConfig, "score": ScoreConfig},
        switches={
            "check": "Say what is wrong with the pairs, as text and as the model's tokens: findings.parquet.",
            "fix": "Repair what has one right repair, and say what is wrong with the rest.",
        },
    )
    made = call.run.lineage.get("pairs")
    pairs = make_pairs(call, asked=True)
    call.save()
    if call.run.lineage["pairs"] != made:
        print_table(count_sources(pairs, call.run), f"{call.run.path / 'pairs.parquet'}")
    elif not call.asked:
        say(f"up to date: {call.run.path / 'pairs.parquet'}")
    if "fix" in call.asked:
        pairs = fix_run(call.run, call.model)
    if call.asked:
        config = call.settings["score"]
        assert isinstance(config, ScoreConfig)
        recipe = {"model": call.model, "max_length": config.max_length}
        with call.run.stage("findings", recipe, ["pairs"], force=True) as stage:
            findings = stage.write("findings", check_pairs(pairs, call.model, config.max_length))
        show_findings(findings, pairs.height)


def count_sources(pairs: pl.DataFrame, run: Run) -> pl.DataFrame:
    """Count pairs, prompts, held-out pairs and dropped rows of each source."""
    return (
        pairs.group_by("source", maintain_order=True)
        .agg(pairs=pl.len(), prompts=pl.col("prompt_id").n_unique())
        .join(run.held_out.group_by("source").agg(held_out=pl.len()), on="source", how="left")
        .join(run.dropped.group_by("source").agg(dropped=pl.len()), on="source", how="left")
        .fill_null(0)
    )


def _refuse_unknown_names(config: PairsConfig, names: dict[str, str]) -> None:
    known = set(names.values())
    for setting, keys in (("caps", config.caps), ("weights", config.weights)):
        if unknown := sorted(set(keys) - known):
            raise SdpoError(
                f"pairs.{setting} names {unknown[0]!r}, which is no source. There are: {', '.join(sorted(known))}."
            )
    if config.weights and (without := sorted(known - set(config.weights))):
        raise SdpoError(f"pairs.weights has no weight for {without[0]!r}. Give every source one, or leave weights out.")
    for key in config.columns:
        source, _, column = key.rpartition(":")
        if column not in COLUMNS or (source and source not in known):
            raise SdpoError(
                f"pairs.columns has {key!r}, which is none of our columns. There are: {', '.join(COLUMNS)}; "
                f"before them may stand one of the sources {', '.join(sorted(known))} and a colon."
            )


def _read_source(source: str, name: str, config: PairsConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read a source into pairs (with `origin`, `row` and `content` beside PAIRS) and dropped rows."""
    kept, dropped, forms = [], [], Counter[str]()
    rows = _renamed(read_rows(source), source, name, config.columns)
    for number, row in enumerate(rows):
        content = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
        content = content.encode(errors="replace").decode()[:CONTENT_SHOWN]
        own = str(row.get("source") or name) if isinstance(row, dict) else name
        own = own.encode(errors="replace").decode()
        form, pairs = read_row(row, config.prompt_format, config.choose, config.seed)
        forms[form or "no form known"] += 1
        for pair in pairs:
            if isinstance(pair, str):
                dropped.append(("pairs", own, number, None, pair, content))
            else:
                kept.append({**pair, "source": own, "origin": name, "row": number, "content": content})
    if rows:
        log.info("%s: %s", name, "; ".join(f"{count:,} rows as {form}" for form, count in forms.most_common()))
    schema = pl.Schema({**PAIRS, "origin": pl.String, "row": pl.Int64, "content": pl.String})
    return pl.DataFrame(kept, schema), pl.DataFrame(dropped, DROPPED, orient="row")


def _renamed(
    rows: Sequence[dict[str, Any] | str], source: str, name: str, columns: dict[str, str]
) -> Sequence[dict[str, Any] | str]:
    """Give the columns of a source our names, as the settings say; a column called "" is left out."""
    mine = {key.removeprefix(f"{name}:"): theirs for key, theirs in sorted(columns.items(), key=_is_of_one_source)
            if key.removeprefix(f"{name}:") in COLUMNS}  # fmt: skip
    objects = [row for row in rows if isinstance(row, dict)]
    for ours, theirs in mine.items():
        if objects and theirs and not any(theirs in row for row in objects):
            raise SdpoError(
                f"pairs.columns reads {ours} from {theirs!r}, which no row of {source} has. "
                f"It has: {', '.join(objects[0])}."
            )
    if not mine:
        return rows
    taken = set(mine) | set(mine.values())
    return [
        {key: cell for key, cell in row.items() if key not in taken}
        | {ours: row[theirs] for ours, theirs in mine.items() if theirs in row}
        if isinstance(row, dict)
        else row
        for row in rows
    ]


def _is_of_one_source(column: tuple[str, str]) -> bool:
    return ":" in column[0]


def _conflicts(pairs: pl.DataFrame) -> pl.Expr:
    """Reason a pair cannot stay beside the others: "contradiction", "duplicate" or null."""
    same_two = ("prompt_id", pl.min_horizontal("chosen", "rejected"), pl.max_horizontal("chosen", "rejected"))
    return (
        pl.when(pl.col("chosen").n_unique().over(*same_two) > 1)
        .then(pl.lit("contradiction"))
        .when(pl.col("pair_id").is_first_distinct().not_())
        .then(pl.lit("duplicate"))
    )


def _beyond_share(pairs: pl.DataFrame, config: PairsConfig) -> pl.Series:
    """Keep the reasons there are, and give one to every pair that its source's limit or weight leaves out."""
    drawn = pl.Series([draw(pair_id, config.seed) for pair_id in pairs["pair_id"]], dtype=pl.String)
    place = (
        pairs.select("origin", "reason", drawn=drawn)
        .with_row_index("at")
        .sort("drawn")
        .with_columns(place=pl.col("reason").is_null().cum_sum().over("origin"))
        .sort("at")
    )
    left = dict(place.filter(pl.col("reason").is_null()).group_by("origin").len().rows())
    limits = {name: min(n, config.caps.get(name, n), config.limit or n) for name, n in left.items()}
    weighed = {name: limits.get(name, 0) / weight for name, weight in config.weights.items()}
    shares = {name: math.floor(weight * min(weighed.values()) + 1e-9) for name, weight in config.weights.items()}
    reason = pl.lit(None, pl.String)
    for why, most in (("weights", shares), ("caps", config.caps), ("limit", dict.fromkeys(left, config.limit))):
        for name, most_of_it in most.items():
            if most_of_it is not None:
                beyond = (pl.col("origin") == name) & (pl.col("place") > most_of_it)
                reason = pl.when(beyond).then(pl.lit(f"{BEYOND}{why}")).otherwise(reason)
    return place.select(pl.when(pl.col("reason").is_null()).then(reason).otherwise("reason")).to_series()


def _as_dropped(pairs: pl.DataFrame) -> pl.DataFrame:
    content = pl.when(pl.col("reason").str.starts_with(BEYOND)).then(pl.lit("")).otherwise("content")
    return pairs.with_columns(stage=pl.lit("pairs"), content=content).select(list(DROPPED))


def _share(identity: str, seed: int) -> float:
    """Place an id at random, but for good, in [0, 1)."""
    return int(draw(identity, seed), 16) / 2**128


def _counted(dropped: pl.DataFrame) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped["reason"].value_counts(sort=True).rows())


if __name__ == "__main__":
    command(main)
