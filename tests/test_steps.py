"""The loop: which model each step starts from and refers to, and what a killed run does next."""

import polars as pl
import pytest

from sdpo_data import PartitionConfig, open_run, partition_pairs, score_pairs
from sdpo_data.models import load_model, model_key, save_model
from sdpo_data.run import Run
from sdpo_data.tables import PARTITION, STEPS, SdpoError, check
from sdpo_train.arms import ARMS, arm_partition
from sdpo_train.steps import TrainConfig, run_sdpo


@pytest.fixture
def inputs(pairs, tiny_model):
    scores = score_pairs(pairs, tiny_model)
    return pairs, partition_pairs(scores, PartitionConfig(parts=3)), str(tiny_model)


class FakeStep:
    """Writes the start model with one weight moved, and remembers what it was asked to do."""

    def __init__(self, dies_at=None):
        self.seen, self.dies_at = [], dies_at

    def __call__(self, work, config):
        self.seen.append(work)
        if (work.arm, work.step) == self.dies_at:
            raise KeyboardInterrupt
        model, tokenizer = load_model(work.start)
        model.model.norm.weight.data[0] += work.step + 10 * work.seed
        save_model(model, tokenizer, work.out)
        row = dict.fromkeys(("first_loss", "last_loss", "max_start_gap", "margin_ref_mean", "seconds"), 0.5)
        row |= {"pairs": work.pairs.height, "tokens": 1, "updates": 1, "model": str(work.out)}
        row |= {name: getattr(work, name) for name in ("arm", "seed", "step", "start_key", "reference_key")}
        return row | {"model_key": model_key(work.out)}


def test_each_step_starts_from_and_refers_to_the_step_before(inputs, tmp_path):
    pairs, partition, base = inputs
    fake = FakeStep()
    steps = run_sdpo(pairs, partition, base, tmp_path, train_step=fake)
    check(steps, STEPS, "steps")
    folder = tmp_path / "arms/sdpo/seed_0"
    starts = [base, str(folder / "step_1"), str(folder / "step_2")]
    assert [work.start for work in fake.seen] == [work.reference for work in fake.seen] == starts
    assert steps["start_key"].to_list() == steps["reference_key"].to_list() == [model_key(s) for s in starts]
    assert steps["start_key"].n_unique() == 3


def test_each_step_trains_on_its_own_pairs_in_the_partitions_order(inputs, tmp_path):
    pairs, partition, base = inputs
    fake = FakeStep()
    run_sdpo(pairs, partition, base, tmp_path, train_step=fake)
    for work in fake.seen:
        expected = partition.filter(pl.col("step") == work.step).sort("rank")["pair_id"]
        assert work.pairs["pair_id"].to_list() == expected.to_list()


def test_plain_dpo_is_one_step_over_all_pairs_from_the_base(inputs, tmp_path):
    pairs, partition, base = inputs
    fake = FakeStep()
    run_sdpo(pairs, partition, base, tmp_path, config=TrainConfig(arms=["dpo"], seeds=[0, 1]), train_step=fake)
    assert [(work.seed, work.step, work.start, work.pairs.height) for work in fake.seen] == [
        (0, 1, base, 8),
        (1, 1, base, 8),
    ]
    orders = [work.pairs["pair_id"].to_list() for work in fake.seen]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(pairs["pair_id"])


def test_a_killed_run_ends_where_an_unbroken_one_does(inputs, tmp_path):
    pairs, partition, base = inputs
    with pytest.raises(KeyboardInterrupt):
        run_sdpo(pairs, partition, base, tmp_path / "a", train_step=FakeStep(dies_at=("sdpo", 2)))
    again = FakeStep()
    continued = run_sdpo(pairs, partition, base, tmp_path / "a", train_step=again)
    assert [work.step for work in again.seen] == [2, 3]
    unbroken = run_sdpo(pairs, partition, base, tmp_path / "b", train_step=FakeStep())
    assert continued.drop("model").equals(unbroken.drop("model"))


def test_a_finished_run_does_nothing(inputs, tmp_path):
    pairs, partition, base = inputs
    first = run_sdpo(pairs, partition, base, tmp_path, train_step=FakeStep())
    again = FakeStep()
    assert run_sdpo(pairs, partition, base, tmp_path, train_step=again).equals(first)
    assert again.seen == []


def test_another_arm_is_added_beside_what_is_finished(inputs, tmp_path):
    pairs, partition, base = inputs
    run_sdpo(pairs, partition, base, tmp_path, train_step=FakeStep())
    again = FakeStep()
    run_sdpo(pairs, partition, base, tmp_path, config=TrainConfig(arms=["sdpo", "dpo"]), train_step=again)
    assert [work.arm for work in again.seen] == ["dpo"]
    assert Run(tmp_path).steps.select("arm", "step").rows() == [("dpo", 1), ("sdpo", 1), ("sdpo", 2), ("sdpo", 3)]


def test_finished_steps_are_not_trained_with_other_settings(inputs, tmp_path):
    pairs, partition, base = inputs
    run_sdpo(pairs, partition, base, tmp_path, train_step=FakeStep())
    with pytest.raises(SdpoError, match=r"made with beta = 0\.1, now it is 0\.5.*--force"):
        run_sdpo(pairs, partition, base, tmp_path, config=TrainConfig(beta=0.5), train_step=FakeStep())
    forced = FakeStep()
    run_sdpo(pairs, partition, base, tmp_path, config=TrainConfig(beta=0.5), force=True, train_step=forced)
    assert [work.step for work in forced.seen] == [1, 2, 3]


def test_the_run_folder_keeps_the_inputs_and_refuses_others(inputs, tmp_path):
    pairs, partition, base = inputs
    run_sdpo(pairs, partition, base, tmp_path, train_step=FakeStep())
    assert open_run(tmp_path).pairs.equals(pairs)
    with pytest.raises(SdpoError, match="already holds other partition"):
        run_sdpo(pairs, partition.with_columns(step=pl.col("step") + 1), base, tmp_path, train_step=FakeStep())


def test_an_unknown_arm_names_those_there_are(inputs, tmp_path):
    with pytest.raises(SdpoError, match=r"'sdop', which is not an arm. There are: sdpo, dpo"):
        run_sdpo(*inputs, tmp_path, config=TrainConfig(arms=["sdop"]))


def test_a_partition_of_other_pairs_is_refused(inputs, tmp_path):
    pairs, partition, base = inputs
    with pytest.raises(SdpoError, match=r"partition has 1 pair\(s\) that pairs does not have"):
        run_sdpo(pairs.filter(pl.col("pair_id") != partition["pair_id"][0]), partition, base, tmp_path)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_arm_trains_on_every_pair_once(inputs, arm, seed):
    _, partition, _ = inputs
    got = check(arm_partition(ARMS[arm], partition, seed), PARTITION, "partition")
    assert sorted(got["pair_id"]) == sorted(partition["pair_id"])
    assert got["rank"].to_list() == list(range(got.height))
    assert got["step"].is_sorted()
