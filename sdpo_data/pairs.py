"""Read preference data of many forms into PAIRS, and keep what did not fit with its reason.

A source is a file (.jsonl, .jsonl.gz, .json, .parquet, .csv), a folder saved by `datasets`, a hub
id (`org/name`, or `org/name:split`), or embedded:NAME.
"""

import hashlib
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pydantic

from sdpo_data.assets import hub_dataset, is_embedded, pair_file
from sdpo_data.config import Command, Settings, read_command
from sdpo_data.console import command, print_table, say
from sdpo_data.run import Run, sha256
from sdpo_data.tables import DROPPED, MESSAGES, PAIRS, TEXT, SdpoError

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
CONTENT_SHOWN = 20_000  # characters of a dropped row kept in dropped.parquet
TURN = re.compile(r"\n\nHuman: |\n\nAssistant: ?")


class PairsConfig(Settings):
    source: list[str] = pydantic.Field(["embedded:alpaca-eval", "embedded:piqa"], min_length=1)
    """Where the pairs come from: files, folders, hub ids (org/name or org/name:split), embedded:NAME."""
    limit: int | None = pydantic.Field(None, ge=1)
    """Take at most this many pairs of each source, drawn by seed."""
    hold_out: float = pydantic.Field(0.05, ge=0, lt=1)
    """Share of the prompts kept out of training, with all their pairs. Each prompt is drawn on its own:
    rows added later move none."""
    prompt_format: Literal["auto", "messages", "text"] = "auto"
    """Plain-text prompts: auto keeps them raw unless they have a system message or Human/Assistant
    turns; messages makes each a user message; text keeps even those with turns raw."""
    seed: int = 0
    """Draws the limit and the hold-out."""


@dataclass(frozen=True)
class Collected:
    """What reading gave: pairs to train on, pairs held out, and rows that are neither."""

    pairs: pl.DataFrame
    held_out: pl.DataFrame
    dropped: pl.DataFrame


class _UnusableError(Exception):
    """The row cannot become a pair; the message is the reason kept in dropped.parquet."""


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
    pairs, dropped = [], []
    for source, name in _source_names(config.source).items():
        kept, lost = _normalise(_rows(source), name, config.prompt_format)
        if kept.is_empty():
            raise SdpoError(f"pairs.source {source} gave no usable pair ({_counted(lost) or 'it is empty'}).")
        pairs.append(kept)
        dropped.append(lost)
    everything = pl.concat(pairs)
    everything = everything.with_columns(reason=_conflicts(everything))
    if config.limit is not None:
        everything = everything.with_columns(reason=_beyond_limit(everything, config.limit, config.seed))
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
    recipe = config.model_dump() | {"files": {source: _fingerprint(source) for source in config.source}}
    force = call.force and (asked or not call.run.is_current("pairs", recipe))
    with call.run.stage("pairs", recipe, force=force) as stage:
        if stage.current:
            return call.run.pairs
        collected = collect_pairs(config)
        stage.write("held_out", collected.held_out)
        call.run.replace_dropped("pairs", collected.dropped)
        log.info(
            "read %d pairs of %d prompts, held out %d pairs",
            collected.pairs.height,
            collected.pairs["prompt_id"].n_unique(),
            collected.held_out.height,
        )
        return stage.write("pairs", collected.pairs)


def main() -> None:
    """Read preference pairs into RUN/pairs.parquet."""
    call = read_command("python -m sdpo_data.pairs", __doc__, "pairs", {"pairs": PairsConfig})
    made = call.run.lineage.get("pairs")
    pairs = make_pairs(call, asked=True)
    call.save()
    if call.run.lineage["pairs"] == made:
        say(f"up to date: {call.run.path / 'pairs.parquet'}")
        return
    print_table(count_sources(pairs, call.run), f"{call.run.path / 'pairs.parquet'}")


def count_sources(pairs: pl.DataFrame, run: Run) -> pl.DataFrame:
    """Count pairs, prompts, held-out pairs and dropped rows of each source."""
    return (
        pairs.group_by("source", maintain_order=True)
        .agg(pairs=pl.len(), prompts=pl.col("prompt_id").n_unique())
        .join(run.held_out.group_by("source").agg(held_out=pl.len()), on="source", how="left")
        .join(run.dropped.group_by("source").agg(dropped=pl.len()), on="source", how="left")
        .fill_null(0)
    )


def _rows(source: str) -> Sequence[dict[str, Any] | str]:
    """Read the raw rows; a line that is not JSON stays a string."""
    path = pair_file(source) if is_embedded(source) else Path(source)
    if path.is_dir():
        return _arrow_folder(path)
    if path.is_file():
        return _file_rows(path)
    if path.suffix[1:].isalpha() or path.is_absolute() or source.count("/") != 1:  # a hub id may end in -v0.1
        raise SdpoError(
            f"pairs.source {source!r} is neither a file nor a hub dataset. Give a path ending in one of "
            f"{', '.join(SUFFIXES)}, a hub id such as trl-lib/ultrafeedback_binarized, or embedded:alpaca-eval."
        )
    repo, _, split = source.partition(":")
    return list(hub_dataset(repo, None, split or "train"))  # type: ignore[arg-type]


def _file_rows(path: Path) -> Sequence[dict[str, Any] | str]:
    if not path.name.endswith(SUFFIXES):
        raise SdpoError(f"pairs.source {path} has an unknown suffix. It must be one of {', '.join(SUFFIXES)}.")
    try:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            return [_json_or_text(line) for line in _lines(path) if line.strip()]
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, list):
                raise SdpoError(f"pairs.source {path} holds a JSON {type(content).__name__}, expected a list of rows.")
            return content
        return (
            pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema=False)
        ).to_dicts()
    except (pl.exceptions.PolarsError, ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        if isinstance(error, SdpoError):
            raise
        raise SdpoError(f"pairs.source {path} cannot be read ({' '.join(str(error).split())[:200]}).") from None


def _lines(path: Path) -> Iterable[str]:
    import gzip

    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            yield line.decode("utf-8", errors="surrogateescape")


def _json_or_text(line: str) -> dict[str, Any] | str:
    try:
        line.encode()
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line.encode(errors="replace").decode()
    return row if isinstance(row, dict) else line


def _arrow_folder(path: Path) -> list[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        content = datasets.load_from_disk(str(path))
    except (FileNotFoundError, OSError, ValueError) as error:
        raise SdpoError(f"pairs.source {path} is not a folder saved by `datasets` ({error}).") from None
    if isinstance(content, datasets.DatasetDict):
        splits = ", ".join(map(str, content))
        raise SdpoError(f"pairs.source {path} holds the splits {splits}. Name one: {path}/{next(iter(content))}")
    return content.to_list()


def _normalise(
    rows: Sequence[dict[str, Any] | str], source: str, prompt_format: str
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Turn raw rows into pairs (with `origin`, `row` and `content` beside PAIRS) and dropped rows."""
    kept, dropped = [], []
    for number, row in enumerate(rows):
        content = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
        content = content.encode(errors="replace").decode()[:CONTENT_SHOWN]
        name = str(row.get("source") or source) if isinstance(row, dict) else source
        name = name.encode(errors="replace").decode()
        try:
            kept.append(
                {**_pair(row, prompt_format), "source": name, "origin": source, "row": number, "content": content}
            )
        except _UnusableError as reason:
            dropped.append(("pairs", name, number, None, str(reason), content))
    schema = pl.Schema({**PAIRS, "origin": pl.String, "row": pl.Int64, "content": pl.String})
    return pl.DataFrame(kept, schema), pl.DataFrame(dropped, DROPPED, orient="row")


def _pair(row: dict[str, Any] | str, prompt_format: str) -> dict[str, Any]:
    """Make one pair of a raw row, or say why not."""
    if not isinstance(row, dict):
        raise _UnusableError("not a JSON object")
    fields = next((read(row) for detect, read in FORMS if detect(row)), None)
    if fields is None:
        raise _UnusableError("no columns of a known form (prompt, chosen, rejected)")
    fields = _as_messages(fields, prompt_format)
    for name in ("prompt", "chosen", "rejected"):
        if not _has_text(fields[name]):
            raise _UnusableError(f"empty {name}")
    if fields["chosen"] == fields["rejected"]:
        raise _UnusableError("identical answers")
    system = fields.get("system") or None
    texts = [fields[name] if isinstance(fields[name], str) else _as_json(fields[name])
             for name in ("prompt", "chosen", "rejected")]  # fmt: skip
    try:
        return {
            "pair_id": _hash(system, *texts),
            "prompt_id": _hash(system, texts[0]),
            "prompt": texts[0],
            "chosen": texts[1],
            "rejected": texts[2],
            "format": TEXT if isinstance(fields["prompt"], str) else MESSAGES,
            "system": system,
            "rating_chosen": _rating(row, "chosen"),
            "rating_rejected": _rating(row, "rejected"),
        }
    except UnicodeEncodeError:
        raise _UnusableError("text is not valid Unicode") from None


def _as_messages(fields: dict[str, Any], prompt_format: str) -> dict[str, Any]:
    """Bring prompt and answers to one kind: all plain text, or all lists of messages."""
    prompt, chosen, rejected = (fields[name] for name in ("prompt", "chosen", "rejected"))
    texts = [isinstance(part, str) for part in (prompt, chosen, rejected)]
    if not any(texts):
        first, *rest = prompt or [{}]
        if first.get("role") == "system":
            if fields.get("system") not in (None, "", first["content"]):
                raise _UnusableError("two system messages")
            return {**fields, "prompt": rest, "system": first["content"]}
        return fields
    if not all(texts) and isinstance(prompt, str):
        return _as_messages({**fields, "prompt": [{"role": "user", "content": prompt}]}, prompt_format)
    if not all(texts):
        answers = {
            side: [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            for side, answer in (("chosen", chosen), ("rejected", rejected))
        }
        return _as_messages({**fields, **answers}, prompt_format)
    turns = prompt_format != "text" and _turns(prompt)
    if not turns and (prompt_format == "messages" or (prompt_format == "auto" and fields.get("system"))):
        turns = [{"role": "user", "content": prompt}]
    if not turns:
        if fields.get("system"):
            raise _UnusableError("a system message beside plain text")
        return fields
    return {
        **fields,
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": chosen.strip()}] if chosen.strip() else [],
        "rejected": [{"role": "assistant", "content": rejected.strip()}] if rejected.strip() else [],
    }


def _turns(prompt: str) -> list[dict[str, str]] | None:
    """Read the Human/Assistant turns of Anthropic's HH, if the prompt is written so."""
    if not (prompt.startswith("\n\nHuman: ") and prompt.rstrip().endswith("\n\nAssistant:")):
        return None
    marks = TURN.findall(prompt)
    texts = TURN.split(prompt)[1:]
    roles = ["user" if mark.startswith("\n\nHuman") else "assistant" for mark in marks]
    return [{"role": role, "content": text.strip()} for role, text in zip(roles[:-1], texts[:-1], strict=True)]


def _own(row: dict[str, Any]) -> dict[str, Any]:
    """Read a row of PAIRS itself, whose messages are JSON text."""
    try:
        return _explicit(row | {name: json.loads(row[name]) for name in ("prompt", "chosen", "rejected")})
    except (KeyError, TypeError, ValueError, RecursionError):
        raise _UnusableError("its format says messages, but they are not JSON") from None


def _explicit(row: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: row.get(name) for name in ("prompt", "chosen", "rejected", "system")}
    for name in ("prompt", "chosen", "rejected"):
        if fields[name] is None:
            raise _UnusableError(f"no {name}")
        if not isinstance(fields[name], str) and not _are_messages(fields[name]):
            raise _UnusableError(f"{name} is neither text nor a list of messages")
    if row.get("history"):
        raise _UnusableError("a history column: its turns belong into the prompt")
    if not isinstance(fields["prompt"], str):  # UltraFeedback repeats the prompt in the answers
        prompt = fields["prompt"]
        for name in ("chosen", "rejected"):
            if not isinstance(fields[name], str) and fields[name][: len(prompt)] == prompt:
                fields[name] = fields[name][len(prompt) :]
    elif _are_messages(fields["chosen"]) and fields["chosen"][0]["role"] != "assistant":
        return _implicit(row) | {"system": fields["system"]}
    if fields["system"] is not None and not isinstance(fields["system"], str):
        raise _UnusableError("system is not text")
    return fields


def _implicit(row: dict[str, Any]) -> dict[str, Any]:
    """Take the prompt out of two answers that both begin with it (the HH form)."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - character by character is meant
        mark = shared.rfind("\n\nAssistant:")
        end = mark + len("\n\nAssistant:") if mark >= 0 else max(shared.rfind(" "), 0)  # a word's token has its blank
        return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
    if not _are_messages(chosen) or not _are_messages(rejected):
        raise _UnusableError("no prompt, and the answers are neither text nor lists of messages")
    same = list(takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    return {"prompt": chosen[: len(same)], "chosen": chosen[len(same) :], "rejected": rejected[len(same) :]}


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    """Read an annotation of AlpacaEval: two outputs, and which of them the judge preferred."""
    preference = _number(row["preference"])
    if preference not in (1, 2):
        raise _UnusableError("tie")
    outputs = row["output_1"], row["output_2"]
    chosen, rejected = outputs if preference == 1 else outputs[::-1]
    return _instruction([row["instruction"], row.get("input")], chosen, rejected)


def _physical(row: dict[str, Any]) -> dict[str, Any]:
    """Read a question of PIQA: the right solution against the wrong one."""
    label = _number(row["label"])
    if label not in (0, 1):
        raise _UnusableError("no label")
    solutions = row["sol1"], row["sol2"]
    return _instruction([row["goal"]], solutions[int(label)], solutions[1 - int(label)])


def _instruction(question: list[Any], chosen: Any, rejected: Any) -> dict[str, Any]:
    question = [part for part in question if part]
    for name, parts in (("prompt", question), ("chosen", [chosen or ""]), ("rejected", [rejected or ""])):
        if not all(isinstance(part, str) for part in parts):
            raise _UnusableError(f"{name} is not text")
    return {
        "prompt": [{"role": "user", "content": "\n\n".join(question)}],
        "chosen": [{"role": "assistant", "content": chosen or ""}],
        "rejected": [{"role": "assistant", "content": rejected or ""}],
    }


FORMS: list[tuple[Callable[[dict], bool], Callable[[dict], dict[str, Any]]]] = [
    (lambda row: "pair_id" in row and row.get("format") == MESSAGES, _own),
    (lambda row: {"chosen", "rejected"} <= row.keys() and row.get("prompt") is not None, _explicit),
    (lambda row: {"chosen", "rejected"} <= row.keys() and "prompt" not in row, _implicit),
    (lambda row: {"instruction", "output_1", "output_2", "preference"} <= row.keys(), _judged),
    (lambda row: {"goal", "sol1", "sol2", "label"} <= row.keys(), _physical),
    (lambda row: bool({"prompt", "chosen", "rejected"} & row.keys()), _explicit),  # says which column is missing
]


def _conflicts(pairs: pl.DataFrame) -> pl.Expr:
    """Reason a pair cannot stay beside the others: "contradiction", "duplicate" or null."""
    same_two = ("prompt_id", pl.min_horizontal("chosen", "rejected"), pl.max_horizontal("chosen", "rejected"))
    return (
        pl.when(pl.col("chosen").n_unique().over(*same_two) > 1)
        .then(pl.lit("contradiction"))
        .when(pl.col("pair_id").is_first_distinct().not_())
        .then(pl.lit("duplicate"))
    )


def _beyond_limit(pairs: pl.DataFrame, limit: int, seed: int) -> pl.Series:
    """Keep the reasons there are, and give one to every pair of a source beyond its first `limit` drawn."""
    drawn = pl.Series([_draw(pair_id, seed) for pair_id in pairs["pair_id"]], dtype=pl.String)
    place = (
        pairs.select("origin", "reason", drawn=drawn)
        .with_row_index("at")
        .sort("drawn")
        .with_columns(place=pl.col("reason").is_null().cum_sum().over("origin"))
        .sort("at")
    )
    beyond = pl.when(pl.col("reason").is_null() & (pl.col("place") > limit)).then(pl.lit("beyond pairs.limit"))
    return place.select(pl.coalesce("reason", beyond)).to_series()


def _as_dropped(pairs: pl.DataFrame) -> pl.DataFrame:
    content = pl.when(pl.col("reason") == "beyond pairs.limit").then(pl.lit("")).otherwise("content")
    return pairs.with_columns(stage=pl.lit("pairs"), content=content).select(list(DROPPED))


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _has_text(part: Any) -> bool:
    return bool(part.strip()) if isinstance(part, str) else any(m["content"].strip() for m in part or [])


def _rating(row: dict[str, Any], side: str) -> float | None:
    names = (f"rating_{side}", f"score_{side}", f"{side}_score", f"{side}_rating")
    return next((value for name in names if (value := _number(row.get(name))) is not None), None)


def _number(value: Any) -> float | None:
    """Read a finite number, in CSV from its text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _as_json(messages: list[dict[str, Any]]) -> str:
    """Write messages down the same way whatever the order of their keys and the nulls a table fills in."""
    ordered = [
        {key: m[key] for key in sorted(m, key=lambda key: (key != "role", key != "content", key)) if m[key] is not None}
        for m in messages
    ]
    return json.dumps(ordered, ensure_ascii=False, default=str)


def _hash(*parts: str | None) -> str:
    """Content hash, 128 bits in hex: the same text gives the same id on every machine, forever."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def _draw(identity: str, seed: int) -> str:
    """Order ids at random but for good: adding rows does not move the others."""
    return hashlib.blake2b(f"{seed}:{identity}".encode(), digest_size=16).hexdigest()


def _share(identity: str, seed: int) -> float:
    """Place an id at random, but for good, in [0, 1)."""
    return int(_draw(identity, seed), 16) / 2**128


def _counted(dropped: pl.DataFrame) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped["reason"].value_counts(sort=True).rows())


def _source_names(sources: Sequence[str]) -> dict[str, str]:
    """Name each source by its file, or as it was given where two files have one name."""
    names = {source: _source_name(source) for source in sources}
    return {source: name if list(names.values()).count(name) == 1 else source for source, name in names.items()}


def _source_name(source: str) -> str:
    if is_embedded(source):
        return source.removeprefix("embedded:")
    path = Path(source)
    return path.name.removesuffix(".gz").rsplit(".", 1)[0] if path.exists() else source


def _fingerprint(source: str) -> str:
    """Checksum of a source's content; a hub id stands for itself."""
    path = pair_file(source) if is_embedded(source) else Path(source)
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        sums = [sha256(file) for file in sorted(path.glob("*")) if file.is_file()]
        return hashlib.sha256("".join(sums).encode()).hexdigest()
    return source


if __name__ == "__main__":
    command(main)
