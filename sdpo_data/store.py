"""The score store: log-probabilities kept by what was computed, not by who asked or what it was called.

A folder outside the runs (the cache folder, or the setting score.store) with one folder for each model key
and dtype. An answer is known by a hash of its token ids and of where it starts: so another template,
boundary or cut is another answer, and another learning rate, run name or seed is the same one.

    <store>/<model key>-<dtype>/<hash of the content>.parquet    SHARD rows, one bin's or many compacted
    <store>/<model key>-<dtype>/plans/<hash>.parquet             bins begun and not finished: what to go on with

A shard is written whole or not at all, is named by a hash of its bytes, and is checked against it when it
is read. So the folder can be copied, merged with another by copying, and used by several processes.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import filelock
import polars as pl

from sdpo_data.assets import cache_folder
from sdpo_data.run import write_atomically
from sdpo_data.tables import SdpoError

log = logging.getLogger(__name__)

SHARD = pl.Schema(
    {  # one row per answer
        "request": pl.String,  # tree.request_key: hash of its token ids and where the completion starts
        "logp": pl.Float64,  # nats, summed over completion tokens
        "tokens": pl.Int32,  # of the completion
        "bin": pl.String,  # the bin it was computed in: the same bin again gives the same bits
        "place": pl.Int32,  # its place in that bin
        "row_tokens": pl.Int32,  # tokens of a forward pass there
        "packed": pl.Boolean,  # as a prefix tree; if not, as a padded batch; null in shards of before it was kept
        "token_logps": pl.List(pl.Float32),  # of each completion token, where they were asked for
    }
)
PLAN = pl.Schema(
    {  # one row per answer that is to be computed, bins in their order
        "bin": pl.String,
        "place": pl.Int32,
        "request": pl.String,
        "packed": pl.Boolean,  # as a prefix tree; if not, as a padded batch
        "row_tokens": pl.Int32,
        "tokens": pl.Int64,  # that the bin computes
    }
)
COMPACT_FROM = 64  # shards that are merged into one, so that a million pairs do not leave ten thousand files


class ScoreStore:
    """What one model in one dtype has been asked before.

    Args:
        folder: of all models; None for the cache folder.
        model_key: of the weights, see `models.model_key`.
        dtype: of the forward pass.

    Raises:
        SdpoError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None, model_key: str, dtype: str):
        root = Path(folder).expanduser() if folder else cache_folder() / "scores"
        self.folder = root / f"{model_key}-{dtype}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SdpoError(
                f"score.store {root} cannot be made ({error.strerror}). Name a folder that can be written to."
            ) from None
        self._seen: set[str] = set()  # names of shards read, written, or found damaged
        self._frames = [SHARD.to_frame()]
        self.refresh()

    def refresh(self) -> None:
        """Read the shards that others have written since."""
        new = [path for path in sorted(self.folder.glob("*.parquet")) if path.name not in self._seen]
        while new:  # once more where another process merged some of them meanwhile
            self._frames += [frame for frame in map(self._read_shard, new) if frame is not None]
            new = [path for path in sorted(self.folder.glob("*.parquet")) if path.name not in self._seen]

    def find(self, requests: Sequence[str], *, token_logps: bool = False) -> pl.DataFrame:
        """Look requests up: SHARD rows of those that are known, each once.

        Args:
            requests: their keys.
            token_logps: only those whose tokens' log-probabilities are known too.
        """
        wanted = pl.DataFrame({"request": requests}, {"request": pl.String}).unique(maintain_order=True)
        self._frames = [_each_once(self._frames)]
        found = wanted.join(self._frames[0], on="request", maintain_order="left")
        return found.filter(pl.col("token_logps").is_not_null()) if token_logps else found

    def write(self, rows: pl.DataFrame) -> None:
        """Keep SHARD rows, of one bin or of many."""
        self._frames.append(rows.select(list(SHARD)))
        self._seen.add(self._write_shard(rows))

    def begin(self, plan: pl.DataFrame) -> None:
        """Write the PLAN rows of some bins down before they are computed.

        A start after a kill finds them with `unfinished` and goes on with the very same bins, so that
        it ends with the very same bits.
        """
        name = hashlib.sha256("".join(plan["bin"].unique().sort()).encode()).hexdigest()[:32]
        write_atomically(self.folder / "plans" / f"{name}.parquet", plan.write_parquet)

    def unfinished(self) -> pl.DataFrame:
        """Read the PLAN rows of all bins that were begun and not finished, each bin once."""
        plans = [_parquet_or_none(path) for path in sorted((self.folder / "plans").glob("*.parquet"))]
        rows = pl.concat([PLAN.to_frame(), *(plan for plan in plans if plan is not None)])
        return rows.unique(["bin", "place"], maintain_order=True)

    def finish(self) -> None:
        """Forget plans whose answers are all known, and merge small shards."""
        for path in (self.folder / "plans").glob("*.parquet"):
            plan = _parquet_or_none(path)
            if plan is None or self.find(plan["request"].to_list()).height == plan["request"].n_unique():
                path.unlink(missing_ok=True)
        if len(list(self.folder.glob("*.parquet"))) >= COMPACT_FROM:
            with filelock.FileLock(self.folder / ".lock"):
                self._merge()

    def _merge(self) -> None:
        known = set(self._seen)
        frames = {path: self._read_shard(path) for path in sorted(self.folder.glob("*.parquet"))}
        whole = {path: frame for path, frame in frames.items() if frame is not None}
        self._frames += [frame for path, frame in whole.items() if path.name not in known]  # not read again by refresh
        if len(whole) < COMPACT_FROM:  # another process was here before
            return
        merged = self._write_shard(_each_once(whole.values()))
        self._seen.add(merged)
        for path in whole:  # only now: readers meanwhile find a row twice, never not at all
            if path.name != merged:
                path.unlink(missing_ok=True)

    def _write_shard(self, rows: pl.DataFrame) -> str:
        buffer = BytesIO()
        rows.select(list(SHARD)).write_parquet(buffer, compression="zstd")
        name = f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:32]}.parquet"
        write_atomically(self.folder / name, lambda temporary: temporary.write_bytes(buffer.getvalue()))
        return name

    def _read_shard(self, path: Path) -> pl.DataFrame | None:
        """Read a shard, or say why not: gone since (compacted by another process), or not what its name says."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        self._seen.add(path.name)
        if hashlib.sha256(content).hexdigest()[:32] != path.stem:
            log.warning("%s is damaged (its name is a hash of its content): its answers are not used", path)
            return None
        rows = pl.read_parquet(BytesIO(content))
        if "packed" not in rows.columns:
            rows = rows.with_columns(packed=pl.lit(None, pl.Boolean))
        return rows.select(list(SHARD)).cast(dict(SHARD))  # type: ignore[arg-type]


def _each_once(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Give SHARD rows with each request once, by the row that says most: how it was computed, and of each token."""
    rows = pl.concat(frames).sort(pl.col("packed", "token_logps").is_null(), maintain_order=True)
    return rows.unique("request", keep="first", maintain_order=True)


def _parquet_or_none(path: Path) -> pl.DataFrame | None:
    try:
        return pl.read_parquet(path).select(list(PLAN))
    except (pl.exceptions.PolarsError, OSError):  # finished this moment; a damaged plan costs only the same bits
        return None
