"""The run folder: atomic writes, what made each table, what is up to date, who works on what."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import polars as pl

from sdpo_data.tables import DOCUMENTS, DROPPED, ITEMS, METRICS, STEPS, UNIT, SdpoError, check

log = logging.getLogger(__name__)

HEARTBEAT = 15.0  # seconds between two signs of life of a lease
DEAD_AFTER = 120.0  # seconds without one, after which another process may take the unit over
PACKAGES = ("sdpo", "polars", "datasets", "tokenizers", "torch", "transformers", "trl", "peft", "lm_eval")


@dataclass
class Stage:
    """One unit of work on a run: a table, an arm's step, a model's items."""

    run: "Run"
    current: bool
    """The unit is finished, by this very recipe and from these very inputs: nothing to do."""
    outputs: list[str] = field(default_factory=list)

    def write(self, table: str, frame: pl.DataFrame) -> pl.DataFrame:
        """Write RUN/<table>.parquet, whole or not at all, and give the frame back."""
        path = self.run.path / f"{table}.parquet"  # level 1: half the time of the default 3, and files as small
        write_atomically(path, lambda temporary: frame.write_parquet(temporary, compression_level=1))
        self.outputs.append(f"{table}.parquet")
        return frame


class Run:
    """The tables of one experiment, in one folder: `run.pairs`, `run.scores`, ... are frames."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(self, table: str) -> pl.DataFrame:
        """Read RUN/<table>.parquet.

        Raises:
            SdpoError: it is not there yet, with the command that makes it; or it is not Parquet.
        """
        path = self.path / f"{table}.parquet"
        if not path.exists():
            maker = {"results": "sdpo_eval", "contamination": "sdpo_data.decontaminate"}.get(
                table, "sdpo_data.partition"
            )
            raise SdpoError(f"{path} does not exist yet. Make it with: python -m {maker} {self.path}")
        return _read_parquet(path)

    @property
    def pairs(self) -> pl.DataFrame:
        return self.read("pairs")

    @property
    def held_out(self) -> pl.DataFrame:
        return self.read("held_out")

    @property
    def dropped(self) -> pl.DataFrame:
        return self.read("dropped")

    @property
    def contamination(self) -> pl.DataFrame:
        return self.read("contamination")

    @property
    def scores(self) -> pl.DataFrame:
        return self.read("scores")

    @property
    def partition(self) -> pl.DataFrame:
        return self.read("partition")

    @property
    def steps(self) -> pl.DataFrame:
        """STEPS of every arm and seed, finished ones only; `model` in this folder where it is gone from elsewhere."""
        rows = self._collect("arms/*/seed_*/steps.parquet", STEPS).sort("arm", "seed", "step")
        here = pl.format("{}/arms/{}/seed_{}/step_{}", pl.lit(str(self.path)), "arm", "seed", "step")
        there = pl.col("model").map_elements(lambda model: Path(model).is_dir(), pl.Boolean)
        return rows.with_columns(model=pl.when(there).then("model").otherwise(here))

    @property
    def metrics(self) -> pl.DataFrame:
        """METRICS of every finished step."""
        rows = self._collect("arms/*/seed_*/step_*/metrics.parquet", METRICS)
        return rows.join(self.steps, on=["arm", "seed", "step"], how="semi", maintain_order="left")

    @property
    def results(self) -> pl.DataFrame:
        return self.read("results")

    @property
    def items(self) -> pl.DataFrame:
        """ITEMS of every model and task evaluated so far."""
        return check(self._collect("items/*.parquet", ITEMS), ITEMS, f"{self.path}/items")

    @property
    def questions(self) -> pl.DataFrame:
        """DOCUMENTS of every task and protocol evaluated so far."""
        return self._collect("questions/*.parquet", DOCUMENTS)

    @property
    def lineage(self) -> dict[str, Any]:
        """What made each table: unit -> recipe, inputs, versions, commit, host, seconds, time."""
        path = self.path / "lineage.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise SdpoError(f"{path} cannot be read ({error}). Delete it; the tables are then made anew.") from None

    @contextlib.contextmanager
    def stage(
        self, name: str, recipe: dict[str, Any], inputs: Sequence[str] = (), *, force: bool = False
    ) -> Iterator[Stage]:
        """Enter one unit of work: check its recipe, lease it, and record what made it at the end.

        Args:
            name: the unit, e.g. "scores" or "arms/sdpo/seed_0/step_1".
            recipe: the settings that change its numbers; not device or batch size.
            inputs: tables of the run it is made from.
            force: remake it even where it is finished.

        Yields:
            Stage: do nothing if `stage.current`.

        Raises:
            SdpoError: it was finished by another recipe or from other inputs (and not `force`),
                or another process is at work on it.
        """
        recipe, sums = self._identity(recipe, inputs)
        if not force and self._is_finished(name, recipe, sums):
            yield Stage(self, current=True)
            return
        with self.lease(name):
            if not force and self._is_finished(name, recipe, sums):  # by a process that held the lease just now
                yield Stage(self, current=True)
                return
            stage, started = Stage(self, current=False), time.monotonic()
            yield stage
            sums |= self._identity({}, [table for table in inputs if f"{table}.parquet" in stage.outputs])[1]
            self._record(name, recipe, sums, stage.outputs, time.monotonic() - started)

    def is_current(self, name: str, recipe: dict[str, Any], inputs: Sequence[str] = ()) -> bool:
        """Whether a unit is finished, by this very recipe and from these very inputs; never an error."""
        try:
            return self._is_finished(name, *self._identity(recipe, inputs))
        except SdpoError:
            return False

    def replace_dropped(self, stage: str, frame: pl.DataFrame) -> None:
        """Put `frame` in the place of what `stage` had dropped before, and log the reasons."""
        with self.lock():
            path = self.path / "dropped.parquet"
            others = _read_parquet(path).filter(pl.col("stage") != stage) if path.exists() else DROPPED.to_frame()
            write_atomically(path, pl.concat([others, frame.select(list(DROPPED))]).write_parquet)
        if frame.height:
            reasons = frame["reason"].value_counts(sort=True).rows()
            log.info("dropped %d: %s", frame.height, ", ".join(f"{n:,} {reason}" for reason, n in reasons))

    @contextlib.contextmanager
    def lease(self, unit: str) -> Iterator[None]:
        """Hold a unit of work for this process, with a heartbeat, so that no other does it too.

        A file names host and process; it is taken over where that process is gone, or has not
        shown a sign of life for DEAD_AFTER seconds.

        Raises:
            SdpoError: another living process holds it.
        """
        path = self.path / ".leases" / f"{unit.replace('/', '-')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        with self.lock():
            if path.exists() and (holder := _living_holder(path)):
                raise SdpoError(
                    f"{self.path}: {unit} is being worked on by process {holder['pid']} on {holder['host']}. "
                    "Wait for it, or end it; then start again."
                )
            path.write_text(json.dumps(owner))
        stop = threading.Event()

        def ours() -> bool:  # not if we slept so long that another took it over
            with contextlib.suppress(OSError, ValueError):
                return json.loads(path.read_text()) == owner
            return False

        def beat() -> None:
            while not stop.wait(HEARTBEAT) and ours():
                path.touch()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if ours():
                path.unlink(missing_ok=True)

    def _collect(self, pattern: str, schema: pl.Schema) -> pl.DataFrame:
        files = sorted(self.path.glob(pattern))
        frames = map(_read_parquet, files)  # what a file holds beyond the schema is for those who wrote it
        known = [frame.select([name for name in schema if name in frame.columns]) for frame in frames]
        return pl.concat(known) if files else schema.to_frame()

    def _identity(self, recipe: dict[str, Any], inputs: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
        """Give a recipe as lineage.json holds it, and the sha256 of the inputs."""
        sums = {table: sha256(self.path / f"{table}.parquet") for table in inputs}
        return json.loads(json.dumps(recipe, default=str)), sums

    def _is_finished(self, name: str, recipe: dict, sums: dict[str, str]) -> bool:
        """Whether the unit is done by this recipe from these inputs; an error if by or from others."""
        made = self.lineage.get(name)
        if made is None or not all((self.path / file).exists() for file in made["outputs"]):
            return False
        stale = [table for table, sum_ in sums.items() if made["inputs"].get(table) != sum_]
        if stale:
            raise SdpoError(
                f"{self.path / name} is stale: {stale[0]}.parquet has changed since it was made. --force remakes it."
            )
        changed = [
            key for key in sorted(recipe.keys() | made["recipe"].keys()) if recipe.get(key) != made["recipe"].get(key)
        ]
        if changed:
            key = changed[0]
            raise SdpoError(
                f"{self.path / name} was made with {key} = {made['recipe'].get(key)!r}, now it is {recipe.get(key)!r}"
                f"{f' (and {len(changed) - 1} more differ)' if changed[1:] else ''}. "
                "Choose another run folder, or --force to remake it; what depends on it is then stale."
            )
        return True

    def _record(self, name: str, recipe: dict, sums: dict[str, str], outputs: list[str], seconds: float) -> None:
        entry = {
            "recipe": recipe,
            "inputs": sums,
            "outputs": sorted(set(outputs)),
            "sha256": {file: sha256(self.path / file) for file in sorted(set(outputs)) if file.endswith(".parquet")},
            "seconds": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": f"{socket.gethostname()} ({platform.machine()}, {os.cpu_count()} cores)",
            "commit": _commit(),
            "versions": _versions(),
        }
        with self.lock():
            lineage = self.lineage
            for other in lineage.values():  # a file's checksum stands with the last that wrote it
                for file in outputs:
                    other["sha256"].pop(file, None)
            text = json.dumps(lineage | {name: entry}, indent=1, ensure_ascii=False)
            write_atomically(self.path / "lineage.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def lock(self) -> filelock.BaseFileLock:
        """Keep other processes from the files that all units write: lineage, dropped pairs, config."""
        self.path.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self.path / ".lock")


def only_kept(steps: pl.DataFrame, why: str) -> pl.DataFrame:
    """Keep the rows of STEPS whose weights are still there, and name the others: `train.keep: last` removes some.

    Args:
        why: what the others are left out of, for the line that says so.
    """
    kept = steps["model"].map_elements(lambda model: any(Path(model).glob("*.safetensors")), pl.Boolean)
    gone = steps.filter(~kept).select(pl.format("{}/{}/{}", *UNIT)).to_series()
    if len(gone):
        log.warning("%s: weights not kept (train.keep last), so left out of %s.", ", ".join(gone), why)
    return steps.filter(kept)


def open_run(path: str | Path) -> Run:
    """Open a run folder; its tables are frames: `run.scores`, `run.steps`, ...

    Raises:
        SdpoError: there is no such folder.
    """
    if not Path(path).is_dir():
        raise SdpoError(f"There is no run folder {path}. Make one with: python -m sdpo_data.partition {path}")
    return Run(path)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file or a folder under a temporary name beside it, then rename it: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if temporary.is_dir() and path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hash a file: sha256, in hex.

    Raises:
        SdpoError: it is not there.
    """
    if not path.exists():
        raise SdpoError(f"{path} does not exist yet. Make it with: python -m sdpo_data.partition {path.parent}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_parquet(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SdpoError(f"{path} cannot be read as Parquet ({error}). Delete it; its command makes it anew.") from None


def _living_holder(path: Path) -> dict | None:
    try:
        holder, last_sign = json.loads(path.read_text()), path.stat().st_mtime
    except (OSError, ValueError):  # given back this moment, or never written to its end
        return None
    if time.time() - last_sign > DEAD_AFTER:
        return None
    if holder["host"] == socket.gethostname() and not _alive(holder["pid"]):
        return None
    return holder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _commit() -> str | None:
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return git.stdout.strip() if git.returncode == 0 else None
