import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from sdpo_data import run as run_module
from sdpo_data.run import Run, open_run, sha256, write_atomically
from sdpo_data.tables import DROPPED, METRICS, STEPS, SdpoError

ONE = pl.DataFrame({"a": [1]})
TWO = pl.DataFrame({"a": [2, 2]})


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run")


def make(run: Run, frame: pl.DataFrame = ONE, name: str = "pairs", recipe: dict | None = None, **given) -> bool:
    """Make one table as a command does; whether there was anything to do."""
    with run.stage(name, recipe or {"seed": 0}, **given) as stage:
        if not stage.current:
            stage.write(name, frame)
        return not stage.current


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# --- atomic writes


def test_a_written_table_reads_back_and_leaves_nothing_else(run):
    make(run)
    assert_frame_equal(run.pairs, ONE)
    assert sorted(files(run.path)) == ["lineage.json", "pairs.parquet"]


def test_a_crash_while_writing_a_file_keeps_the_old_one(tmp_path):
    path = tmp_path / "table.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def crash(temporary: Path) -> None:
        temporary.write_text("half")
        assert path.read_text() == "old"  # what a reader sees meanwhile
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, crash)
    assert files(tmp_path) == {"table.txt": b"old"}


def test_a_crash_while_writing_a_folder_keeps_the_old_one(tmp_path):
    def write(*names: str):
        def write_folder(temporary: Path) -> None:
            temporary.mkdir()
            for name in names:
                (temporary / name).write_text(name)
            if "crash" in names:
                raise KeyboardInterrupt

        return write_folder

    path = tmp_path / "step_1"
    write_atomically(path, write("weights", "config"))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write("weights", "crash"))
    assert files(tmp_path) == {"step_1/weights": b"weights", "step_1/config": b"config"}
    write_atomically(path, write("other"))
    assert files(tmp_path) == {"step_1/other": b"other"}


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")
    code = (
        "import os, pathlib, sys; from sdpo_data.run import write_atomically\n"
        "def die(temporary): temporary.write_text('half'); os.kill(os.getpid(), 9)\n"
        "write_atomically(pathlib.Path(sys.argv[1]), die)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


# --- stages


def test_the_same_recipe_again_is_up_to_date(run):
    assert make(run, recipe={"seed": 0, "files": {"a": "sum"}})
    before = files(run.path)
    assert not make(run, TWO, recipe={"files": {"a": "sum"}, "seed": 0})
    assert files(run.path) == before


def test_another_recipe_is_refused_with_the_setting_both_values_and_the_remedy(run):
    make(run, recipe={"limit": 8, "seed": 0})
    before = files(run.path)
    with pytest.raises(
        SdpoError,
        match=r"run/pairs was made with limit = 8, now it is 9\. Choose another run folder, or --force to remake it; "
        r"what depends on it is then stale\.",
    ):
        make(run, recipe={"limit": 9, "seed": 0})
    with pytest.raises(SdpoError, match=r"limit = 8, now it is None \(and 1 more differ\)\."):
        make(run, recipe={"seed": 1})
    assert files(run.path) == before


def test_a_changed_input_makes_a_table_stale(run):
    make(run)
    make(run, name="scores", inputs=["pairs"])
    make(run, TWO, force=True)
    with pytest.raises(
        SdpoError, match=r"run/scores is stale: pairs\.parquet has changed since it was made\. --force remakes it\."
    ):
        make(run, name="scores", inputs=["pairs"])
    assert make(run, name="scores", inputs=["pairs"], force=True)
    assert not make(run, name="scores", inputs=["pairs"])


def test_force_remakes_by_another_recipe(run):
    make(run)
    assert make(run, TWO, recipe={"seed": 1}, force=True)
    assert_frame_equal(run.pairs, TWO)
    assert run.lineage["pairs"]["recipe"] == {"seed": 1}


def test_a_deleted_output_is_made_again(run):
    make(run)
    (run.path / "pairs.parquet").unlink()
    assert make(run, TWO, recipe={"seed": 1})
    assert_frame_equal(run.pairs, TWO)


def test_a_stage_that_fails_is_not_finished_and_frees_its_lease(run):
    def fail(stage) -> None:
        stage.write("pairs", ONE)
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"), run.stage("pairs", {"seed": 0}) as stage:
        fail(stage)
    assert run.lineage == {}
    assert make(run, TWO, recipe={"seed": 1})


def test_lineage_holds_what_made_a_table(run):
    make(run)
    make(run, TWO, "scores", {"dtype": "float32", "path": Path("a/b")}, inputs=["pairs"])
    made = run.lineage["scores"]
    assert made["recipe"] == {"dtype": "float32", "path": "a/b"}
    assert made["inputs"] == {"pairs": sha256(run.path / "pairs.parquet")}
    assert made["outputs"] == ["scores.parquet"]
    assert made["sha256"] == {"scores.parquet": sha256(run.path / "scores.parquet")}
    assert made["seconds"] >= 0
    assert made["versions"]["polars"] == pl.__version__
    assert made["versions"]["python"] == sys.version.split()[0]
    assert made["finished"].endswith("Z")
    assert "cores" in made["host"]
    assert made["commit"] is None or len(made["commit"]) == 40
    assert set(run.lineage) == {"pairs", "scores"}


def test_a_missing_input_names_the_command_that_makes_it(run):
    with pytest.raises(SdpoError, match=r"pairs\.parquet does not exist yet\. Make it with: python -m sdpo_data\.part"):
        make(run, name="scores", inputs=["pairs"])


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- reading


def test_a_table_that_is_not_there_names_its_command(run):
    with pytest.raises(
        SdpoError, match=r"scores\.parquet does not exist yet\. Make it with: python -m sdpo_data\.part"
    ):
        _ = run.scores
    with pytest.raises(SdpoError, match=r"results\.parquet does not exist yet\. Make it with: python -m sdpo_eval "):
        _ = run.results


def test_damaged_files_are_named(run):
    make(run)
    (run.path / "pairs.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(SdpoError, match=r"pairs\.parquet cannot be read as Parquet .* Delete it"):
        _ = run.pairs
    (run.path / "dropped.parquet").write_bytes(b"")
    with pytest.raises(SdpoError, match=r"dropped\.parquet cannot be read as Parquet"):
        run.replace_dropped("pairs", DROPPED.to_frame())
    (run.path / "arms/sdpo/seed_0").mkdir(parents=True)
    (run.path / "arms/sdpo/seed_0/steps.parquet").write_bytes(b"x")
    with pytest.raises(SdpoError, match=r"steps\.parquet cannot be read as Parquet"):
        _ = run.steps
    (run.path / "lineage.json").write_text('{"pairs": ')
    with pytest.raises(SdpoError, match=r"lineage\.json cannot be read .* Delete it; the tables are then made anew"):
        make(run)


def test_open_run_refuses_what_is_no_folder(tmp_path):
    with pytest.raises(SdpoError, match=r"There is no run folder .*/nope\. Make one with: python -m sdpo_data\.part"):
        open_run(tmp_path / "nope")


def test_steps_and_metrics_are_collected_from_all_arms_in_order(run):
    def step(arm: str, seed: int, number: int) -> pl.DataFrame:
        values = {"arm": arm, "seed": seed, "step": number, "start_key": "k", "reference_key": "k", "model_key": "k"}
        numbers = dict.fromkeys(set(STEPS) - set(values) - {"model"}, 1)
        return pl.DataFrame([values | numbers | {"model": "m"}], STEPS)

    assert run.steps.is_empty()
    assert run.metrics.schema == METRICS
    for arm, seed, number in [("sdpo", 1, 1), ("sdpo", 0, 2), ("dpo", 10, 1)]:
        path = run.path / "arms" / arm / f"seed_{seed}" / "steps.parquet"
        write_atomically(path, step(arm, seed, number).write_parquet)
    assert run.steps.select("arm", "seed", "step").rows() == [("dpo", 10, 1), ("sdpo", 0, 2), ("sdpo", 1, 1)]


def test_dropped_rows_of_one_stage_replace_only_its_own(run):
    def dropped(stage: str, *reasons: str) -> pl.DataFrame:
        return pl.DataFrame([(stage, "s", 1, None, reason, "{}") for reason in reasons], DROPPED, orient="row")

    run.replace_dropped("pairs", dropped("pairs", "tie", "tie", "no prompt"))
    run.replace_dropped("score", dropped("score", "too long"))
    run.replace_dropped("pairs", dropped("pairs", "duplicate"))
    assert sorted(run.dropped.select("stage", "reason").rows()) == [("pairs", "duplicate"), ("score", "too long")]


def test_dropped_rows_are_logged_with_a_count_per_reason(run, caplog):
    caplog.set_level("INFO")
    reasons = ["tie"] * 3 + ["no prompt"]
    rows = [("pairs", "s", 1, None, reason, "{}") for reason in reasons]
    run.replace_dropped("pairs", pl.DataFrame(rows, DROPPED, orient="row"))
    assert caplog.messages == ["dropped 4: 3 tie, 1 no prompt"]


# --- leases

HOLD = """
import sys, time
from sdpo_data.run import Run
run = Run(sys.argv[1])
with run.stage("pairs", {"seed": 0}) as stage:
    print("current" if stage.current else "held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(run):
    """Another process at work on the unit "pairs" of the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_on_the_same_unit_is_refused(run, holder):
    with pytest.raises(
        SdpoError,
        match=rf"run: pairs is being worked on by process {holder.pid} on .+\. Wait for it, or end it; then start",
    ):
        make(run)
    with run.stage("scores", {}):  # another unit is free
        pass
    holder.communicate("\n")  # it ends its work
    assert not make(run)  # which is now finished, by the same recipe


def test_the_lease_of_a_dead_process_is_taken_over(run, holder):
    holder.kill()
    holder.wait()
    assert (run.path / ".leases/pairs.json").exists()
    assert make(run)
    assert not (run.path / ".leases/pairs.json").exists()


def test_a_lease_without_a_sign_of_life_is_taken_over(run, holder, monkeypatch):
    lease = run.path / ".leases/pairs.json"
    silent_since = time.time() - run_module.DEAD_AFTER - 1
    os.utime(lease, (silent_since, silent_since))
    with run.lease("pairs"):
        assert json.loads(lease.read_text())["pid"] == os.getpid()
        holder.communicate("\n")  # it wakes up and ends: the lease it lost is not its to free
        assert json.loads(lease.read_text())["pid"] == os.getpid()
    assert not lease.exists()


def test_a_lease_of_another_host_holds_while_it_shows_signs_of_life(run):
    lease = run.path / ".leases/pairs.json"
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 999_999_999, "token": "t"}))  # none of that number here
    with pytest.raises(SdpoError, match="pairs is being worked on by process 999999999 on elsewhere"):
        make(run)


def test_a_held_lease_shows_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(run_module, "HEARTBEAT", 0.01)
    with run.lease("pairs"):
        lease = run.path / ".leases/pairs.json"
        os.utime(lease, (0, 0))
        deadline = time.monotonic() + 5
        while lease.stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "{"])
def test_a_lease_that_was_never_written_to_its_end_is_taken_over(run, content):
    lease = run.path / ".leases/pairs.json"
    lease.parent.mkdir(parents=True)
    lease.write_text(content)
    assert make(run)


def test_work_that_another_has_just_finished_is_not_done_again(run, monkeypatch):
    # the other process finishes between our look at lineage.json and our lease
    lease, other = Run.lease, Run(run.path)

    def late_lease(self, unit):
        monkeypatch.setattr(Run, "lease", lease)
        make(other, TWO)
        return lease(self, unit)

    monkeypatch.setattr(Run, "lease", late_lease)
    assert not make(run, ONE)
    assert_frame_equal(run.pairs, TWO)


def test_of_many_at_once_exactly_one_does_the_work(run, monkeypatch):
    dumps = json.dumps  # slowed down, so that all look before any has written its lease
    monkeypatch.setattr(json, "dumps", lambda *given, **named: time.sleep(0.02) or dumps(*given, **named))
    done, refused = [], []
    start = threading.Barrier(6)

    def work() -> None:
        start.wait()
        try:
            with Run(run.path).stage("pairs", {"seed": 0}) as stage:
                if not stage.current:
                    stage.write("pairs", ONE)
                    done.append(1)
        except SdpoError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [1]
    assert all("is being worked on" in sentence for sentence in refused)
    assert sorted(files(run.path)) == ["lineage.json", "pairs.parquet"]


def test_lineage_of_units_made_side_by_side_is_all_kept(run):
    threads = [threading.Thread(target=make, args=(Run(run.path), ONE, f"table_{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run.lineage) == [f"table_{i}" for i in range(8)]
