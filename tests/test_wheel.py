"""The wheel, installed elsewhere, finds its recipes and templates."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

FINDS = """
import sys
import sdpo_data, sdpo_train, sdpo_eval
from sdpo_data.config import recipe_path, recipes
from pathlib import Path
assert sdpo_data.__file__.startswith(sys.argv[1]), sdpo_data.__file__
assert {"demo", "paper"} <= set(recipes()), recipes()
assert recipe_path(Path("demo")).is_file()
import sdpo_eval.report
templates = Path(sdpo_eval.report.__file__).parent / "templates"
assert (templates / "report.html.jinja").is_file()
"""


@pytest.mark.real
def test_the_wheel_carries_what_it_needs(tmp_path):
    python = [sys.executable, "-m"]
    subprocess.run([*python, "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "runs/", "notebooks/"))]
    site = tmp_path / "site"
    subprocess.run([*python, "pip", "install", "--quiet", "--no-deps", "--target", site, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", FINDS, str(site)], check=True, cwd=tmp_path, env=environment)
    described = subprocess.run(
        [*python, "sdpo_data.partition", "--help"],
        check=True, cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert "--parts" in described.stdout
