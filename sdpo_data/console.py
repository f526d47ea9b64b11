"""What a person sees while a command runs: log lines, progress, tables, errors."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import polars as pl
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sdpo_data import workers
from sdpo_data.tables import SdpoError

stdout = Console(width=None if sys.stdout.isatty() else 132)  # a pipe or a file has no width
stderr = Console(stderr=True)


def command(main: Callable[[], None]) -> None:
    """Run a command's main and exit: 0 done, 2 the user can fix it, 1 a bug, 130 interrupted.

    A user's mistake is one sentence on stderr without a traceback; a bug keeps its traceback.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars: ours say what they would
    terminal = stderr.is_terminal
    handler = RichHandler(console=stderr, show_path=False, show_level=False) if terminal else logging.StreamHandler()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler], force=True)
    for package in ("sdpo_data", "sdpo_train", "sdpo_eval"):
        logging.getLogger(package).setLevel(logging.INFO if workers.is_main() else logging.WARNING)
    try:
        main()
    except SdpoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR):
            raise
        place = f" at {error.filename}" if error.filename else ""
        print(
            f"error: {error.strerror}{place}. Free some room or choose another folder; what is finished is kept.",
            file=sys.stderr,
        )
        sys.exit(2)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        return Text(f"{speed:,.1f} {task.fields['unit']}/s{task.fields['note'](speed)}", style="cyan")


@contextmanager
def progress(
    stage: str, total: int, unit: str, note: Callable[[float], str] = lambda _: ""
) -> Iterator[Callable[[int], None]]:
    """Show a bar with the stage's name, done/total, rate and time left; silent off a terminal.

    Args:
        note: what to say behind the rate, given it in units per second.

    Yields:
        advance(n): count n more units as done.
    """
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not (stderr.is_terminal or stderr.is_jupyter) or not workers.is_main(),
    )
    with bar:
        task: TaskID = bar.add_task(stage, total=total, unit=unit, note=note)
        yield lambda n: bar.advance(task, n)


def say(line: str) -> None:
    """Print one line of result to stdout; of several processes the main one speaks."""
    if workers.is_main():
        print(line)


def print_table(frame: pl.DataFrame, title: str) -> None:
    """Print a small frame to stdout, numbers to the right."""
    if not workers.is_main():
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for column, dtype in frame.schema.items():
        table.add_column(column, justify="right" if dtype.is_numeric() else "left", overflow="fold")
    for row in frame.rows():
        table.add_row(*(Text("" if value is None else _shown(value)) for value in row))
    stdout.print(table)


def _shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
