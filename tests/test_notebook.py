"""Notebooks run from top to bottom on the embedded assets, and are kept without outputs."""

import json

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs_and_equal_their_script(path):
    import jupytext

    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    script = jupytext.read(path.with_suffix(".py"))
    assert ["".join(cell["source"]) for cell in cells] == [cell["source"] for cell in script["cells"]]


FIGURES = 3  # at least: a notebook tells its story in pictures
MINUTES = {"03_training_dynamics", "05_your_own"}  # they train


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in MINUTES else pytest.mark.real) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebooks_run(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    report = tmp_path / "runs" / "notebook" / "report.html"
    last = notebook["cells"][-1]
    shown = last["outputs"][-1]["data"]["text/html"]
    assert len(shown) > (10_000 if "Report(" in last["source"] else 500)
    outputs = [output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    own = [page for output in outputs if "<iframe" not in (page := output.get("text/html", ""))]  # beside the report's
    assert sum("vegaEmbed(" in page for page in own) >= FIGURES
    assert not report.exists() or report.stat().st_size < 5_000_000
