"""Settings: a command's pydantic model = one section of config.yaml = its flags.

The model stands beside the command that reads it; this file only reads and merges. Later
wins: defaults, RUN/config.yaml, `--config FILE`, flags.
"""

import atexit
import contextlib
import difflib
import io
import itertools
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import ruamel.yaml

from sdpo_data.run import Run, write_atomically
from sdpo_data.tables import SdpoError

DEFAULT_MODEL = "embedded:smollm2-135m"
SECTIONS = ("model", "pairs", "decontaminate", "score", "partition", "export", "train", "eval", "compare")


KINDS = ("float", "int", "str", "list[float]", "list[int]")  # pydantic's names for the members of a union


class Settings(pydantic.BaseModel):
    """Base of every settings model: frozen; an unknown key or another type (a quoted number, yes for 1) is an error."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


SettingsModel = TypeVar("SettingsModel", bound=Settings)


@dataclass(frozen=True)
class Command:
    """One call of a command: the run folder, its settings, and whether to remake what is finished."""

    run: Run
    force: bool
    model: str
    settings: dict[str, Settings]
    file: dict[str, Any]
    """What config.yaml is to hold: the old file, the recipe and the flags, merged."""
    asked: frozenset[str]
    """The switches that were given: what to do this once, which is no setting and not remembered."""
    named: dict[str, tuple[str, ...]]
    """The values of the options that were given: on what to do it this once."""
    kept: bool
    """RUN was named; if not, `run` is a folder that is gone when the process ends."""

    def save(self) -> None:
        """Merge the settings into RUN/config.yaml. Call it once the work they ask for is done."""
        merge_config(self.run, self.file)


def read_section(run: Run, name: str, model: type[SettingsModel]) -> SettingsModel:
    """Read one section of RUN/config.yaml; the defaults where there is none.

    Raises:
        SdpoError: the file is not what a config is, or the section holds what the model does not know.
    """
    return _section(model, name, _read_files(run.path, None))


def merge_config(run: Run, sections: dict[str, Any]) -> None:
    """Write `sections` over those in RUN/config.yaml, keeping the rest and its comments."""
    with run.lock():
        _merge_config(run.path / "config.yaml", sections)


def _merge_config(path: Path, sections: dict[str, Any]) -> None:
    old = _read_yaml(path, comments=True) if path.exists() else ruamel.yaml.CommentedMap()
    new = ruamel.yaml.CommentedMap(old)
    old.copy_attributes(new)
    for name, value in sections.items():
        if isinstance(value, dict) and isinstance(new.get(name), dict):
            section = new[name]  # what is equal stays as it is written: 0 for 0.0, a list in one line
            section.update({key: one for key, one in value.items() if key not in section or section[key] != one})
        else:
            new[name] = value
    text = io.StringIO()
    ruamel.yaml.YAML(typ="rt").dump(new, text)
    if not path.exists() or path.read_text(encoding="utf-8") != text.getvalue():
        write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


def read_command(
    prog: str,
    description: str | None,
    own: str,
    models: dict[str, type[Settings]],
    argv: list[str] | None = None,
    *,
    switches: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
    needs_run: bool = True,
    model_help: str = "Reference model S: a folder, a hub id, or embedded:NAME.",
    unread: Collection[str] = (),
) -> Command:
    """Read `RUN [--config FILE] [--force] [--setting value ...]` against the run's config.yaml.

    Args:
        prog: how the command is called, for its help.
        description: shown by --help; the command's module docstring.
        own: the section whose settings are flags without a prefix (`--parts 2`); the settings
            of the other sections carry theirs (`--score.max-length 512`).
        models: section name -> its settings model.
        switches: flags for this call alone, such as check for --check, with their help.
        options: flags for this call alone that take values, such as unit for --unit A B.
        needs_run: RUN must be named; if not, a folder for this process stands in for it.
        model_help: what --model is to this command.
        unread: settings that this command does not read: they may stand in the file, but are no flags.

    Raises:
        SdpoError: an unknown section or setting, or a value of the wrong type or range.
    """
    argv = sys.argv[1:] if argv is None else argv
    run, recipe = _peek(argv)
    fields = _command_fields(switches or {}, options or {}, model_help, needs_run=needs_run)
    call = _parse(prog, description, own, models, argv, [run, recipe], fields, unread)
    if run is None and call.kept:  # flags stood before RUN: read again, now knowing whose config.yaml has the defaults
        call = _parse(prog, description, own, models, argv, [call.run.path, recipe], fields, unread)
    return call


def _command_fields(
    switches: Mapping[str, str], options: Mapping[str, str], model_help: str, *, needs_run: bool
) -> dict[str, Any]:
    import tyro  # only here: importing a package of ours stays fast

    run, folder = tyro.conf.arg(help="Run folder; made if missing."), Path if needs_run else Path | None
    fields: dict[str, Any] = {
        "run": (Annotated[tyro.conf.Positional[folder], run], ... if needs_run else None),
        "config": (
            Annotated[Path | None, tyro.conf.arg(help="Recipe to start from: a file, or a name in configs/.")],
            None,
        ),
    }
    for name, text in {"force": "Remake what is finished.", **switches}.items():
        flag = tyro.conf.arg(name=name, help=text)  # by another name here: a pydantic model has a `json` of its own
        fields[f"asked_{name}"] = (Annotated[bool, tyro.conf.FlagCreatePairsOff, flag], False)
    for name, text in options.items():
        fields[f"asked_{name}"] = (Annotated[tuple[str, ...], tyro.conf.arg(name=name, help=text)], ())
    fields["model"] = (Annotated[str, tyro.conf.arg(help=model_help)], DEFAULT_MODEL)
    return fields


def _parse(
    prog: str,
    description: str | None,
    own: str,
    models: dict[str, type[Settings]],
    argv: list[str],
    places: list[Path | None],
    own_fields: dict[str, Any],
    unread: Collection[str],
) -> Command:
    import tyro

    files = _read_files(*places)
    file = _merged(files)
    loaded = {name: _section(model, name, files) for name, model in models.items()}
    fields: dict[str, Any] = {**own_fields, "model": (own_fields["model"][0], file.get("model", DEFAULT_MODEL))}
    for name, model in models.items():
        prefix, unchecked = tyro.conf.arg(name="" if name == own else name), _without_limits(model, unread)
        fields[f"{name}_settings"] = (Annotated[unchecked, prefix], unchecked(**dict(loaded[name])))
    with _box_as_sentence(prog):
        given = tyro.cli(pydantic.create_model("Arguments", **fields), args=argv, prog=prog, description=description)
    settings: dict[str, Settings] = {}
    for name, model in models.items():
        try:
            settings[name] = model.model_validate(getattr(given, f"{name}_settings").model_dump())
        except pydantic.ValidationError as error:
            raise SdpoError(_sentence(error, "--" if name == own else f"--{name}.")) from None
        default, wanted = loaded[name].model_dump(mode="json"), settings[name].model_dump(mode="json")
        changed = {setting: value for setting, value in wanted.items() if value != default[setting]}
        if changed:
            file[name] = {**(file.get(name) or {}), **changed}
    if given.model != DEFAULT_MODEL or "model" in file:
        file["model"] = given.model
    said = {name.removeprefix("asked_"): getattr(given, name) for name in own_fields if name.startswith("asked_")}
    asked = frozenset(name for name, value in said.items() if value is True)
    named = {name: value for name, value in said.items() if isinstance(value, tuple)}
    run = Run(given.run if (kept := given.run is not None) else _passing_folder())
    return Command(run, "force" in asked, given.model, settings, file, asked, named, kept)


def _passing_folder() -> str:
    folder = tempfile.mkdtemp(prefix="sdpo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _without_limits(model: type[Settings], unread: Collection[str]) -> type[pydantic.BaseModel]:
    """Keep the fields with their types alone: what is out of range is then said in our words, not in tyro's."""
    import tyro

    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        kind = tyro.conf.Fixed[tyro.conf.Suppress[kind]] if name in unread else kind
        fields[name] = (kind, pydantic.Field(description=field.description))
    return pydantic.create_model(model.__name__, **fields)


@contextlib.contextmanager
def _box_as_sentence(prog: str) -> Iterator[None]:
    """Say what tyro draws as a box, with hints below a rule, in one line."""
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            yield
    except SystemExit as exit_:
        if not exit_.code:  # --help
            raise
        rows = [row.strip(" │") for row in drawn.getvalue().splitlines()[1:]]  # the first is a title
        parts = itertools.groupby(rows, lambda row: bool(row.strip("─-╰╯")))  # cut at the rules
        said = next(" ".join(part) for is_text, part in parts if is_text)
        raise SdpoError(f"{said.rstrip(' .')}. See {prog} --help.") from None
    sys.stderr.write(drawn.getvalue())


def recipe_path(name: Path) -> Path:
    """Find a recipe: a file as given, or by its name among the ones that come with the package.

    Raises:
        SdpoError: neither is there.
    """
    if name.is_file():
        return name
    if name.parent in (Path(), Path("configs")):  # a mistyped path of one's own is never taken for one of ours
        for folder in _recipe_folders():
            if (found := folder / f"{name.name.removesuffix('.yaml')}.yaml").is_file():
                return found
    raise SdpoError(f"--config {name} is neither a file nor the name of a recipe. There are: {', '.join(recipes())}.")


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted({file.stem for folder in _recipe_folders() for file in folder.glob("*.yaml")})


def _recipe_folders() -> tuple[Path, Path]:
    here = Path(__file__).parent
    return here / "configs", here.parent / "configs"  # installed wheel, checkout


def _peek(argv: list[str]) -> tuple[Path | None, Path | None]:
    """Find RUN and --config before the flags can be declared, whose defaults come from them."""
    recipe = None
    for here, word in enumerate(argv):
        if word == "--config" and here + 1 < len(argv):
            recipe = recipe_path(Path(argv[here + 1]))
        elif word.startswith("--config="):
            recipe = recipe_path(Path(word.removeprefix("--config=")))
    run = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    return run, recipe


def _read_files(run: Path | None, recipe: Path | None) -> dict[Path, dict[str, Any]]:
    """Read RUN/config.yaml and the recipe, where there are any, and refuse what is no section."""
    if run is not None and run.exists() and not run.is_dir():
        raise SdpoError(f"RUN {run} is a file. Name a folder; it is made if missing.")
    files: dict[Path, dict[str, Any]] = {}
    for path in (run / "config.yaml" if run else None, recipe):
        if path is None or not path.exists():
            continue
        files[path] = _read_yaml(path)
        for name, value in files[path].items():
            if name not in SECTIONS:
                raise SdpoError(f"{path}: there is no section {name!r}. {_closest(str(name), SECTIONS)}")
            if name == "model" and not isinstance(value, str):
                raise SdpoError(f"{path}: model is {value!r}. Write a folder, a hub id, or embedded:NAME.")
            if name != "model" and value is not None and not isinstance(value, dict):
                raise SdpoError(f"{path}: {name} is {value!r}, but it is a section: put its settings below it.")
    return files


def _merged(files: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for file in files.values():
        for name, value in file.items():
            merged[name] = {**(merged.get(name) or {}), **value} if isinstance(value, dict) else value
    return merged


def _section(model: type[SettingsModel], name: str, files: dict[Path, dict[str, Any]]) -> SettingsModel:
    """Validate one section of the merged files; a mistake is said with the file it stands in."""
    try:
        return model.model_validate(_merged(files).get(name) or {})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        setting = str(first["loc"][0]) if first["loc"] else None
        path = [path for path, file in files.items() if _says(file.get(name), setting)][-1]
        if first["type"] in ("extra_forbidden", "invalid_key"):
            close = _closest(str(setting), list(model.model_fields))
            raise SdpoError(f"{path}: {name} has no setting {setting!r}. {close}") from None
        raise SdpoError(_sentence(error, f"{path}: {name}.")) from None


def _says(section: dict[Any, Any] | None, setting: str | None) -> bool:
    return bool(section) and (setting is None or setting in map(str, section))


def _sentence(error: pydantic.ValidationError, place: str) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # two settings that do not go together
        return f"{place.rstrip('.-')}: {message}.".removeprefix(": ")
    name = ".".join(str(part) for part in first["loc"] if part not in KINDS)
    return f"{place}{name.replace('_', '-') if place.startswith('--') else name} is {first['input']!r}: {message}."


def _closest(name: str, names: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return (f"Did you mean {close[0]!r}? " if close else "") + f"It has: {', '.join(names)}."


def _read_yaml(path: Path, *, comments: bool = False) -> Any:
    """Read a YAML file as plain values, where a tag asking for an object is an error; or with comments, to write it."""
    yaml = ruamel.yaml.YAML(typ="rt" if comments else "safe", pure=True)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SdpoError(f"{path} cannot be read ({error.strerror}).") from None
    except (ruamel.yaml.error.YAMLError, UnicodeDecodeError) as error:
        raise SdpoError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return ruamel.yaml.CommentedMap()
    if not isinstance(content, dict):
        raise SdpoError(f"{path} holds a {type(content).__name__}, expected sections: {', '.join(SECTIONS)}.")
    return content
