"""A run's report: one page that needs no network, Markdown, and JSON, from the run folder alone.

Example: python -m sdpo_eval.report runs/demo
"""

import hashlib
import html
import json
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import tyro

from sdpo_data.console import command, print_table, say
from sdpo_data.run import Run, open_run, sha256, write_atomically
from sdpo_eval.blocks import Missing, Prose, Table
from sdpo_eval.evidence import read_evidence
from sdpo_eval.render import plain, render_html, render_markdown, shown
from sdpo_eval.sections import describe_run, write_sections

HERE = Path(__file__).parent
READS = (
    "*.parquet",
    "arms/*/seed_*/*.parquet",
    "arms/*/seed_*/step_*/*.parquet",
    "items/*.parquet",
    "held_out_scores/*.parquet",
    "*.yaml",
    "lineage.json",
)


class Report:
    """What a run folder says: `sdpo_eval.Report("runs/a")` renders in a notebook, `.save()` writes files.

    Args:
        run: the run folder; what is not there yet makes a shorter report that says so.

    Raises:
        SdpoError: there is no such folder, or one of its tables cannot be read.
    """

    def __init__(self, run: str | Path | Run):
        self.run = run if isinstance(run, Run) else open_run(run)
        self.inputs = _inputs(self.run)  # before reading: what changes from here on makes the report out of date
        evidence = read_evidence(self.run)
        self.summary = describe_run(evidence)
        self.sections = write_sections(evidence)

    def __repr__(self) -> str:
        return f"<Report of {self.run.path}; .save() writes report.html, report.md and report.json into it>"

    def _repr_html_(self) -> str:
        page = html.escape(self.html())  # a frame of its own: styles and scripts of page and notebook stay apart
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="width: 100%; height: 85vh; border: 0"></iframe>'

    def html(self) -> str:
        """Write the page; it opens from disk and loads nothing."""
        return render_html(self.run.path.resolve().name, self.summary, self.sections)

    def markdown(self) -> str:
        """Write the same as Markdown, without figures."""
        return render_markdown(self.run.path.resolve().name, self.summary, self.sections)

    def json(self) -> str:
        """Write the numbers: every table by section and name; what was said; and the sha256 of all that was read."""
        tables: dict[str, dict[str, Any]] = {}
        said: dict[str, list[Any]] = {"prose": [], "missing": []}
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Table):
                    tables.setdefault(section.name, {})[block.name] = block
                elif block.kind in said:
                    said[block.kind].append(block)
        content = {
            "run": self.run.path.resolve().name,
            "summary": self.summary,
            **said,
            "tables": tables,
            "inputs": self.inputs,
        }
        return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)

    def save(self) -> Path:
        """Write report.html, report.md and report.json into the run folder, each whole or not at all.

        Returns:
            Path of report.html.
        """
        texts = {"report.html": self.html(), "report.md": self.markdown(), "report.json": self.json()}
        for name, text in texts.items():  # report.json comes last: with it the report counts as made
            write_atomically(self.run.path / name, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
        return self.run.path / "report.html"

    @property
    def warnings(self) -> list[str]:
        """What a reader of any number must not miss: limits, and what is missing."""
        blocks = [block for section in self.sections for block in section.blocks]
        missing = [f"{block.text} {block.command}" for block in blocks if isinstance(block, Missing)]
        return [block.text for block in blocks if isinstance(block, Prose) and block.loud] + missing

    def table(self, name: str) -> pl.DataFrame | None:
        """Give one of the report's tables as text, e.g. "scores"; None where the run has not got that far."""
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Table) and block.name == name:
                    return pl.DataFrame([{column: shown(cell) for column, cell in row.items()} for row in block.rows])
        return None


def is_current(run: Run) -> bool:
    """Whether the report is there and was made of what the run folder holds now, by this very code."""
    try:
        made = json.loads((run.path / "report.json").read_text("utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return made == _inputs(run) and all((run.path / name).exists() for name in ("report.html", "report.md"))


def _inputs(run: Run) -> dict[str, str]:
    """Take the sha256 of every file the report is made from, and of the code that makes it."""
    files = sorted({file for pattern in READS for file in run.path.glob(pattern)})
    code = [file for folder in (HERE, HERE / "templates") for file in folder.iterdir() if file.is_file()]
    sums = "\n".join(f"{file.name} {sha256(file)}" for file in sorted(code))
    return {str(file.relative_to(run.path)): sha256(file) for file in files} | {
        "sdpo_eval": hashlib.sha256(sums.encode()).hexdigest()
    }


def main(argv: list[str] | None = None) -> None:
    """Write RUN/report.html, report.md and report.json, and print the scores."""
    run, force = tyro.cli(_arguments, args=argv, prog="python -m sdpo_eval.report", description=__doc__)
    if is_current(run) and not force:
        say(f"up to date: {run.path / 'report.html'}")
        return
    report = Report(run)
    page = report.save()
    if (scores := report.table("scores")) is not None:
        print_table(scores, "points of 100 ± standard error, n questions")
    for warning in report.warnings:
        say(warning)
    say(str(page))


def _arguments(
    run: Annotated[Path, tyro.conf.Positional], *, force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
) -> tuple[Run, bool]:
    """Read the flags.

    Args:
        run: Run folder.
        force: Write the report even where it is up to date.
    """
    return open_run(run), force


if __name__ == "__main__":
    command(main)
