"""What --plan says is what training then does: units, sizes, and which of them are the same."""

import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpo_data import score_pairs
from sdpo_data.run import Run
from sdpo_train import TrainConfig, cost, run_sdpo
from sdpo_train.arms import ARMS, CORE
from sdpo_train.config import StepConfig
from sdpo_train.plan import plan_units
from sdpo_train.work import count_updates
from tests.conftest import ready_to_train
from tests.test_steps import FakeStep

CONFIG = TrainConfig(arms=["core", "dpo", "target_from_s", "cumulative", "adaptive"], batch_pairs=2, epochs=2)


@pytest.fixture
def run(pairs, tiny_model, tmp_path) -> Run:
    """A run that is ready to train, in three steps of 3, 3 and 2 pairs."""
    return ready_to_train(tmp_path / "run", pairs, tiny_model, parts=3)


def test_the_plan_is_what_is_then_trained(run, tiny_model):
    planned = plan_units(run, CONFIG, str(tiny_model))
    assert {unit["state"].split()[0] for unit in planned} == {"to", "as"}
    fake = FakeStep()

    def upside_down(pairs, *_):  # a model that finds hard what S finds easy: the adaptive arm goes its own way
        scores, sides = score_pairs(pairs, tiny_model), {"chosen": "rejected", "rejected": "chosen"}
        return scores.with_columns(
            **{f"{side}_{what}": f"{other}_{what}" for side, other in sides.items() for what in ("logp", "tokens")}
        )

    steps = run_sdpo(
        run.pairs, run.partition, tiny_model, run.path, scores=run.scores, config=CONFIG, train_step=fake,
        rescore=upside_down,
    )  # fmt: skip
    trained = [f"{work.arm}/{work.seed}/{work.step}" for work in fake.seen]
    assert [unit["unit"] for unit in planned if unit["state"] == "to do"] == trained
    shared = steps.filter(steps["shared_from"].is_not_null())
    expected = {f"{row['arm']}/{row['seed']}/{row['step']}": row["shared_from"] for row in shared.to_dicts()}
    named = {unit["unit"]: unit["state"].removeprefix("as ") for unit in planned if unit["state"].startswith("as ")}
    assert {unit: "arms/{}/seed_{}/step_{}".format(*other.split("/")) for unit, other in named.items()} == expected
    assert [unit["pairs"] for unit in planned] == steps["pairs"].to_list()
    assert {unit["state"] for unit in plan_units(run, CONFIG, str(tiny_model))} == {"done"}


def test_sizes_by_hand(run, tiny_model):
    """Steps of 3, 3 and 2 pairs, two at a time, twice over: 4, 4 and 2 updates."""
    units = plan_units(run, CONFIG.model_copy(update={"arms": ["sdpo"]}), str(tiny_model))
    assert [(unit["unit"], unit["pairs"], unit["updates"]) for unit in units] == [
        ("sdpo/0/1", 3, 4), ("sdpo/0/2", 3, 4), ("sdpo/0/3", 2, 2)
    ]  # fmt: skip
    scores = run.scores
    total = sum(scores[f"{part}_tokens"].sum() for part in ("prompt", "chosen", "rejected"))
    assert sum(unit["tokens"] for unit in units) == 2 * total


def test_pairs_whose_scores_are_of_another_dtype_are_scored_once_more(run, tiny_model):
    """By the first unit that is held to S on them, not by those after it; what M_1 and M_2 say was never scored."""
    half = TrainConfig(arms=["sdpo", "sdpo_fixed", "dpo"], dtype="bfloat16")
    of_step = [
        cost.count_tokens(run.scores.join(rows, on="pair_id", how="semi"))
        for _, rows in sorted(run.partition.group_by("step"))
    ]
    units = {unit["unit"]: unit for unit in plan_units(run, half, str(tiny_model))}
    assert {name: unit["scored_again"] for name, unit in units.items()} == {
        "sdpo/0/1": of_step[0], "sdpo/0/2": 0, "sdpo/0/3": 0,
        "sdpo_fixed/0/1": 0, "sdpo_fixed/0/2": of_step[1], "sdpo_fixed/0/3": of_step[2], "dpo/0/1": 0,
    }  # fmt: skip
    whole = plan_units(run, half.model_copy(update={"dtype": "float32"}), str(tiny_model))
    assert {unit["scored_again"] for unit in whole} == {0}
    as_trained = run.scores.with_columns(dtype=pl.lit("bfloat16_autocast"))
    as_trained.write_parquet(run.path / "scores.parquet")
    assert {unit["scored_again"] for unit in plan_units(run, half, str(tiny_model))} == {0}


def test_what_is_planned_to_be_scored_again_is_what_training_scores(run, tiny_model, tmp_path, caplog):
    config = TrainConfig(arms=["sdpo_fixed"], dtype="bfloat16", diagnose=False, kl_samples=0)
    inputs = {"scores": run.scores, "config": config, "store": str(tmp_path / "store")}
    assert all(unit["scored_again"] for unit in plan_units(run, config, str(tiny_model)))
    with caplog.at_level("INFO", "sdpo_train"):
        run_sdpo(run.pairs, run.partition, tiny_model, run.path, units=["sdpo_fixed/0/1"], **inputs)
    assert caplog.text.count("6 answers of the reference were not in the score store") == 1  # of 3 pairs
    assert [bool(unit["scored_again"]) for unit in plan_units(run, config, str(tiny_model))] == [False, True, True]


def test_the_command_prints_and_runs_nothing(run, tiny_model, run_command):
    (run.path / "config.yaml").write_text(f"model: {tiny_model}\n")
    code, out, err = run_command("sdpo_train", run.path, "--plan", "--arms", "sdpo", "sdpo_fixed")
    assert (code, err) == (0, "")
    assert "as sdpo/0/1" in out
    assert "scored again" not in out
    code, out, _ = run_command("sdpo_train", run.path, "--plan", "--arms", "sdpo", "--dtype", "bfloat16")
    assert "scores.parquet is in float32, but training computes in bfloat16_autocast, so " in out
    assert "score.dtype bfloat16_autocast saves it" in out
    code, out, _ = run_command("sdpo_train", run.path, "--plan", "--json", "--arms", "sdpo", "dpo")
    told = json.loads(out)
    assert [unit["unit"] for unit in told["units"]] == ["sdpo/0/1", "sdpo/0/2", "sdpo/0/3", "dpo/0/1"]
    assert [arm["arm"] for arm in told["arms"]] == ["sdpo", "dpo"]
    assert not (run.path / "arms").exists()
    code, _, err = run_command("sdpo_train", run.path, "--json")
    assert (code, err) == (2, "error: --json is how --plan is printed: give both, or neither to train.\n")
    assert not (run.path / "arms").exists()


def test_help_names_what_can_be_asked_for(run_command):
    code, out, err = run_command("sdpo_train", "--help")
    said = " ".join(out.replace("│", " ").split())
    assert (code, err) == (0, "")
    assert f"Arms: {', '.join(ARMS)}." in said
    for expected in (f"core is {', '.join(CORE)}; all is every one; --plan says", "core (order x reference) or all;",
                     "in the section trl of train: `trl: {weight_decay: 0.01}`"):  # fmt: skip
        assert expected in said


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 3))
def test_steps_have_at_most_an_update_each_and_epoch_more_than_one_step(sizes, batch, epochs):
    """As the summary of the arm dpo says; parts of 3, 3 and 2 in updates of 2 have 2 + 2 + 1, and 8 pairs have 4."""
    config = StepConfig(batch_pairs=batch, epochs=epochs)
    more = sum(count_updates(size, config) for size in sizes) - count_updates(sum(sizes), config)
    assert 0 <= more <= epochs * (len(sizes) - 1)
