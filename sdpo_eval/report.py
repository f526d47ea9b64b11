"""A run's report: one page that needs no network, Markdown, JSON, and the Hub's model-index, from run folders alone.

Examples:
    python -m sdpo_eval.report runs/demo      # report.html, .md and .json, and model-index.yaml, in runs/demo
    python -m sdpo_eval.report runs/a runs/b  # one report on both: comparison.html, .md and .json, in runs/a
"""

import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import tyro

from sdpo_data.console import command, print_table, say
from sdpo_data.run import Run, open_run, sha256, write_atomically
from sdpo_data.tables import SdpoError
from sdpo_eval.blocks import Missing, Prose, Table
from sdpo_eval.evidence import read_evidence
from sdpo_eval.hub import write_model_index
from sdpo_eval.render import LONGEST_VALUE, plain, render_html, render_markdown, shown
from sdpo_eval.sections import compare_sections, describe_run, write_sections
from sdpo_eval.versus import name_runs

HERE = Path(__file__).parent
READS = (
    "*.parquet",
    "arms/*/seed_*/*.parquet",
    "arms/*/seed_*/step_*/*.parquet",
    "items/*.parquet",
    "questions/*.parquet",
    "held_out_scores/*.parquet",
    "*.yaml",
    "lineage.json",
)


class Report:
    """What run folders say: `sdpo_eval.Report("runs/a")` renders in a notebook, `.save()` writes files.

    Args:
        run: the run folder; what is not there yet makes a shorter report that says so.
        others: more run folders: the report then compares the first with each of them.

    Raises:
        SdpoError: there is no such folder, or one of its tables cannot be read.
    """

    def __init__(self, run: str | Path | Run, *others: str | Path | Run):
        self.runs = [one if isinstance(one, Run) else open_run(one) for one in (run, *others)]
        self.run = self.runs[0]
        self.inputs = _inputs(self.runs)  # before reading: what changes from here on makes the report out of date
        evidences = [read_evidence(one) for one in self.runs]
        self.results = evidences[0].results
        if others:
            self.name = " against ".join(name_runs(evidences))
            self.summary = f"{len(evidences)} runs, the first set against the others · {describe_run(evidences[0])}"
            self.sections = compare_sections(evidences)
        else:
            self.name = self.run.path.resolve().name
            self.summary, self.sections = describe_run(evidences[0]), write_sections(evidences[0])

    def __repr__(self) -> str:
        return f"<Report of {self.name}; .save() writes {', '.join(self.files)} into {self.run.path}>"

    def _repr_html_(self) -> str:
        page = html.escape(self.html())  # a frame of its own: styles and scripts of page and notebook stay apart
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="width: 100%; height: 85vh; border: 0"></iframe>'

    @property
    def files(self) -> list[str]:
        """Names of the files that `save` writes; the JSON comes last: with it the report counts as made."""
        return _files(len(self.runs))

    def html(self) -> str:
        """Write the page; it opens from disk and loads nothing."""
        return render_html(self.name, self.summary, self.sections)

    def markdown(self) -> str:
        """Write the same as Markdown, without figures."""
        return render_markdown(self.name, self.summary, self.sections)

    def model_index(self) -> str:
        """Write the last models' scores as the `model-index` of a model card, YAML: of the first run alone."""
        return write_model_index(self.results, self.run.path.resolve().name)

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
            "run": self.name,
            "summary": self.summary,
            **said,
            "tables": tables,
            "inputs": self.inputs,
        }
        return json.dumps(plain(content, LONGEST_VALUE), indent=1, ensure_ascii=False, allow_nan=False)

    def save(self) -> Path:
        """Write the report's files into the (first) run folder, each whole or not at all.

        Returns:
            Path of the page.
        """
        write = {".html": self.html, ".md": self.markdown, ".yaml": self.model_index, ".json": self.json}
        for name in self.files:
            text = write[Path(name).suffix]()
            write_atomically(self.run.path / name, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
        return self.run.path / self.files[0]

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


def is_current(*runs: Run) -> bool:
    """Whether the report is there and was made of what the run folders hold now, by this very code."""
    files = [runs[0].path / name for name in _files(len(runs))]
    try:
        made = json.loads(files[-1].read_text("utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return made == _inputs(runs) and all(file.exists() for file in files)


def _files(runs: int) -> list[str]:
    if runs > 1:
        return ["comparison.html", "comparison.md", "comparison.json"]
    return ["report.html", "report.md", "model-index.yaml", "report.json"]


def _inputs(runs: Sequence[Run]) -> dict[str, str]:
    """Take the sha256 of every file the report is made from, and of the code that makes it."""
    code = [file for folder in (HERE, HERE / "templates") for file in folder.iterdir() if file.is_file()]
    sums = "\n".join(f"{file.name} {sha256(file)}" for file in sorted(code))
    inputs = {"sdpo_eval": hashlib.sha256(sums.encode()).hexdigest()}
    for run in runs:
        place = f"{run.path}/" if run is not runs[0] else ""
        files = sorted({file for pattern in READS for file in run.path.glob(pattern)} - {run.path / "model-index.yaml"})
        inputs |= {f"{place}{file.relative_to(run.path)}": sha256(file) for file in files}
    return inputs


def main(argv: list[str] | None = None) -> None:
    """Write the report of RUN into it, or of several runs into the first one, and print the scores."""
    runs, force = tyro.cli(_arguments, args=argv, prog="python -m sdpo_eval.report", description=__doc__)
    if is_current(*runs) and not force:
        say(f"up to date: {runs[0].path / _files(len(runs))[0]}")
        return
    report = Report(*runs)
    page = report.save()
    if (scores := report.table("scores")) is not None:
        print_table(scores, "points of 100 ± standard error, n questions")
    for warning in report.warnings:
        say(warning)
    say(str(page))


def _arguments(
    run: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")],
    *,
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> tuple[list[Run], bool]:
    """Read the flags.

    Args:
        run: Run folder; several make one report that compares the first with the others.
        force: Write the report even where it is up to date.
    """
    if not run:
        raise SdpoError("No run folder is named. Name one: python -m sdpo_eval.report RUN")
    return [open_run(path) for path in run], force


if __name__ == "__main__":
    command(main)
