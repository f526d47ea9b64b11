"""Several processes at one piece of work, as `accelerate launch` starts them: which one this is, and the others.

One process alone needs neither torch nor accelerate here.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from sdpo_data.run import Run, Stage

Made = TypeVar("Made")

PATIENCE = datetime.timedelta(days=7)  # the slowest process may take its time


def count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def local_rank() -> int:
    """Which of those on this host: the device it computes on."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that reads, writes and prints for all."""
    return rank() == 0


def share(value: Any) -> Any:
    """Give every process the main one's value; all of them must call it."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _join()
    return broadcast_object_list([value])[0]  # type: ignore[index]


def gather(value: Any) -> list[Any]:
    """Give every process the values of all, by rank; all of them must call it."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    _join()
    return gather_object([value])


def from_main(make: Callable[[], Made]) -> Made:
    """Have the main process make a thing, and give it to all; all of them must call it."""
    return share(make() if is_main() else None)


@contextlib.contextmanager
def main_stage(
    run: "Run", name: str, recipe: dict[str, Any], inputs: Sequence[str] = (), *, force: bool = False
) -> "Iterator[Stage]":
    """Enter `Run.stage` for all processes: the main one checks, leases and records, the others follow its word.

    Yields:
        The main process's stage; in the others one that is as current, and writes nothing.
    """
    from sdpo_data.run import Stage

    if is_main():
        with run.stage(name, recipe, inputs, force=force) as stage:
            share(stage.current)
            yield stage
    else:
        yield Stage(run, current=share(None))
    wait()  # what the main process wrote is there for all


def main_first(make: Callable[[], Made], read: Callable[[], Made]) -> Made:
    """Have the main process make a thing, and the others read it when it is there."""
    made = make() if is_main() else None
    wait()
    return read() if made is None else made


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        _join().wait_for_everyone()


def _join() -> Any:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
