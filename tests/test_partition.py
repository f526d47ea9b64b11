import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from sdpo_data.partition import PartitionConfig, describe_parts, partition_pairs
from sdpo_data.tables import PARTITION, SCORES, SdpoError, check


def ordered(scores, **config) -> list[tuple[str, int]]:
    got = partition_pairs(scores, PartitionConfig(within="difficulty", **config))
    return got.select("pair_id", "step").rows()


def test_pairs_by_margin_per_token_by_hand(scores):
    # +3 a, +1 d, 0 b, -1 c, -2.75 e; unit r of 5 goes to step 1 + floor(2 r / 5): 1 1 1 2 2
    assert ordered(scores, parts=2) == [("a", 1), ("d", 1), ("b", 1), ("c", 2), ("e", 2)]


def test_pairs_by_margin_by_hand(scores):
    # +4 e, then a and c with +1 (a tie, broken by pair_id), -3 b, -9 d; floor(3 r / 5): 0 0 1 1 2
    got = ordered(scores, parts=3, difficulty="logp_margin")
    assert got == [("e", 1), ("a", 1), ("c", 2), ("b", 2), ("d", 3)]


def test_sources_by_reward_accuracy_by_hand(scores):
    # chat 2/3 before math 1/2, whole; inside a step all pairs have their source's difficulty: by pair_id
    got = ordered(scores, parts=2, by="source", difficulty="reward_accuracy")
    assert got == [("c", 1), ("d", 1), ("e", 1), ("a", 2), ("b", 2)]


def test_sources_by_mean_margin_by_hand(scores):
    # math -1 before chat -4/3: the other way round than by reward accuracy
    got = ordered(scores, parts=2, by="source", difficulty="logp_margin")
    assert got == [("a", 1), ("b", 1), ("c", 2), ("d", 2), ("e", 2)]


def test_a_pair_carries_the_difficulty_of_its_unit(scores):
    by_pair = partition_pairs(scores, PartitionConfig(difficulty="logp_margin")).sort("pair_id")
    assert by_pair["difficulty"].to_list() == [-1.0, 3.0, -1.0, 9.0, -4.0]
    by_source = partition_pairs(scores, PartitionConfig(by="source", difficulty="reward_accuracy")).sort("pair_id")
    assert by_source["difficulty"].to_list() == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    assert by_source["definition"].unique().to_list() == ["reward_accuracy"]


def test_one_part_holds_everything(scores):
    assert partition_pairs(scores, PartitionConfig(parts=1))["step"].to_list() == [1] * 5


def test_the_default_order_inside_a_step_is_a_shuffle_drawn_by_the_seed(scores):
    # pairs sorted by id get the places of numpy's permutation; easiest-first would be a d b | c e
    for seed in (0, 1):
        places = dict(zip("abcde", np.random.default_rng(seed).permutation(5), strict=True))
        expected = sorted("adb", key=places.get) + sorted("ce", key=places.get)
        assert partition_pairs(scores, PartitionConfig(seed=seed))["pair_id"].to_list() == expected
    orders = {tuple(partition_pairs(scores, PartitionConfig(seed=seed))["pair_id"]) for seed in range(9)}
    assert len(orders) > 4


def test_description_of_the_parts_by_hand(scores):
    # step 1 = a d b, step 2 = c e; tokens: 2 x prompt + chosen + rejected
    #   a 14 + 6, d 20 + 17, b 16 + 7: 80 tokens; c 18 + 5, e 22 + 5: 50
    # margins a +1, d -9, b -3: accuracy 1/3, mean -11/3; c +1, e +4: accuracy 1, mean 2.5
    got = describe_parts(partition_pairs(scores, PartitionConfig()), scores)
    assert got.rows() == [
        (1, 3, 80, "chat, math", -3.0, -1.0, 0.0, 1 / 3, -11 / 3),
        (2, 2, 50, "chat", 1.0, 1.875, 2.75, 1.0, 2.5),
    ]


def test_more_parts_than_pairs_are_refused(scores):
    with pytest.raises(SdpoError, match=r"Cannot cut 5 pair\(s\) into 6 steps\. Lower partition\.parts to 5\.$"):
        partition_pairs(scores, PartitionConfig(parts=6))


def test_more_parts_than_sources_are_refused_with_both_remedies(scores):
    with pytest.raises(
        SdpoError,
        match=r"Cannot cut 2 source\(s\) into 3 steps\. Lower partition\.parts to 2, or set partition\.by to 'pair'\.",
    ):
        partition_pairs(scores, PartitionConfig(parts=3, by="source"))


def test_a_share_cannot_rank_single_pairs(scores):
    with pytest.raises(SdpoError, match=r"'reward_accuracy' is a share over many pairs.*Set partition\.by to 'source'"):
        partition_pairs(scores, PartitionConfig(difficulty="reward_accuracy"))


def test_an_unknown_difficulty_is_refused(scores):
    with pytest.raises(SdpoError, match=r"partition\.difficulty 'gamma' is not defined"):
        partition_pairs(scores, PartitionConfig(difficulty="gamma"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_log_probability_that_is_not_finite_is_refused(scores, value):
    bad = scores.with_columns(chosen_logp=pl.when(pair_id="d").then(value).otherwise("chosen_logp"))
    with pytest.raises(SdpoError, match=r"1 of 5 pairs have a non-finite log-probability.*e\.g\. pair_id 'd'"):
        partition_pairs(bad, PartitionConfig(difficulty="logp_margin"))


def test_an_answer_of_no_tokens_is_refused(scores):
    bad = scores.with_columns(rejected_tokens=pl.Series([2, 3, 0, 5, 4]))
    with pytest.raises(SdpoError, match=r"or an answer of 0 tokens, e\.g\. pair_id 'c'"):
        partition_pairs(bad)


def test_repeated_pairs_are_refused(scores):
    with pytest.raises(SdpoError, match=r"scores has 2 repeated pair_id\(s\)"):
        partition_pairs(pl.concat([scores, scores.head(2)]))


@st.composite
def scored_pairs(draw) -> pl.DataFrame:
    # few distinct values beside arbitrary ones, so that ties are common
    logps = st.sampled_from([-4.0, -3.5, 0.0]) | st.floats(-500, 0, allow_subnormal=False)
    tokens = st.integers(1, 5)
    rows = draw(st.lists(st.tuples(st.sampled_from("xyz"), logps, logps, tokens, tokens), min_size=1, max_size=30))
    frame = pl.DataFrame(
        [
            (f"p{i:02}", f"q{i}", s, "key", c, r, ct, rt, 3, False, "float32", *[None] * 5)
            for i, (s, c, r, ct, rt) in enumerate(rows)
        ],
        SCORES,
        orient="row",
    )
    return frame[draw(st.permutations(range(frame.height)))]


DIFFICULTY = {"pair": ["margin_per_token", "logp_margin"], "source": ["reward_accuracy", "margin_per_token"]}


@pytest.mark.parametrize("by", ["pair", "source"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), scores=scored_pairs(), within=st.sampled_from(["shuffle", "difficulty"]))
def test_a_partition_is_a_partition(by, data, scores, within):
    unit = "pair_id" if by == "pair" else "source"
    units = scores[unit].n_unique()
    parts = data.draw(st.integers(1, min(units, 5)))
    config = PartitionConfig(
        parts=parts, by=by, difficulty=data.draw(st.sampled_from(DIFFICULTY[by])), within=within, seed=3
    )
    got = check(partition_pairs(scores, config), PARTITION, "partition")
    # every pair exactly once, with its source, in one training order
    assert got.select("pair_id", "source").sort("pair_id").equals(scores.select("pair_id", "source").sort("pair_id"))
    assert got["rank"].to_list() == list(range(scores.height))
    # no unit is split; no step is empty, sizes differ by at most one unit
    by_unit = got.group_by(unit).agg(pl.col("step").unique())
    assert (by_unit["step"].list.len() == 1).all()
    sizes = by_unit.explode("step")["step"].value_counts()["count"]
    assert len(sizes) == parts
    assert sizes.max() - sizes.min() <= 1
    # steps follow each other in training, and none is easier than the one before
    assert got["step"].is_sorted()
    bounds = got.group_by("step").agg(low=pl.min("difficulty"), high=pl.max("difficulty")).sort("step")
    assert (bounds["low"][1:] >= bounds["high"][:-1]).all()
    # the order of the rows carries no meaning, to the last bit
    again = partition_pairs(scores[data.draw(st.permutations(range(scores.height)))], config)
    assert_frame_equal(again, got, check_exact=True)


@settings(max_examples=40, deadline=None)
@given(scored_pairs())
def test_steps_do_not_depend_on_the_order_inside_them(scores):
    config = PartitionConfig(parts=min(3, scores.height))
    steps = [
        partition_pairs(scores, config.model_copy(update=change)).sort("pair_id").select("pair_id", "step")
        for change in ({}, {"seed": 7}, {"within": "difficulty"})
    ]
    assert steps[0].equals(steps[1])
    assert steps[0].equals(steps[2])
