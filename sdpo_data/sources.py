"""The raw rows of a source, its name, and a checksum of its content.

A source is a file (.jsonl, .jsonl.gz, .json, .parquet, .csv), a folder saved by `datasets`, a hub
id (`org/name`, or `org/name:split`), or embedded:NAME.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from sdpo_data.assets import hub_dataset, is_embedded, pair_file
from sdpo_data.run import sha256
from sdpo_data.tables import SdpoError

BROKEN = (pl.exceptions.PolarsError, pl.exceptions.PanicException)  # a damaged Parquet file may be either
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


def read_rows(source: str) -> Sequence[dict[str, Any] | str]:
    """Read the raw rows of a source; a line that is not JSON stays a string.

    Raises:
        SdpoError: it is not there, cannot be read, or has an unknown suffix.
    """
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


def source_names(sources: Sequence[str]) -> dict[str, str]:
    """Name each source by its file, or as it was given where two files have one name."""
    names = {source: _source_name(source) for source in sources}
    return {source: name if list(names.values()).count(name) == 1 else source for source, name in names.items()}


def fingerprint(source: str) -> str:
    """Checksum of a source's content; a hub id stands for itself."""
    path = pair_file(source) if is_embedded(source) else Path(source)
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        sums = [sha256(file) for file in sorted(path.glob("*")) if file.is_file()]
        return hashlib.sha256("".join(sums).encode()).hexdigest()
    return source


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
    except (*BROKEN, ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
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


def _source_name(source: str) -> str:
    if is_embedded(source):
        return source.removeprefix("embedded:")
    path = Path(source)
    return path.name.removesuffix(".gz").rsplit(".", 1)[0] if path.exists() else source
