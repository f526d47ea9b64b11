import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from made_run import make_run, write

from sdpo_data import model_key
from sdpo_data.run import Run
from sdpo_data.score import ScoreConfig, score_pairs
from sdpo_data.tables import PAIRS, SCORES, STEPS, SdpoError
from sdpo_eval import held_out, score_held_out
from sdpo_eval.held_out import find_best_steps
from sdpo_eval.margins import HELD_OUT_SCORES, read_held_out
from sdpo_eval.report import Report


def scored(arm: str, step: int, margins: list[float]) -> pl.DataFrame:
    rows = [
        (
            arm,
            0,
            step,
            f"p{number}",
            f"q{number}",
            "s",
            "key",
            margin - 9.0,
            -9.0,
            3,
            3,
            5,
            False,
            "float32",
            *[None] * 5,
        )
        for number, margin in enumerate(margins)
    ]
    return pl.DataFrame(rows, HELD_OUT_SCORES, orient="row")


def test_the_best_step_by_hand():
    # accuracy: base 0 of 4, steps 1 and 2 3 of 4, 2 with the higher mean margin (8 / 4 against 2 / 4), step 3 2 of 4.
    # best 2 - last 3: pair 0 alone is lost: differences 100, 0, 0, 0: 25 points, s^2 = 2500, SE = 25
    scores = [scored("base", 0, [-1, -1, -1, -1])]
    scores += [scored("sdpo", step, own) for step, own in ((1, [1, 1, 1, -1]), (2, [3, 3, 3, -1]), (3, [-9, 9, 9, -9]))]
    got = find_best_steps(pl.concat(scores)).row(0, named=True)
    assert (got["best"], got["last"], got["effect"], got["stderr"], got["n"]) == (2, 3, 25, pytest.approx(25), 4)
    assert got["verdict"] == "not distinguishable"
    assert got["p"] == 1  # at least (3/4)^4 = 0.32 in each tail, times the 3 others it could have been


def test_a_last_step_that_is_far_worse():
    scores = [scored("base", 0, [-1.0] * 60), scored("sdpo", 1, [1.0] * 60), scored("sdpo", 2, [-1.0, 1.0, -1.0] * 20)]
    got = find_best_steps(pl.concat(scores))
    assert got.select("best", "verdict").rows() == [(1, "better")]
    prompts = "q" + (pl.col("pair_id").str.slice(1).cast(pl.Int64) // 3).cast(pl.String)
    alone = find_best_steps(pl.concat(scores).with_columns(prompt_id=prompts))
    assert alone["stderr"][0] is None  # each prompt lost two of its three: prompts do not differ at all
    assert alone["verdict"][0] == "not distinguishable"


def test_a_base_model_that_nothing_beats():
    scores = pl.concat([scored("base", 0, [1.0, 2.0]), scored("dpo", 1, [1.0, -2.0])])
    assert find_best_steps(scores).select("arm", "best", "last").rows() == [("dpo", 0, 1)]


@pytest.fixture
def run(tmp_path, tiny_model, pairs) -> Path:
    """Two steps: the first left the tiny model as it was, the second moved it."""
    import torch
    from transformers import AutoModelForCausalLM

    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight += 0.5 * torch.randn(
            model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    model.save_pretrained(moved)
    write(run / "held_out.parquet", pairs, PAIRS)
    keys = model_key(tiny_model), model_key(moved)
    folders = enumerate(zip(keys, (tiny_model, moved), strict=True), 1)
    rows = [
        ("sdpo", 0, step, "k", "k", key, str(folder), 8, 90, 1, 1.0, 0.7, 0.6, 0.0, 0.0, None)
        for step, (key, folder) in folders
    ]
    write(run / "arms/sdpo/seed_0/steps.parquet", pl.DataFrame(rows, STEPS, orient="row"), STEPS)
    (run / "config.yaml").write_text(f"model: {tiny_model}\n")
    return run


def test_every_model_scores_the_held_out_pairs_once(run, tiny_model, pairs, monkeypatch):
    asked = []

    def counted(pairs, model, config):
        asked.append(Path(model).name)
        return score_pairs(pairs, model, config)

    monkeypatch.setattr(held_out, "score_pairs", counted)
    got = score_held_out(Run(run), tiny_model)
    assert asked == ["tiny", "moved"]  # step 1 has the base model's weights
    assert got.schema == HELD_OUT_SCORES
    assert got.select("arm", "step").unique().sort("arm", "step").rows() == [("base", 0), ("sdpo", 1), ("sdpo", 2)]
    own = score_pairs(pairs, run.parent / "moved").sort("pair_id")
    assert got.filter(arm="sdpo", step=2).select(list(SCORES)).equals(own)
    assert got.filter(step=1).select(list(SCORES)).equals(got.filter(step=0).select(list(SCORES)))
    assert score_held_out(Run(run), tiny_model).equals(got)
    assert asked == ["tiny", "moved"]
    score_held_out(Run(run), tiny_model, force=True)
    assert asked == ["tiny", "moved"] * 2
    with pytest.raises(SdpoError, match=r"held_out_scores/base-0-0 was made with max_length = 1024, now it is 512"):
        score_held_out(Run(run), tiny_model, ScoreConfig(max_length=512))


def test_a_step_whose_weights_were_not_kept_is_named(run, tiny_model, caplog):
    whole = score_held_out(Run(run), tiny_model)
    shutil.rmtree(run / "held_out_scores")
    steps = pl.read_parquet(run / "arms/sdpo/seed_0/steps.parquet")
    gone = pl.when(step=1).then(pl.lit(str(run / "nowhere"))).otherwise("model")
    steps.with_columns(model=gone).write_parquet(run / "arms/sdpo/seed_0/steps.parquet")
    got = score_held_out(Run(run), tiny_model)
    assert got.equals(whole.filter(pl.col("step") != 1))
    assert "sdpo/0/1: weights not kept (train.keep last), so left out of the held-out scores." in caplog.text


def test_weights_that_changed_since_their_step(run, tiny_model):
    shutil.copy(tiny_model / "model.safetensors", run.parent / "moved/model.safetensors")
    with pytest.raises(SdpoError, match=r"moved holds the weights \w+, but its step wrote \w+. Train the step again"):
        score_held_out(Run(run), tiny_model)


def test_no_pair_was_held_out(run, tiny_model):
    write(run / "held_out.parquet", PAIRS.to_frame(), PAIRS)
    with pytest.raises(SdpoError, match=r"held_out.parquet holds no pair. Set pairs.hold_out"):
        score_held_out(Run(run), tiny_model)


def test_the_command_and_the_report(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["held_out", str(run)])
    held_out.main()
    said = capsys.readouterr().out
    assert "reward accuracy" in said
    held_out.main()
    assert capsys.readouterr().out == f"up to date: {run / 'held_out_scores'}\n"
    assert len(json.loads((run / "lineage.json").read_text())) == 3
    report = Report(run)
    assert report.table("held_out")["step"].to_list() == ["0", "1", "2"]
    assert "is best on the 8 pairs held out" in report.markdown()
    assert f"python -m sdpo_eval.held_out {run}\npython -m sdpo_eval.report {run}" in report.markdown()


def test_it_takes_the_settings_it_reads_and_leaves_those_of_the_scores_alone(run, run_command):
    config = f"{(run / 'config.yaml').read_text()}score:\n  against: other/model\n  max_length: 100\n"
    (run / "config.yaml").write_text(config)
    code, out, err = run_command("sdpo_eval.held_out", run, "--max-length", 90)
    assert (code, "reward accuracy" in out) == (0, True), err
    assert (run / "config.yaml").read_text() == config  # else score and partition would refuse their own tables
    made = json.loads((run / "lineage.json").read_text())["held_out_scores/base-0-0"]["recipe"]
    assert made["max_length"] == 90
    assert "against" not in made
    assert run_command("sdpo_eval.held_out", run, "--max-length", 90)[1].startswith("up to date")
    for flags in (["--against", "x"], ["--keep-token-logps"]):
        code, _, err = run_command("sdpo_eval.held_out", run, *flags)
        assert (code, err.split(":")[1]) == (2, " Unrecognized options")
    _, told, _ = run_command("sdpo_eval.held_out", "--help")
    assert "--max-length" in told
    assert "--against" not in told
    assert "--keep-token-logps" not in told


def test_a_report_names_the_command_that_is_missing(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "held_out_scores")
    assert read_held_out(Run(run)).is_empty()
    assert any(f"python -m sdpo_eval.held_out {run}" in warning for warning in Report(run).warnings)
