"""The loop: which model each step starts from and refers to, and what a killed run does next."""

import polars as pl
import pytest

from sdpo_data import PartitionConfig, open_run, partition_pairs, score_pairs
from sdpo_data.difficulty import difficulty_named
from sdpo_data.models import load_model, model_key, save_model
from sdpo_data.run import Run
from sdpo_data.tables import METRICS, PARTITION, STEPS, SdpoError, check
from sdpo_train.arms import ARMS, CORE, arm_partition, compare_arms, variants
from sdpo_train.config import TrainConfig
from sdpo_train.steps import chain, run_sdpo, tell_parts


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
        pl.DataFrame([(work.arm, work.seed, work.step, 1, "loss", 0.5)], METRICS, orient="row").write_parquet(
            work.out / "metrics.parquet"
        )
        row = dict.fromkeys(("first_loss", "last_loss", "max_start_gap", "margin_ref_mean", "seconds"), 0.5)
        row |= {"pairs": work.pairs.height, "tokens": 1, "updates": 1, "model": str(work.out)}
        row |= {name: getattr(work, name) for name in ("arm", "seed", "step", "start_key", "reference_key")}
        return row | {"model_key": model_key(work.out), "shared_from": None}


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


def test_a_forced_run_that_was_killed_goes_on_where_it_was(inputs, tmp_path):
    """Step 1 was trained anew and took the rows of steps 2 and 3 with it; their old selves are not up to date."""
    pairs, partition, base = inputs
    run_sdpo(pairs, partition, base, tmp_path, train_step=FakeStep())
    with pytest.raises(KeyboardInterrupt):
        run_sdpo(pairs, partition, base, tmp_path, force=True, train_step=FakeStep(dies_at=("sdpo", 2)))
    again = FakeStep()
    steps = run_sdpo(pairs, partition, base, tmp_path, train_step=again)
    assert [work.step for work in again.seen] == [2, 3]
    assert steps["step"].to_list() == [1, 2, 3]


def test_a_run_can_be_moved_and_tells_only_of_steps_it_has(inputs, tmp_path):
    pairs, partition, base = inputs
    run_sdpo(pairs, partition, base, tmp_path / "a", units=["sdpo/0/1"], train_step=FakeStep())
    (tmp_path / "a").rename(tmp_path / "b")
    again = FakeStep()
    run_sdpo(pairs, partition, base, tmp_path / "b", train_step=again)
    assert [work.start for work in again.seen] == [str(tmp_path / f"b/arms/sdpo/seed_0/step_{step}") for step in (1, 2)]
    run = Run(tmp_path / "b")
    assert run.steps["model"][0] == str(tmp_path / "b/arms/sdpo/seed_0/step_1")
    assert run.metrics["step"].to_list() == [1, 2, 3]
    rows = pl.read_parquet(run.path / "arms/sdpo/seed_0/steps.parquet")
    rows.filter(pl.col("step") < 3).write_parquet(run.path / "arms/sdpo/seed_0/steps.parquet")  # fewer parts, --force
    assert run.metrics["step"].to_list() == [1, 2]


def test_the_run_folder_keeps_the_inputs_and_refuses_others(inputs, tmp_path):
    pairs, partition, base = inputs
    run_sdpo(pairs, partition, base, tmp_path, train_step=FakeStep())
    assert open_run(tmp_path).pairs.equals(pairs)
    with pytest.raises(SdpoError, match="already holds other partition"):
        run_sdpo(pairs, partition.with_columns(step=pl.col("step") + 1), base, tmp_path, train_step=FakeStep())


def test_an_unknown_arm_names_those_there_are(inputs, tmp_path):
    with pytest.raises(SdpoError, match=r"'sdop', which is not an arm. There are: sdpo, sdpo_fixed"):
        run_sdpo(*inputs, tmp_path, config=TrainConfig(arms=["sdop"]))


def test_a_partition_of_other_pairs_is_refused(inputs, tmp_path):
    pairs, partition, base = inputs
    with pytest.raises(SdpoError, match=r"partition has 1 pair\(s\) that pairs does not have"):
        run_sdpo(pairs.filter(pl.col("pair_id") != partition["pair_id"][0]), partition, base, tmp_path)


def test_what_another_arm_has_done_already_is_shared(inputs, tmp_path):
    """Step 1 of sdpo and sdpo_fixed: the same pairs in order, from S towards S. Step 2 refers to others."""
    pairs, partition, base = inputs
    fake = FakeStep()
    steps = run_sdpo(pairs, partition, base, tmp_path, config=TrainConfig(arms=["sdpo", "sdpo_fixed"]), train_step=fake)
    assert [(work.arm, work.step) for work in fake.seen] == [
        ("sdpo", 1), ("sdpo", 2), ("sdpo", 3), ("sdpo_fixed", 2), ("sdpo_fixed", 3)
    ]  # fmt: skip
    first = steps.filter(step=1)
    assert first["shared_from"].to_list() == [None, "arms/sdpo/seed_0/step_1"]
    assert first["model_key"].n_unique() == 1
    assert first["model"].n_unique() == 2
    assert model_key(first["model"][1]) == first["model_key"][1]
    metrics = pl.read_parquet(tmp_path / "arms/sdpo_fixed/seed_0/step_1/metrics.parquet")
    assert metrics["arm"].unique().to_list() == ["sdpo_fixed"]
    assert pl.read_parquet(tmp_path / "arms/sdpo/seed_0/step_1/metrics.parquet")["arm"].unique().to_list() == ["sdpo"]


def test_a_unit_can_be_run_by_itself_and_needs_those_before_it(inputs, tmp_path):
    pairs, partition, base = inputs
    fake = FakeStep()
    with pytest.raises(SdpoError, match=r"step_2 starts from step 1, which is not finished.*--unit sdpo/0/1"):
        run_sdpo(pairs, partition, base, tmp_path, units=["sdpo/0/2"], train_step=fake)
    for step in (1, 2):
        rows = run_sdpo(pairs, partition, base, tmp_path, units=[f"sdpo/0/{step}"], train_step=fake)
        assert rows["step"].to_list() == list(range(1, step + 1))
    assert [work.step for work in fake.seen] == [1, 2]
    with pytest.raises(SdpoError, match=r"--unit 'dpo/0/1' is not part of this run. There are, for example: sdpo/0/1"):
        run_sdpo(pairs, partition, base, tmp_path, units=["dpo/0/1"], train_step=fake)
    with pytest.raises(SdpoError, match=r"--unit 'sdpo' is not arm/seed/step"):
        run_sdpo(pairs, partition, base, tmp_path, units=["sdpo"], train_step=fake)


def test_settings_may_be_one_for_each_step(inputs, tmp_path):
    pairs, partition, base = inputs
    fake, seen = FakeStep(), []

    def train_step(work, config):
        seen.append((work.step, config.beta, config.learning_rate, config.epochs))
        return fake(work, config)

    lists = TrainConfig(beta=[0.1, 0.2, 0.3], epochs=[3, 2, 1], learning_rate=1e-6)
    run_sdpo(pairs, partition, base, tmp_path, config=lists, train_step=train_step)
    assert seen == [(1, 0.1, 1e-6, 3), (2, 0.2, 1e-6, 2), (3, 0.3, 1e-6, 1)]
    with pytest.raises(SdpoError, match=r"train.beta has 2 values, but arm sdpo has 3 step"):
        run_sdpo(pairs, partition, base, tmp_path / "b", config=TrainConfig(beta=[0.1, 0.2]), train_step=train_step)


def test_a_grid_gives_every_arm_at_every_point(inputs, tmp_path):
    pairs, partition, base = inputs
    seen = []

    def train_step(work, config):
        seen.append((work.arm, config.learning_rate, config.beta))
        return FakeStep()(work, config)

    grid = TrainConfig(arms=["dpo", "dpo_beta_over_t"], tune={"learning_rate": [1e-6, 2e-6], "beta": [0.3]})
    run_sdpo(pairs, partition, base, tmp_path, config=grid, train_step=train_step)
    assert "1e-06" in (tmp_path / "config.yaml").read_text()  # the grid is remembered, as it was asked for
    assert seen == [
        ("dpo,learning_rate=1e-06,beta=0.3", 1e-6, 0.3),
        ("dpo,learning_rate=2e-06,beta=0.3", 2e-6, 0.3),
        ("dpo_beta_over_t,learning_rate=1e-06,beta=0.3", 1e-6, pytest.approx(0.1)),  # three steps: 0.3 / 3
        ("dpo_beta_over_t,learning_rate=2e-06,beta=0.3", 2e-6, pytest.approx(0.1)),
    ]


def test_a_whole_run_schedule_knows_its_place(inputs, tmp_path):
    """Eight pairs in steps of 3, 3 and 2, two at a time: 2, 2 and 1 updates."""
    pairs, partition, base = inputs
    fake = FakeStep()
    config = TrainConfig(schedule="whole_run", optimizer="carry", batch_pairs=2)
    run_sdpo(pairs, partition, base, tmp_path, config=config, train_step=fake)
    assert [(work.updates_before, work.updates_in_all) for work in fake.seen] == [(0, 5), (2, 5), (4, 5)]
    assert [work.moments and work.moments.name for work in fake.seen] == [None, "step_1", "step_2"]


def test_only_the_last_weights_are_kept_where_asked(inputs, tmp_path):
    pairs, partition, base = inputs
    config = TrainConfig(keep="last")
    run_sdpo(pairs, partition, base, tmp_path, config=config, train_step=FakeStep())
    weights = [path.parent.name for path in sorted(tmp_path.rglob("model*.safetensors"))]
    assert weights == ["step_3"]
    assert (tmp_path / "arms/sdpo/seed_0/step_1/metrics.parquet").exists()
    again = FakeStep()
    run_sdpo(pairs, partition, base, tmp_path, config=config, train_step=again)
    assert again.seen == []


def test_a_first_step_that_two_arms_share_is_kept_until_both_have_it(inputs, tmp_path):
    pairs, partition, base = inputs
    config = TrainConfig(arms=["sdpo", "sdpo_fixed"], keep="last")
    fake = FakeStep()
    run_sdpo(pairs, partition, base, tmp_path, config=config, train_step=fake, units=["sdpo/0/1", "sdpo/0/2"])
    kept = tmp_path / "arms/sdpo/seed_0/step_1"
    assert list(kept.glob("*.safetensors"))
    run_sdpo(pairs, partition, base, tmp_path, config=config, train_step=fake)
    assert [(work.arm, work.step) for work in fake.seen] == [
        ("sdpo", 1), ("sdpo", 2), ("sdpo", 3), ("sdpo_fixed", 2), ("sdpo_fixed", 3)
    ]  # fmt: skip
    weights = sorted(str(path.parent.relative_to(tmp_path / "arms")) for path in tmp_path.rglob("model*.safetensors"))
    assert weights == ["sdpo/seed_0/step_3", "sdpo_fixed/seed_0/step_3"]


DECLARED = {  # arm -> start and reference of steps 1, 2, 3: S is 0, M_t is t
    "sdpo": ([0, 1, 2], [0, 1, 2]),
    "sdpo_fixed": ([0, 1, 2], [0, 0, 0]),
    "random": ([0, 1, 2], [0, 1, 2]),
    "random_fixed": ([0, 1, 2], [0, 0, 0]),
    "hard_to_easy": ([0, 1, 2], [0, 1, 2]),
    "stratified": ([0, 1, 2], [0, 1, 2]),
    "length_only": ([0, 1, 2], [0, 1, 2]),
    "target_from_s": ([0, 0, 0], [0, 1, 2]),
    "cumulative": ([0, 1, 2], [0, 1, 2]),
    "adaptive": ([0, 1, 2], [0, 1, 2]),
    "selective": ([0, 1, 2], [0, 1, 2]),
    "dpo": ([0], [0]),
    "dpo_sorted": ([0], [0]),
    "dpo_beta_over_t": ([0], [0]),
}


SIZES = {"cumulative": [3, 6, 8], "selective": [2, 1, 1]}  # of steps of 3, 3 and 2 pairs; half of 8 is left


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_from_and_refers_to_what_it_declares(inputs, tmp_path, arm):
    pairs, partition, base = inputs
    fake = FakeStep()
    scores = score_pairs(pairs, base)
    steps = run_sdpo(pairs, partition, base, tmp_path, scores=scores, config=TrainConfig(arms=[arm]), train_step=fake)
    keys = [model_key(base), *steps["model_key"]]
    starts, references = DECLARED[arm]
    assert [keys.index(work.start_key) for work in fake.seen] == starts
    assert [keys.index(work.reference_key) for work in fake.seen] == references
    assert [work.pairs.height for work in fake.seen] == SIZES.get(arm, [3, 3, 2] if len(starts) == 3 else [8])


TOLD = {  # arm -> how a held-out pair's part is told, and of how many pairs each; None: in no way
    **dict.fromkeys(("sdpo", "sdpo_fixed", "target_from_s"), ("given", [3, 3, 2])),
    "cumulative": ("given", [3, 3, 2]),  # where a pair comes first
    "selective": ("rising", [2, 1, 1]),
    "adaptive": ("rising", [3, 5]),  # the first part is one of S's, the others are not
    "hard_to_easy": ("falling", [3, 3, 2]),
    "length_only": ("rising", [3, 3, 2]),
    **dict.fromkeys(("random", "random_fixed", "stratified", "dpo", "dpo_sorted", "dpo_beta_over_t")),
}


@pytest.mark.parametrize("arm", ARMS)
def test_how_the_part_of_a_held_out_pair_is_told(inputs, tmp_path, arm):
    pairs, partition, base = inputs
    scores, [variant] = score_pairs(pairs, base), variants(TrainConfig(arms=[arm]))
    told = tell_parts(chain(Run(tmp_path), variant, 0, partition, base, scores), scores)
    if TOLD[arm] is None:
        assert told == {}
        return
    rows = told["partition"]
    assert (told["parts"], rows.group_by("step").len().sort("step")["len"].to_list()) == TOLD[arm]
    measured = scores.select("pair_id", now=difficulty_named(rows["definition"][0]).measure(scores))
    both = rows.join(measured, on="pair_id", maintain_order="left")
    assert both["difficulty"].to_list() == pytest.approx(both["now"].to_list())
    ends = rows.group_by("step").agg(low=pl.col("difficulty").min(), high=pl.col("difficulty").max()).sort("step")
    low, high = ("high", "low") if told["parts"] == "falling" else ("low", "high")
    sign = -1 if told["parts"] == "falling" else 1
    assert (sign * (ends[low][1:] - ends[high][:-1]) >= 0).all()  # no part reaches into the next


def test_a_share_over_many_pairs_places_no_single_one(inputs, tmp_path):
    pairs, _, base = inputs
    scores = score_pairs(pairs, base)
    partition = partition_pairs(scores, PartitionConfig(parts=2, by="source", difficulty="reward_accuracy"))
    for arm, settled in (("sdpo", True), ("length_only", True), ("selective", False)):
        [variant] = variants(TrainConfig(arms=[arm]))
        assert bool(tell_parts(chain(Run(tmp_path), variant, 0, partition, base, scores), scores)) is settled, arm


def test_the_adaptive_arm_takes_what_is_easiest_under_the_newest_model(inputs, tmp_path):
    """Its step 2 must be the easiest of what step 1 left, by the scores of M_1, not of S."""
    pairs, partition, base = inputs
    fake, order = FakeStep(), {}

    def moved_most(pairs, model, kept, config):  # a model that finds the alphabet hard, backwards from step to step
        del kept, config
        rank = pairs["pair_id"].rank("ordinal", descending=model.endswith("step_2")).cast(pl.Float64)
        scores = score_pairs(pairs, base).with_columns(chosen_tokens=pl.lit(1), rejected_tokens=pl.lit(1))
        order[model] = pairs["pair_id"].gather(rank.arg_sort())
        return scores.with_columns(chosen_logp=-rank, rejected_logp=pl.lit(-20.0))

    run_sdpo(
        pairs, partition, base, tmp_path, config=TrainConfig(arms=["adaptive"]), train_step=fake, rescore=moved_most
    )
    seen = [set(work.pairs["pair_id"]) for work in fake.seen]
    assert seen[0] == set(partition.filter(step=1)["pair_id"])
    left = sorted(set(pairs["pair_id"]) - seen[0])
    assert seen[1] == set(left[:3])
    assert seen[2] == set(left[3:])
    kept = pl.read_parquet(tmp_path / "arms/adaptive/seed_0/partition.parquet")
    assert {key: set(part["pair_id"]) for (key,), part in kept.group_by("step")} == dict(enumerate(seen, 1))
    again = FakeStep()
    run_sdpo(pairs, partition, base, tmp_path, config=TrainConfig(arms=["adaptive"]), train_step=again)
    assert again.seen == []
    other = partition.with_columns(step=4 - pl.col("step")).sort("step", "rank")  # --force: as if nothing were done
    other = other.with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int64))
    other.write_parquet(tmp_path / "partition.parquet")
    config = TrainConfig(arms=["adaptive"])
    run_sdpo(pairs, other, base, tmp_path, config=config, train_step=again, rescore=moved_most, force=True)
    assert set(again.seen[0].pairs["pair_id"]) == set(other.filter(step=1)["pair_id"]) != seen[0]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_arm_trains_on_every_pair_once_but_where_it_says_otherwise(inputs, arm, seed):
    pairs, partition, base = inputs
    got = check(arm_partition(ARMS[arm], partition, seed, score_pairs(pairs, base)), PARTITION, "partition")
    assert got["rank"].to_list() == list(range(got.height))
    assert got["step"].is_sorted()
    if arm == "cumulative":  # 3 pairs, then those and 3 more, then all 8
        assert got.group_by("step").len().sort("step")["len"].to_list() == [3, 6, 8]
    elif arm == "selective":  # the easiest half, in three steps
        assert got.height == 4
        assert set(got["pair_id"]) == set(partition.sort("difficulty")["pair_id"].head(4))
    else:
        assert sorted(got["pair_id"]) == sorted(partition["pair_id"])


def test_arms_are_compared_by_their_declarations(inputs):
    pairs, partition, base = inputs
    scores = score_pairs(pairs, base)
    found = variants(TrainConfig(arms=["sdpo", "random_fixed", "dpo", "cumulative"], batch_pairs=2))
    table = compare_arms(found, partition, scores)
    assert table.select("arm", "steps", "pairs", "updates").rows() == [
        ("sdpo", 3, 8, 5), ("random_fixed", 3, 8, 5), ("dpo", 1, 8, 4), ("cumulative", 3, 17, 9),
    ]  # fmt: skip
    tokens = [
        partition.filter(step=step).join(scores, on="pair_id").select(
            pl.sum_horizontal("prompt_tokens", "chosen_tokens", "rejected_tokens").sum()
        ).item() for step in (1, 2, 3)
    ]  # fmt: skip
    once, thrice = sum(tokens), 3 * tokens[0] + 2 * tokens[1] + tokens[2]  # cumulative: part 1 in three steps
    assert table["tokens"].to_list() == [once, once, once, thrice]
    assert table["against sdpo"].to_list() == [
        "the same",
        "order easy_to_hard -> random; reference previous -> base",
        "order easy_to_hard -> random; steps 3 -> 1; updates 5 -> 4",
        f"cumulative False -> True; pairs 8 -> 17; tokens {once} -> {thrice}; updates 5 -> 9",
    ]


def test_groups_of_arms_have_names():
    assert [one.label for one in variants(TrainConfig(arms=["core", "dpo"]))] == [*CORE, "dpo"]
    assert [one.label for one in variants(TrainConfig(arms=["all"]))] == list(ARMS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": []}, "an empty list"),
        ({"beta": [0.1, -0.1]}, r"-0\.1 is not above 0"),
        ({"warmup": 1.0}, r"1\.0 is not a share"),
        ({"optimizer": "carry", "lora_rank": 4}, "needs lora_rank 0"),
        ({"keep_adapters": True}, "needs a lora_rank"),
        ({"lora_alpha": 4}, "needs a lora_rank"),
        ({"loss": ["sigmoidal"]}, "sigmoid"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**settings)
