"""README and docs: their commands have the flags they are shown with, their code runs, what they point to is there."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page, language, text)
    for page in PAGES
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
]
PLANNED = ("--plan", "--unit", "--json")


def commands() -> list[tuple[str, list[str]]]:
    """Every `python -m sdpo_...` in a code block or between backticks: module, and the flags it is given."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:python|launch[^\n`]*?) -m (sdpo_\w+(?:\.\w+)?[^\n`|]*)", text):
            module, *words = shlex.split(line, comments=True)
            found.append((module, [word.partition("=")[0] for word in words if word.startswith("--")]))
    return found


@pytest.mark.parametrize("module", sorted({module for module, _ in commands()}))
def test_commands_have_the_flags_they_are_shown_with(module, run_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run_command(module, "--help")
    assert code == 0, err
    known = set(re.findall(r"--[\w.-]+", out))
    for flags in (flags for name, flags in commands() if name == module):
        if importlib.util.find_spec("sdpo_train.plan") is None:
            flags = [flag for flag in flags if flag not in PLANNED]
        assert set(flags) <= known, flags


def test_the_pages_show_every_command():
    shown = {module for module, _ in commands()}
    files = [file for package in ("sdpo_data", "sdpo_train", "sdpo_eval") for file in (ROOT / package).glob("*.py")]
    own = {
        f"{file.parent.name}.{file.stem}".removesuffix(".__main__")
        for file in files
        if 'if __name__ == "__main__":' in file.read_text("utf-8")
    }
    assert own <= shown


def test_shell_blocks_are_shell():
    for page, language, text in BLOCKS:
        if language in ("", "bash") and "python -m" in text and "[RUN" not in text:
            done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
            assert done.returncode == 0, f"{page.name}: {done.stderr}"


def test_make_targets_and_recipes_are_there():
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text("utf-8")
        assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= made
        for name in re.findall(r"configs/([\w.-]+\.yaml)", text):
            assert (ROOT / "configs" / name).exists(), f"{page.name}: {name}"


def test_links_and_files_named_are_there():
    for page in PAGES:
        text = page.read_text("utf-8")
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for name in re.findall(r"`((?:tests|notebooks|benchmarks|docs)/\w+\.\w+)`", text):
            if name != "tests/test_cuts.py" or importlib.util.find_spec("sdpo_data.cuts"):
                assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_picture_is_a_small_one():
    picture = (ROOT / "docs/report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000


def test_the_file_map_names_files_that_are_there():
    text = (ROOT / "README.md").read_text("utf-8")
    lines = re.search(r"^## Files\n+```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1].splitlines()
    package = None
    for line in lines:
        own = re.match(r"(sdpo_\w+)/ +(\w+) ", line) or re.match(r"( {14})(\w+) ", line)
        if own:
            package = own[1] if own[1].strip() else package
            assert (ROOT / str(package) / f"{own[2]}.py").exists(), line


@pytest.fixture
def far_reading(tiny_model, tmp_path) -> Path:
    """Give the tiny model room for 25 shots in bytes."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 32_768}
    (model / "config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.real
@pytest.mark.parametrize("title", ["Your own pairs and model", "On one GPU", "On eight GPUs"])
def test_what_how_to_shows_runs_line_by_line(title, far_reading, pair_file, tmp_path, run_command, monkeypatch):
    """With a tiny model, pairs of the tests, one process and one question in place of what the page names."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    page = (ROOT / "docs/how-to.md").read_text("utf-8")
    (block,) = re.findall(rf"^## {title}\n+```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    named = {"path/to/my-sft": far_reading, "my-org/my-sft": far_reading, "my-org/my-pairs:train": pair_file}
    named["my_pairs.jsonl"] = pair_file
    for line in block.splitlines():
        module, run, *words = shlex.split(re.sub(r"^(python|accelerate launch --num_processes 8) -m ", "", line))
        flags = [named.get(word, word) for word in words]
        if "--source" in words:
            flags += ["--hold-out", "0.5"]  # of eight pairs
        if module == "sdpo_eval":
            flags += ["--tasks", "hellaswag", "--limit", "1"]
        code, _, err = run_command(module, str(tmp_path / Path(run).name), *flags)
        assert code == 0, f"{line}: {err}"


@pytest.mark.real
def test_the_fifteen_lines_run(far_reading, pair_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (code,) = [text for page, language, text in BLOCKS if page.name == "README.md" and language == "python"]
    assert len(code.splitlines()) <= 15
    replaced = {
        '"embedded:smollm2-135m"': repr(str(far_reading)),
        '["embedded:alpaca-eval", "embedded:piqa"]': repr(str(pair_file)),
        '"runs/a"': repr(str(tmp_path / "a")),
        "evals.Report(": "report = evals.Report(",
    }
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    space: dict = {}
    exec(code, space)  # the text under test, ours
    assert space["rows"]["task"].n_unique() >= 3
    assert Path(space["report"].save()).stat().st_size < 5_000_000
