import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from sdpo_data.orders import (
    accumulate,
    drop_easiest,
    drop_hardest,
    drop_suspect,
    merge_steps,
    order_within,
    rearrange,
)
from sdpo_data.partition import PartitionConfig, partition_pairs
from sdpo_data.tables import PARTITION, SdpoError, check


@pytest.fixture
def partition(scores) -> pl.DataFrame:
    """Margin per token: a -3, d -1, b 0 in step 1, c 1, e 2.75 in step 2; easiest first inside."""
    return partition_pairs(scores, PartitionConfig(within="difficulty"))


def steps(partition: pl.DataFrame) -> list[tuple[str, int]]:
    return partition.select("pair_id", "step").rows()


def test_hard_to_easy_keeps_the_sizes_of_the_steps(partition):
    got = rearrange(partition, "hard_to_easy", within="difficulty")
    # falling: e 2.75, c 1, b 0 | d -1, a -3; inside a step easiest first
    assert steps(got) == [("b", 1), ("c", 1), ("e", 1), ("a", 2), ("d", 2)]
    assert got["rank"].to_list() == [0, 1, 2, 3, 4]
    assert steps(rearrange(got, "easy_to_hard", within="difficulty")) == steps(partition)


def test_ties_stay_in_the_step_they_were_in(partition):
    tied = partition.with_columns(difficulty=pl.lit(1.0))
    assert set(steps(rearrange(tied, "easy_to_hard"))) == set(steps(partition))
    # hard to easy takes the last step first: c e, then of step 1 a; then b d
    got = dict(steps(rearrange(tied, "hard_to_easy")))
    assert got == {"c": 1, "e": 1, "a": 1, "b": 2, "d": 2}


def test_by_token_difference_by_hand(partition, scores):
    # chosen - rejected tokens: a 2, b 1, c -1, d 7, e -3: e c b | a d
    got = dict(steps(rearrange(partition, "token_difference", scores=scores)))
    assert got == {"e": 1, "c": 1, "b": 1, "a": 2, "d": 2}


def test_length_groups_by_hand(partition, scores):
    # prompt + longer answer: a 7 + 4 = 11, b 8 + 4 = 12, c 9 + 3 = 12, d 10 + 12 = 22, e 11 + 4 = 15
    # one step, groups of two: a with one of b c, the other with e, d alone, whatever the draw
    one = merge_steps(partition)
    seen = set()
    for seed in range(20):
        got = order_within(one, "length", seed=seed, scores=scores, group=2)["pair_id"].to_list()
        place = got.index("d")
        rest = [pair for pair in got if pair != "d"]
        assert place in (0, 2, 4)
        groups = {frozenset(rest[:2]), frozenset(rest[2:])}
        assert groups in ({frozenset("ab"), frozenset("ce")}, {frozenset("ac"), frozenset("be")})
        seen.add(tuple(got))
    assert len(seen) > 4


def test_random_draws_pairs_by_the_seed(partition):
    fillings = {
        frozenset(p for p, s in steps(rearrange(partition, "random", seed=seed)) if s == 1) for seed in range(40)
    }
    assert len(fillings) > 7  # of the 10 ways to choose 3 of 5
    assert all(len(filling) == 3 for filling in fillings)


def test_the_order_inside_the_steps_of_random_is_not_that_which_filled_them(scores):
    # one step: filled and shuffled by the same draw it would always come out as it was drawn
    one = partition_pairs(scores, PartitionConfig(parts=1))
    drawn = [rearrange(one, "random", seed=seed)["pair_id"].to_list() for seed in range(5)]
    expected = [sorted("abcde", key=dict(zip("adbce", np.random.default_rng(s).permutation(5), strict=True)).get)
                for s in range(5)]  # fmt: skip
    assert drawn == expected


def test_accumulated_steps_by_hand(partition):
    got = check(accumulate(partition), PARTITION, "partition")
    assert sorted(steps(got)) == sorted([*zip("adb", [1] * 3, strict=True), *zip("adbce", [2] * 5, strict=True)])
    assert got["rank"].to_list() == list(range(8))
    assert got["step"].is_sorted()
    with pytest.raises(SdpoError, match=r"3 pair\(s\) in several steps, e\.g\. 'a'\. Rearrange and drop before"):
        accumulate(got)
    assert sorted(merge_steps(got)["pair_id"]) == list("abcde")


def test_what_is_dropped_by_hand(partition, scores):
    # 0.4 of 5 is 2: without c e, three are left; place r of 3 to that of floor(5 r / 3) = 0 1 3 of 1 1 1 2 2
    assert dict(steps(drop_hardest(partition, 0.4))) == {"a": 1, "d": 1, "b": 2}
    assert dict(steps(drop_easiest(partition, 0.4))) == {"b": 1, "c": 1, "e": 2}
    assert dict(steps(drop_hardest(partition, 0.19))) == dict(steps(partition))
    # margin per token: c -1, e -2.75 are under -0.5; at -1 exactly c stays: 4 left, floor(5 r / 4) = 0 1 2 3
    assert dict(steps(drop_suspect(partition, scores, -0.5))) == {"a": 1, "d": 1, "b": 2}
    assert dict(steps(drop_suspect(partition, scores, -1.0))) == {"a": 1, "d": 1, "b": 1, "c": 2}


def test_equally_hard_pairs_are_dropped_by_their_ids(partition):
    tied = partition.with_columns(difficulty=pl.lit(1.0))
    assert sorted(drop_hardest(tied, 0.4)["pair_id"]) == ["a", "b", "c"]
    assert sorted(drop_easiest(tied, 0.4)["pair_id"]) == ["c", "d", "e"]


def test_what_cannot_be_is_refused(partition, scores):
    with pytest.raises(SdpoError, match=r"The share of pairs to drop is 1\.0\. Give one of at least 0 and below 1"):
        drop_hardest(partition, 1.0)
    with pytest.raises(SdpoError, match=r"Of 5 pairs 1 are left, and step 2 would have none\. Drop fewer pairs"):
        drop_hardest(partition, 0.8)
    with pytest.raises(SdpoError, match=r"Of 5 pairs 0 are left, and step 1 would have none"):
        drop_suspect(partition, scores, 9.0)
    with pytest.raises(SdpoError, match=r"'token_difference' looks at the tokens of the answers: give the scores"):
        rearrange(partition, "token_difference")
    with pytest.raises(SdpoError, match=r"2 pair\(s\) of the partition have no scores, e\.g\. 'd'"):
        order_within(partition, "length", scores=scores.head(3))
    with pytest.raises(SdpoError, match=r"in several steps"):
        rearrange(accumulate(partition), "random")


def test_a_pair_may_stand_in_several_steps_but_not_twice_in_one(partition):
    twice = pl.concat([accumulate(partition), partition.filter(pl.col("step") == 2)])
    with pytest.raises(SdpoError, match=r"partition has 2 repeated pair_id\(s\), e\.g\. '[ce]' in step 2"):
        check(twice, PARTITION, "partition")


@st.composite
def partitions(draw) -> pl.DataFrame:
    row = st.tuples(st.integers(1, 4), st.sampled_from("xyz"), st.integers(-3, 3))
    rows = draw(st.lists(row, min_size=1, max_size=60))
    steps = sorted({step for step, *_ in rows})
    frame = pl.DataFrame(
        [(f"p{i:02}", source, steps.index(s) + 1, i, float(d), "made") for i, (s, source, d) in enumerate(rows)],
        PARTITION,
        orient="row",
    )
    return frame[draw(st.permutations(range(frame.height)))]


ORDERS = ("easy_to_hard", "hard_to_easy", "random", "stratified")


@settings(max_examples=40, deadline=None)
@given(partitions(), st.sampled_from(ORDERS), st.integers(0, 3), st.data())
def test_every_order_keeps_pairs_and_sizes_and_knows_no_row_order(frame, order, seed, data):
    got = check(rearrange(frame, order, seed=seed), PARTITION, "partition")
    kept = ["pair_id", "source", "difficulty", "definition"]
    assert_frame_equal(got.select(kept).sort("pair_id"), frame.select(kept).sort("pair_id"))
    assert_frame_equal(got.group_by("step").len().sort("step"), frame.group_by("step").len().sort("step"))
    assert got["rank"].to_list() == list(range(frame.height))
    assert got["step"].is_sorted()
    shuffled = frame[data.draw(st.permutations(range(frame.height)))]
    assert_frame_equal(rearrange(shuffled, order, seed=seed), got)
    ends = got.group_by("step").agg(low=pl.min("difficulty"), high=pl.max("difficulty")).sort("step")
    if order == "easy_to_hard":
        assert (ends["low"][1:] >= ends["high"][:-1]).all()
    if order == "hard_to_easy":
        assert (ends["high"][1:] <= ends["low"][:-1]).all()


@settings(max_examples=100, deadline=None)
@given(partitions(), st.integers(0, 9))
def test_stratified_steps_have_the_mix_of_the_whole(frame, seed):
    got = rearrange(frame, "stratified", seed=seed)
    n, sizes = frame.height, dict(frame.group_by("step").len().rows())
    ranges = got.sort("source", "difficulty", "pair_id")
    for source in "xyz":
        of_source = ranges.filter(pl.col("source") == source)
        for end in range(of_source.height + 1):
            easiest = of_source.head(end)
            for step, size in sizes.items():
                count = easiest.filter(pl.col("step") == step).height
                assert abs(count - end * size / n) < 2 + 2 * len(sizes) * size / n


def test_stratified_steps_are_far_more_alike_than_random_ones():
    # 1,200 pairs in steps of 300 and 900: a twelfth of [0, 1) is 25 stretches of step 1 and 75 of step 2, so of every
    # 100 neighbours by source and difficulty just 25 are in step 1; random steps have a deviation of 4.1 there
    rows = [(f"p{i:04}", "xy"[i % 2], 1 + (i >= 300), i, i / 7, "made") for i in range(1200)]
    frame = pl.DataFrame(rows, PARTITION, orient="row")
    counts = {"stratified": [], "random": []}
    for order, found in counts.items():
        for seed in range(20):
            got = rearrange(frame, order, seed=seed).sort("source", "difficulty")
            found += [part.filter(pl.col("step") == 1).height for part in got.iter_slices(100)]
    assert set(counts["stratified"]) == {25}
    assert max(abs(count - 25) for count in counts["random"]) > 6
    first, second = (rearrange(frame, "stratified", seed=seed).filter(pl.col("step") == 1) for seed in (0, 1))
    assert first.join(second, on="pair_id").height < 150  # drawn anew by every seed, not dealt in turn


@settings(max_examples=40, deadline=None)
@given(partitions(), st.floats(0, 0.6), st.data())
def test_what_drops_takes_the_hardest_and_keeps_the_proportions(frame, share, data):
    frame = rearrange(frame, "easy_to_hard")
    sizes, left = dict(frame.group_by("step").len().rows()), frame.height - int(share * frame.height)
    if left < frame.height / min(sizes.values()):  # a step may get none
        return
    got = check(drop_hardest(frame, share), PARTITION, "partition")
    gone = frame.join(got, on="pair_id", how="anti")
    assert gone.height == int(share * frame.height)
    assert gone.height + got.height == frame.height
    if gone.height:
        assert gone["difficulty"].min() >= got["difficulty"].max()
    for step, size in sizes.items():
        now = got.filter(pl.col("step") == step).height
        assert abs(now - size * got.height / frame.height) < 1
    shuffled = frame[data.draw(st.permutations(range(frame.height)))]
    assert_frame_equal(drop_hardest(shuffled, share), got)
