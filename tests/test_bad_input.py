"""What a user can get wrong: one sentence with the value, the place and the remedy; exit code 2; files untouched."""

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from sdpo_data.console import command
from sdpo_data.tables import SdpoError

PAIRS, SCORE, PARTITION = "sdpo_data.pairs", "sdpo_data.score", "sdpo_data.partition"
DECONTAMINATE, EXPORT = "sdpo_data.decontaminate", "sdpo_data.export"
TRAIN, EVAL, REPORT = "sdpo_train", "sdpo_eval", "sdpo_eval.report"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model) -> Path:
    """Make a run with pairs, scores and a partition of the tiny model."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"prompt": f"p{i}", "chosen": f"c{i % 3}", "rejected": "r" * i, "source": "ab"[i % 2]} for i in range(1, 9)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = folder / "run"
    flags = ["--model", str(tiny_model), "--pairs.source", str(folder / "rows.jsonl"), "--pairs.hold-out", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["partition", str(run), *flags])
        importlib.import_module(PARTITION).main()
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run, beside the file its pairs came from."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def refused(run_command):
    """Run a command that must fail: its one sentence. Nothing in the folder of RUN may change."""

    def refused(module: str, run: Path, *flags: object) -> str:
        before = checksums(run.parent)
        code, out, err = run_command(module, run, *flags)
        assert (code, out) == (2, ""), err
        assert_one_sentence(err)
        assert checksums(run.parent) == before
        return err

    return refused


def checksums(folder: Path) -> dict[str, str]:
    """Of all files but the locks: names beginning with a dot say nothing of results."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in found}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def assert_one_sentence(err: str) -> None:
    assert err.rstrip("\n").split("\n")[-1].startswith("error: ")
    assert err.count("error: ") == 1  # what came before are log lines
    assert "Traceback" not in err


# --- settings


@pytest.mark.parametrize("module", [PAIRS, DECONTAMINATE, SCORE, PARTITION, EXPORT, TRAIN, EVAL])
def test_an_unknown_section(refused, run, module):
    (run / "config.yaml").write_text("partitoin: {parts: 2}\n")
    err = refused(module, run)
    assert f"{run / 'config.yaml'}: there is no section 'partitoin'. Did you mean 'partition'?" in err


@pytest.mark.parametrize(
    "module, section, setting, close",
    [
        (PAIRS, "pairs", "limt", "limit"),
        (DECONTAMINATE, "decontaminate", "rule", "rules"),
        (SCORE, "score", "max_lenght", "max_length"),
        (PARTITION, "partition", "part", "parts"),
        (EXPORT, "export", "too", "to"),
        (TRAIN, "train", "learning_rat", "learning_rate"),
        (EVAL, "eval", "limits", "limit"),
    ],
)
def test_an_unknown_setting(refused, run, module, section, setting, close):
    (run / "config.yaml").write_text(f"{section}: {{{setting}: 3}}\n")
    err = refused(module, run)
    assert f"config.yaml: {section} has no setting '{setting}'. Did you mean '{close}'?" in err


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (PARTITION, ["--stesp", "3"], "Unrecognized options: --stesp, 3. See python -m sdpo_data.partition --help."),
        (PARTITION, ["--parts", "two"], "--parts: invalid literal for int() with base 10: 'two'"),
        (PARTITION, ["--parts", "0"], "--parts is 0: Input should be greater than or equal to 1."),
        (PARTITION, ["--order", "up"], "invalid choice 'up' for argument '--order'"),
        (PARTITION, ["--cut", "shares"], "cut shares in 2 parts takes 2 number(s) in at, not []"),
        (PARTITION, ["--pairs.hold-out", "1"], "--pairs.hold-out is 1.0: Input should be less than 1."),
        (PARTITION, ["--config", "nope"], "--config nope is neither a file nor the name of a recipe. There are:"),
        (PAIRS, ["--limit", "-1"], "--limit is -1: Input should be greater than or equal to 1."),
        (PAIRS, ["--choose", "worst"], "invalid choice 'worst' for argument '--choose'"),
        (EXPORT, ["--to", "verl"], "invalid choice 'verl' for argument '--to'"),
        (PAIRS, ["--weights", "a", "0"], "--weights is {'a': 0.0}: 'a' must have a number above 0."),
        (PAIRS, ["--weights", "a", "much"], "--weights"),
        (PAIRS, ["--weights", "a", "inf"], "--weights.a is inf: Input should be a finite number."),
        (PAIRS, ["--caps", "a", "-1"], "--caps is {'a': -1}: 'a' must have a number above 0."),
        (PAIRS, ["--caps", "a"], "--caps"),
        (DECONTAMINATE, ["--action", "burn"], "invalid choice 'burn' for argument '--action'"),
        (DECONTAMINATE, ["--coverage", "0"], "--coverage is 0.0: Input should be greater than 0."),
        (DECONTAMINATE, ["--coverage", "nan"], "--coverage is nan: Input should be a finite number."),
        (DECONTAMINATE, ["--rules", "9-gram"], "invalid choice '9-gram' for argument '--rules'"),
        (SCORE, ["--dtype", "int8"], "invalid choice 'int8' for argument '--dtype'"),
        (TRAIN, ["--beta", "0.1", "-1"], "--beta is [0.1, -1.0]: -1.0 is not above 0."),
        (TRAIN, ["--learning-rate", "0"], "--learning-rate is 0.0: 0.0 is not above 0."),
        (TRAIN, ["--token-budget", "0"], "--token-budget is 0: Input should be greater than or equal to 1."),
        (EVAL, ["--limit", "0"], "--limit is 0: Input should be greater than or equal to 1."),
    ],
)
def test_a_flag_that_does_not_fit(refused, run, module, flags, message):
    assert message in refused(module, run, *flags)


def test_a_setting_of_another_type(refused, run):
    (run / "config.yaml").write_text("partition: {parts: two}\n")
    assert "config.yaml: partition.parts is 'two': Input should be a valid integer." in refused(PARTITION, run)


def test_settings_that_do_not_go_together(refused, run):
    err = refused(PARTITION, run, "--difficulty", "reward_accuracy", "--force")
    assert "cannot rank single ones. Set partition.by to 'source'" in err


def test_an_unknown_difficulty(refused, run):
    err = refused(PARTITION, run, "--difficulty", "lenght", "--force")
    assert "partition.difficulty 'lenght' is not defined. There are: margin_per_token" in err


def test_an_unknown_arm(refused, run):
    assert "train.arms has 'spdo', which is not an arm. There are: sdpo, sdpo_fixed" in refused(
        TRAIN, run, "--arms", "spdo"
    )


# --- data


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.jsonl", None, "none.jsonl' is neither a file nor a hub dataset. Give a path ending in one of .jsonl"),
        ("empty.jsonl", "", "empty.jsonl gave no usable pair (it is empty)."),
        ("column.jsonl", '{"prompt": "p", "chosen": "c"}\n' * 3, "column.jsonl gave no usable pair (3 no rejected)."),
        ("other.csv", "a,b\n1,2\n", "other.csv gave no usable pair (1 no columns of a known form (prompt, chosen, rej"),
        ("broken.parquet", "PAR1", "broken.parquet cannot be read ("),
        ("broken.json", "{", "broken.json cannot be read ("),
        (
            "rows.xlsx",
            "",
            "rows.xlsx has an unknown suffix. It must be one of .jsonl, .jsonl.gz, .json, .parquet, .csv.",
        ),
    ],
)
@pytest.mark.parametrize("made", [False, True], ids=["in a new run", "in a finished run, by force"])
def test_pairs_that_cannot_be_read(refused, run, made, name, content, message):
    source = run.parent / name
    if content is not None:
        source.write_text(content)
    if not made:
        shutil.rmtree(run)
    assert message in refused(PARTITION, run, "--pairs.source", source, "--force")


def test_more_parts_than_pairs_or_sources(refused, run):
    (run / "partition.parquet").unlink()
    assert "Cannot cut 8 pair(s) into 9 steps. Lower partition.parts to 8." in refused(PARTITION, run, "--parts", 9)
    err = refused(PARTITION, run, "--parts", 3, "--by", "source")
    assert "Cannot cut 2 source(s) into 3 steps. Lower partition.parts to 2, or set partition.by to 'pair'." in err


def test_pairs_that_are_all_too_long(refused, run):
    for made in ("scores", "partition"):
        (run / f"{made}.parquet").unlink()
    err = refused(SCORE, run, "--max-length", 2)
    assert "None of 8 pairs can be scored: over 2 tokens (chosen and rejected). Raise score.max_length?" in err


def test_a_table_with_a_column_missing(refused, run):
    (run / "partition.parquet").unlink()
    scores = pl.read_parquet(run / "scores.parquet")
    scores.drop("chosen_tokens").write_parquet(run / "scores.parquet")
    err = refused(PARTITION, run)
    assert "scores is missing column 'chosen_tokens'. It has ['pair_id', 'prompt_id', 'source', 'model_key'" in err


@pytest.mark.parametrize("table", ["pairs", "scores", "partition"])
def test_a_table_that_is_damaged(refused, run, table):
    (run / f"{table}.parquet").write_bytes(b"PAR1 half a table")
    err = refused(PARTITION, run)
    assert f"{table}.parquet cannot be read as Parquet" in err
    assert "Delete it; its command makes it anew." in err


@pytest.mark.parametrize("module", [PARTITION, TRAIN])
def test_a_lineage_that_is_damaged(refused, run, module):
    (run / "lineage.json").write_text('{"pairs"')
    assert f"{run / 'lineage.json'} cannot be read" in refused(module, run)


@pytest.mark.parametrize(
    "content", [b"partition: [", b"partition: \xe9", b"- 1", b"partition: 2", b"partition: !!python/none x"]
)
def test_a_config_that_is_damaged(refused, run, content):
    (run / "config.yaml").write_bytes(content)
    assert f"{run / 'config.yaml'}" in refused(PARTITION, run)


# --- run folders


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (
            PARTITION,
            ["--parts", 3],
            "run/partition was made with parts = 2, now it is 3. Choose another run folder, or --fo",
        ),
        (PARTITION, ["--by", "source"], "run/partition was made with by = 'pair', now it is 'source'."),
        (PARTITION, ["--pairs.limit", 3], "run/pairs was made with limit = None, now it is 3."),
        (PAIRS, ["--seed", 1], "run/pairs was made with seed = 0, now it is 1."),
        (SCORE, ["--max-length", 99], "run/scores was made with max_length = 1024, now it is 99."),
    ],
)
def test_a_run_made_with_another_recipe(refused, run, module, flags, message):
    assert message in refused(module, run, *flags)


def test_a_run_whose_source_file_has_changed(refused, finished, run):
    config = (run / "config.yaml").read_text()
    source = Path(shutil.copy(finished.parent / "rows.jsonl", run.parent / "rows.jsonl"))
    source.write_text(source.read_text().splitlines()[0])
    (run / "config.yaml").write_text(config.replace(str(finished.parent), str(run.parent)))
    assert "run/pairs was made with files = " in refused(PARTITION, run)


def test_a_run_scored_with_another_model(refused, run, tiny_model):
    other = Path(shutil.copytree(tiny_model, run.parent / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert "run/scores was made with model = " in refused(PARTITION, run, "--model", other)
    assert "The reference model that cuts the data is the one training starts from" in refused(
        TRAIN, run, "--model", other
    )


def test_a_table_whose_input_has_changed(refused, run):
    pairs = pl.read_parquet(run / "pairs.parquet")
    pairs.reverse().write_parquet(run / "pairs.parquet")
    assert "run/scores is stale: pairs.parquet has changed since it was made. --force remakes it." in refused(
        SCORE, run
    )


@pytest.mark.parametrize("module", [PAIRS, DECONTAMINATE, SCORE, PARTITION, EXPORT, TRAIN, EVAL])
def test_a_run_that_is_a_file(refused, tmp_path, module):
    (tmp_path / "run").write_text("precious")
    assert "run is a file. Name a folder; it is made if missing." in refused(module, tmp_path / "run")


def test_a_run_below_a_file(refused, tmp_path, pair_file):
    err = refused(PARTITION, pair_file / "run", "--pairs.source", pair_file)
    assert "Not a directory" in err


@pytest.mark.parametrize("module", [TRAIN, REPORT])
def test_a_run_that_is_not_there(refused, tmp_path, tiny_model, module):
    flags = [] if module == REPORT else ["--model", tiny_model]
    err = refused(module, tmp_path / "nope", *flags)
    assert "Make it with: python -m sdpo_data.partition" in err or "Make one with: python -m sdpo_data.partition" in err
    assert not (tmp_path / "nope").exists()


# --- models


@pytest.mark.parametrize("module", [SCORE, PARTITION, TRAIN])
def test_a_model_folder_without_weights(refused, run, tiny_model, module):
    model = run.parent / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").unlink()
    assert f"{model} is a model folder without weights" in refused(module, run, "--model", model)


def test_a_model_that_is_nowhere(refused, run):
    err = refused(PARTITION, run, "--model", "not/a/model")
    assert "'not/a/model' is not a folder that exists, not a hub id (owner/name), and not an embedded name" in err


def test_a_model_that_lacks_weights(refused, run, tiny_model):
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_model, run.parent / "model"))
    weights = load_file(model / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for made in ("scores", "partition"):
        (run / f"{made}.parquet").unlink()
    assert "lacks 1 of the weights of a LlamaForCausalLM, e.g. model.norm.weight." in refused(
        SCORE, run, "--model", model
    )


# --- two at once


def test_a_second_process_on_the_same_unit(refused, run):
    (run / "partition.parquet").unlink()
    work = f"from sdpo_data.run import *\nwith Run({str(run)!r}).lease('partition'): print(1, flush=True); input()"
    first = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "1\n"
    err = refused(PARTITION, run)
    first.communicate("\n")
    assert f"run: partition is being worked on by process {first.pid} on " in err
    assert "Wait for it, or end it; then start again." in err


# --- as a user types it, and what command() makes of it


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["run", "--stesp", "3"],
            "error: Unrecognized options: --stesp, 3. See python -m sdpo_data.partition --help.\n",
        ),
        (
            ["run", "--pairs.source", "empty.jsonl"],
            "error: pairs.source empty.jsonl gave no usable pair (it is empty).\n",
        ),
    ],
)
def test_a_real_process_exits_with_2_and_one_line(tmp_path, flags, message):
    (tmp_path / "empty.jsonl").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", PARTITION, *flags], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert set(checksums(tmp_path)) == {"empty.jsonl"}


@pytest.mark.parametrize(
    "error, code, message",
    [
        (SdpoError("Do this."), 2, "error: Do this.\n"),
        (KeyboardInterrupt(), 130, "interrupted: what is finished is kept; the same command goes on from there.\n"),
        (OSError(28, "No space left on device", "x/y"), 2, "error: No space left on device at x/y. Free some room or"),
        (PermissionError(13, "Permission denied", "x/y"), 2, "error: Permission denied at x/y. Free some room or"),
    ],
)
def test_the_exit_code_says_whose_turn_it_is(capsys, error, code, message):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        command(main)
    assert exit_.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(5, "Input/output error")])
def test_a_bug_keeps_its_traceback(error):
    def main() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        command(main)
    assert raised.value is error
