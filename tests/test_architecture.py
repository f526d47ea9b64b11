"""Who may import whom, and what no file may hold. Change these tables when the design changes, not by accident."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sdpo_data", "sdpo_train", "sdpo_eval")
FORBIDDEN = {
    "sdpo_data": {"sdpo_train", "sdpo_eval", "trl", "peft", "lm_eval", "altair"},
    "sdpo_train": {"sdpo_eval", "lm_eval", "altair"},
    "sdpo_eval": {"sdpo_train", "trl", "peft"},
}
ONLY_DOOR = {"trl": "sdpo_train/trainer.py", "peft": "sdpo_train/trainer.py", "lm_eval": "sdpo_eval/harness.py"}
HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "lm_eval", "accelerate")
WITHOUT_HEAVY = (
    *("sdpo_data.tables", "sdpo_data.config", "sdpo_data.run", "sdpo_data.console", "sdpo_data.assets"),
    *(
        "sdpo_data.pairs",
        "sdpo_data.formats",
        "sdpo_data.sources",
        "sdpo_data.encode",
        "sdpo_data.models",
        "sdpo_data.difficulty",
        "sdpo_data.score",
    ),
    *("sdpo_data.partition", "sdpo_data.export", "sdpo_train.arms", "sdpo_train.steps", "sdpo_train.__main__"),
    *("sdpo_train.diagnostics", "sdpo_train.cost", "sdpo_train.card"),
    *("sdpo_eval.stats", "sdpo_eval.plots", "sdpo_eval.report", "sdpo_eval.compare", "sdpo_eval.held_out"),
)


def files(package: str) -> Iterator[Path]:
    yield from sorted((ROOT / package).rglob("*.py"))


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imports(file: Path) -> set[str]:
    """Top names of all a file imports, inside functions and by import_module("...") too."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {str(word.value) for word in ast.walk(node) if isinstance(word, ast.Constant)}
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_walls_between_the_packages_hold(package):
    for file in files(package):
        assert not imports(file) & FORBIDDEN[package], file


@pytest.mark.parametrize("dependency", ONLY_DOOR)
def test_a_dependency_has_one_door(dependency):
    users = [
        str(file.relative_to(ROOT)) for package in PACKAGES for file in files(package) if dependency in imports(file)
    ]
    assert users == [ONLY_DOOR[dependency]]


def test_reading_partitioning_and_reporting_need_no_torch():
    code = f"""
import sys
for name in {HEAVY}: sys.modules[name] = None
import {", ".join((*PACKAGES, *WITHOUT_HEAVY))}
import polars as pl
row = ("a", "q", "s", "key", -2.0, -3.0, 1, 2, 4, False, "float32", None, None, None, None, None)
scores = pl.DataFrame([row], sdpo_data.tables.SCORES, orient="row")
print(sdpo_data.partition_pairs(scores, sdpo_data.PartitionConfig(parts=1))["step"].to_list())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[1]\n", 0), done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_can_be_had_and_others_are_refused(package):
    module = import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__name__ if callable(getattr(module, name)) else getattr(module, name)
    with pytest.raises(AttributeError, match=rf"module '{package}' has no attribute 'nothing'; it has \["):
        _ = module.nothing


def settings_classes() -> dict[str, set[str]]:
    return {
        node.name: {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
        for package in PACKAGES
        for file in files(package)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Settings") for base in node.bases)
    }


def test_every_setting_is_read():
    """A setting is read as `config.name`; one that nothing reads is a lie to the user who sets it."""
    read = {
        node.attr
        for package in PACKAGES
        for file in files(package)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "config"
    }
    found = settings_classes()
    assert set(found) >= {"PairsConfig", "ScoreConfig", "PartitionConfig", "TrainConfig", "EvalConfig"}
    assert {name: fields - read for name, fields in found.items() if fields - read} == {}


def test_every_setting_says_what_it_does():
    modules = [
        import_module(f"{file.parent.name}.{file.stem}") for p in PACKAGES for file in files(p) if _has_settings(file)
    ]
    for module in modules:
        for name in settings_classes().keys() & vars(module).keys():
            for field, info in getattr(module, name).model_fields.items():
                assert info.description, f"{name}.{field} has no docstring, which is its --help"


def test_shipped_recipes_hold_only_settings_there_are():
    from sdpo_data.config import SECTIONS, read_command, recipes
    from sdpo_data.decontaminate import DecontaminateConfig
    from sdpo_data.export import ExportConfig
    from sdpo_data.pairs import PairsConfig
    from sdpo_data.partition import PartitionConfig
    from sdpo_data.score import ScoreConfig
    from sdpo_eval import CompareConfig, EvalConfig
    from sdpo_train import TrainConfig

    models = {"pairs": PairsConfig, "score": ScoreConfig, "partition": PartitionConfig, "train": TrainConfig}
    models |= {"eval": EvalConfig, "decontaminate": DecontaminateConfig, "compare": CompareConfig}
    models |= {"export": ExportConfig}
    assert set(models) | {"model"} == set(SECTIONS)
    for recipe in recipes():
        read_command("recipe", "", "partition", models, ["no/such/run", "--config", recipe])


def project_files() -> list[Path]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    if not names:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


NOT_IN_A_FILE = {
    "a package registry's host": r"pypi\.(org|python)|pythonhosted\.org|npmjs\.(org|com)|deb\.debian\.org",
    "a package index": r"index-url|registry=http",
    "a path of one machine": r"(?<![\w.*])/(work|root|opt|Users)/\w",
}


@pytest.mark.parametrize("what", NOT_IN_A_FILE)
def test_no_file_names(what):
    pattern = re.compile(NOT_IN_A_FILE[what], re.IGNORECASE)
    for file in project_files():
        if file == Path(__file__).resolve():
            continue
        found = pattern.search(file.read_bytes().decode("utf-8", errors="replace"))
        assert found is None, f"{file}: {found.group() if found else ''}"


UNSAFE = ("trust_remote_code=True", "weights_only=False", "shell=True", "allow_pickle=True")


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_runs_code_that_came_with_data(package):
    for file in files(package):
        assert not imports(file) & {"pickle", "dill", "joblib", "marshal", "shelve"}, file
        calls = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
        assert not {ast.unparse(call.func) for call in calls} & {"eval", "exec", "torch.load", "os.system"}, file
        assert not {ast.unparse(keyword) for call in calls for keyword in call.keywords} & set(UNSAFE), file


def test_commands_are_teachable():
    """Every `python -m` of ours teaches itself: a docstring, and main."""
    commands = [
        file for package in PACKAGES for file in files(package)
        if any("__main__" in ast.unparse(node.test) for node in tree(file).body if isinstance(node, ast.If))
    ]  # fmt: skip
    names = {str(file.relative_to(ROOT)) for file in commands}
    assert names >= {"sdpo_data/pairs.py", "sdpo_data/score.py", "sdpo_data/partition.py", "sdpo_train/__main__.py"}
    for file in commands:
        assert ast.get_docstring(tree(file)), file
        assert "main" in {node.name for node in tree(file).body if isinstance(node, ast.FunctionDef)}, file


def _has_settings(file: Path) -> bool:
    return "(Settings):" in file.read_text(encoding="utf-8")
