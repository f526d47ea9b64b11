import os
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from sdpo_data.config import Command, Settings, merge_config, read_command, recipe_path, recipes
from sdpo_data.run import Run
from sdpo_data.tables import SdpoError


class CookConfig(Settings):
    minutes: int = pydantic.Field(12, ge=1)
    """How long."""
    heat: float = pydantic.Field(0.5, gt=0, le=1)
    """How hot."""
    salt: list[str] = pydantic.Field(["sea"])
    """Which."""
    grams: int | None = None
    """How much; None weighs nothing."""
    from_seconds: int = 60

    @pydantic.model_validator(mode="after")
    def _cold_takes_long(self) -> "CookConfig":
        if self.heat < 0.1 and self.minutes < 30:
            raise ValueError(f"heat {self.heat} needs 30 minutes, not {self.minutes}")
        return self


class ServeConfig(Settings):
    plates: int = pydantic.Field(4, ge=1)
    rate: float = 1.0


@pytest.fixture
def read(tmp_path):
    """Read a command's settings in RUN = tmp_path/run, whose config.yaml is given as text."""

    def read(yaml: str | None = None, *flags: str, run: str = "run") -> Command:
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        if yaml is not None:
            (folder / "config.yaml").write_text(yaml)
        models: dict[str, type[Settings]] = {"train": CookConfig, "score": ServeConfig}
        return read_command("python -m cook", "Cook.", "train", models, [str(folder), *flags])

    return read


def test_defaults_hold_without_file_and_flags(read):
    call = read()
    assert call.settings == {"train": CookConfig(), "score": ServeConfig()}
    assert call.model == "embedded:smollm2-135m"
    assert call.force is False
    assert call.file == {}


def test_later_wins_file_then_recipe_then_flags(read, tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text("model: recipe/model\ntrain: {minutes: 3, from_seconds: 33}\n")
    call = read("model: file/model\ntrain: {minutes: 2, heat: 0.2}\n", "--config", str(recipe), "--minutes", "4")
    assert call.settings["train"] == CookConfig(minutes=4, heat=0.2, from_seconds=33)
    assert call.model == "recipe/model"
    assert call.file == {"model": "recipe/model", "train": {"minutes": 4, "heat": 0.2, "from_seconds": 33}}


def test_other_sections_have_their_name_before_their_flags(read):
    call = read(None, "--score.plates", "7", "--salt", "sea", "rock", "--grams", "5")
    assert call.settings["score"] == ServeConfig(plates=7)
    assert call.settings["train"] == CookConfig(salt=["sea", "rock"], grams=5)


def test_a_flag_takes_a_setting_back_to_none(read):
    assert read("train: {grams: 5}\n", "--grams", "None").file == {"train": {"grams": None}}


@pytest.mark.parametrize("written", ["5e-7", "5.0e-7", "0.0000005", "5E-07"])
def test_a_small_number_is_a_number_however_it_is_written(read, written):
    assert read(f"train: {{heat: {written}, minutes: 40}}\n").settings["train"] == CookConfig(heat=5e-7, minutes=40)
    assert read("", "--heat", written, "--minutes", "40").settings["train"] == CookConfig(heat=5e-7, minutes=40)


def test_an_unknown_section_is_refused_with_the_closest(read):
    with pytest.raises(SdpoError, match=r"run/config\.yaml: there is no section 'trian'\. Did you mean 'train'\?"):
        read("trian: {minutes: 2}\n")


def test_an_unknown_setting_is_refused_with_the_closest(read):
    with pytest.raises(
        SdpoError,
        match=r"run/config\.yaml: train has no setting 'minuts'\. Did you mean 'minutes'\? "
        r"It has: minutes, heat, salt, grams, from_seconds\.",
    ):
        read("train: {minuts: 2}\n")


def test_a_mistake_is_said_with_the_file_it_stands_in(read, tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text("train: {heat: 0.3}\n")
    with pytest.raises(SdpoError, match=r"run/config\.yaml: train\.minutes is 0"):
        read("train: {minutes: 0}\n", "--config", str(recipe))
    recipe.write_text("train: {minutes: -1}\n")
    with pytest.raises(SdpoError, match=r"my\.yaml: train\.minutes is -1"):
        read("train: {minutes: 2}\n", "--config", str(recipe))


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("train: {minutes: ten}", r"train\.minutes is 'ten': Input should be a valid integer\.$"),
        ("train: {minutes: '3'}", r"train\.minutes is '3': Input should be a valid integer\.$"),
        ("train: {minutes: 2.5}", r"train\.minutes is 2\.5: Input should be a valid integer\.$"),
        ("train: {minutes: true}", r"train\.minutes is True: Input should be a valid integer\.$"),
        ("train: {minutes: 0}", r"train\.minutes is 0: Input should be greater than or equal to 1\.$"),
        ("train: {heat: .nan}", r"train\.heat is nan: "),
        ("score: {rate: .inf}", r"score\.rate is inf: Input should be a finite number\.$"),
        ("train: {salt: sea}", r"train\.salt is 'sea': Input should be a valid list\.$"),
        ("train: {salt: [sea, 3]}", r"train\.salt\.1 is 3: Input should be a valid string\.$"),
        ("train: {heat: 0.05}", r"config\.yaml: train: heat 0\.05 needs 30 minutes, not 12\.$"),
        ("train: {3: 4}", r"train has no setting '3'\. It has: minutes"),
        ("train: 3", r"train is 3, but it is a section: put its settings below it\.$"),
        ("3: {}", r"there is no section 3\. It has: model, pairs"),
        ("model: 3", r"model is 3\. Write a folder, a hub id, or embedded:NAME\.$"),
        ("model:", r"model is None\. Write a folder"),
        ("- train", r"config\.yaml holds a list, expected sections: model, pairs, decontaminate"),
        ("train: [", r"config\.yaml is not YAML: .*line 2"),
        ("train: {minutes: 2, minutes: 3}", r'config\.yaml is not YAML: .*found duplicate key "minutes"'),
        ("a: 1\n---\nb: 2", r"config\.yaml is not YAML: expected a single document"),
    ],
)
def test_what_does_not_fit_in_a_file_is_one_sentence(read, yaml, message):
    with pytest.raises(SdpoError, match=message):
        read(yaml + "\n")


def test_a_file_that_is_not_utf8_is_refused(read, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes("train: {}  # café\n".encode("latin-1"))
    with pytest.raises(SdpoError, match=r"config\.yaml is not YAML: 'utf-8' codec can't decode byte 0xe9"):
        read()


def test_a_config_that_is_a_folder_is_refused(read, tmp_path):
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)
    with pytest.raises(SdpoError, match=r"config\.yaml cannot be read \(Is a directory\)"):
        read()


@pytest.mark.parametrize("place", ["train: ", "train:\n  minutes: ", "train:\n  salt: ", "model: "])
def test_a_python_object_in_yaml_is_refused_and_never_made(read, tmp_path, place):
    proof = tmp_path / "made"
    with pytest.raises(SdpoError, match=r"run/config\.yaml"):
        read(f"{place}!!python/object/apply:os.mkdir ['{proof}']\n")
    assert not proof.exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--minutes", "0"], r"^--minutes is 0: Input should be greater than or equal to 1\.$"),
        (
            ["--from-seconds", "x"],
            r"^Error parsing --from-seconds: invalid literal for int\(\) with base 10: 'x'\.",
        ),
        (["--score.plates", "0"], r"^--score\.plates is 0: Input should be greater than or equal to 1\.$"),
        (["--heat", "0.05"], r"^heat 0\.05 needs 30 minutes, not 12\.$"),
        (["--minuts", "3"], r"^Unrecognized options: --minuts, 3\. See python -m cook --help\.$"),
        (["--minutes"], r"--minutes"),
        (["second"], r"^Unrecognized options: second\. See python -m cook --help\.$"),
        (["--config", "nowhere"], r"--config nowhere is neither a file nor the name of a recipe\. There are: .*paper"),
    ],
)
def test_what_does_not_fit_in_a_flag_is_one_sentence(read, capsys, flags, message):
    with pytest.raises(SdpoError, match=message) as error:
        read(None, *flags)
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_a_call_without_run_is_refused():
    with pytest.raises(SdpoError, match=r"^Missing from python -m cook: PATH Run folder"):
        read_command("python -m cook", "Cook.", "train", {"train": CookConfig}, ["--minutes", "3"])


def test_help_teaches_every_setting_and_exits_with_0(read, capsys):
    with pytest.raises(SystemExit) as exit_:
        read(None, "--help")
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for expected in ("Cook.", "--minutes INT", "How long. (default: 12)", "--score.plates INT", "--config", "--force"):
        assert expected in shown


@pytest.mark.parametrize("name", ["run", "run/", "./run"])
def test_flags_may_stand_before_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").write_text("train: {heat: 0.25}\n")
    call = read_command("cook", "Cook.", "train", {"train": CookConfig}, ["--model", "run", "--minutes", "3", name])
    assert call.run.path == Path("run")
    assert call.model == "run"
    assert call.settings["train"] == CookConfig(minutes=3, heat=0.25)


def test_a_run_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(SdpoError, match=r"run is a file\. Name a folder; it is made if missing\."):
        read_command("cook", "Cook.", "train", {"train": CookConfig}, [str(tmp_path / "run")])


def test_a_recipe_is_found_by_its_path_and_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("train: {minutes: 3}\n")
    assert recipe_path(Path("mine.yaml")) == Path("mine.yaml")
    assert {"demo", "paper"} <= set(recipes())
    for name in ("paper", "paper.yaml", "configs/paper.yaml"):
        assert "reward_accuracy" in recipe_path(Path(name)).read_text()


def test_a_mistyped_path_is_never_taken_for_a_recipe_of_ours(tmp_path):
    with pytest.raises(SdpoError, match=r"--config .*/typo/paper\.yaml is neither a file nor the name of a recipe"):
        recipe_path(tmp_path / "typo" / "paper.yaml")


def test_saving_keeps_comments_and_other_sections(read, tmp_path):
    text = "# mine\nmodel: my/model  # the SFT\ntrain:\n  minutes: 2  # not 3\n  heat: 0.5\neval:\n  limit: 7  # few\n"
    read(text, "--minutes", "4", "--score.plates", "5").save()
    assert (tmp_path / "run" / "config.yaml").read_text() == (
        "# mine\nmodel: my/model  # the SFT\ntrain:\n  minutes: 4  # not 3\n  heat: 0.5\n"
        "eval:\n  limit: 7  # few\nscore:\n  plates: 5\n"
    )


def test_reading_alone_writes_nothing(read, tmp_path):
    read(None, "--minutes", "4")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_recipe_s_sections_for_later_commands_are_saved_too(read, tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text("train: {minutes: 3}\neval: {limit: 9}\n")
    read(None, "--config", str(recipe)).save()
    assert read().file == {"train": {"minutes": 3}, "eval": {"limit": 9}}


def test_what_was_saved_reads_back_the_same(read):
    flags = ["--heat", "5e-7", "--minutes", "40", "--grams", "5", "--salt", "a: b", "#c", "null", "3", "--model", "m"]
    call = read(None, *flags)
    call.save()
    again = read()
    assert again.settings == call.settings
    assert again.model == "m"


def test_merging_the_same_again_leaves_the_file_alone(read, tmp_path):
    read("train: {minutes: 4, heat: 1, salt: [sea, rock]}  # mine\n")
    before = (tmp_path / "run" / "config.yaml").stat()
    merge_config(Run(tmp_path / "run"), {"train": {"minutes": 4, "heat": 1.0, "salt": ["sea", "rock"]}})
    after = (tmp_path / "run" / "config.yaml").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_settings_are_frozen_and_know_their_keys():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        CookConfig().minutes = 3
    with pytest.raises(pydantic.ValidationError, match="Extra inputs are not permitted"):
        CookConfig(minuts=3)


def test_a_config_with_umlauts_is_read_in_any_locale(tmp_path):
    (tmp_path / "config.yaml").write_text("model: möwe\n", encoding="utf-8")
    code = (
        "from sdpo_data.config import *; "
        f"call = read_command('c', '', 'train', {{'train': Settings}}, [{str(tmp_path)!r}]); "
        "call.save(); print(ascii(call.model))"
    )
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == r"'m\xf6we'"
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "model: möwe\n"
