"""Units, cuts, drops and held-out prompts: what `partition_pairs` can do beside its defaults."""

import logging

import polars as pl
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from sdpo_data.config import read_command
from sdpo_data.orders import rearrange
from sdpo_data.partition import PartitionConfig, divide_pairs, partition_pairs
from sdpo_data.tables import DROPPED, PARTITION, SdpoError, check
from tests.test_partition import scored_pairs


def steps(scores, **config) -> dict[str, int]:
    return dict(partition_pairs(scores, PartitionConfig(**config)).sort("pair_id").select("pair_id", "step").rows())


def expected(*parts: str) -> dict[str, int]:
    return {pair: step for step, part in enumerate(parts, 1) for pair in part}


# margin per token: a -3, d -1, b 0, c 1, e 2.75; tokens (2 prompt + chosen + rejected): a 20, d 37, b 23, c 23, e 27


def test_equal_tokens_by_hand(scores):
    # before each: a 0, d 20, b 57, c 80, e 103 of 130; in 2 parts: below 65 is step 1
    assert steps(scores, cut="tokens") == expected("adb", "ce")
    # in 3: edges 43.3 and 86.7
    assert steps(scores, cut="tokens", parts=3) == expected("ad", "bc", "e")


def test_shares_by_hand(scores):
    assert steps(scores, cut="shares", at=[0.2, 0.8]) == expected("a", "dbce")
    assert steps(scores, cut="shares", at=[0.5, 0.5]) == expected("adb", "ce")  # the third pair begins below 2.5
    assert steps(scores, cut="shares", at=[0.6, 0.2, 0.2], parts=3) == expected("adb", "c", "e")


def test_a_share_is_not_missed_by_what_floats_make_of_it(scores):
    # 0.1 + 0.2 is above 0.3: without care the fourth of ten pairs would still be in step 2
    ten = pl.concat([scores, scores.with_columns(pl.col("pair_id").str.to_uppercase())])
    got = partition_pairs(ten, PartitionConfig(cut="shares", at=[0.1, 0.2, 0.7], parts=3))
    assert got["step"].value_counts().sort("step")["count"].to_list() == [1, 2, 7]


def test_quantiles_and_thresholds_by_hand(scores):
    # the median is b 0 itself: it belongs to the harder part
    assert steps(scores, cut="quantiles", at=[0.5]) == expected("ad", "bce")
    # quantile 0.9 lies at place 3.6 of 0 to 4: 1 + 0.6 * 1.75 = 2.05
    assert steps(scores, cut="quantiles", at=[0.5, 0.9], parts=3) == expected("ad", "bc", "e")
    assert steps(scores, cut="thresholds", at=[-1.0]) == expected("a", "dbce")
    assert steps(scores, cut="thresholds", at=[-1.5, 0.5], parts=3) == expected("a", "db", "ce")


def test_by_value_hard_to_easy_turns_whole_parts_round(scores):
    assert steps(scores, cut="thresholds", at=[-1.0], order="hard_to_easy") == expected("dbce", "a")
    # by rank the steps are cut after turning: hardest first e c b | d a, and the share of step 1 stays 0.2
    assert steps(scores, order="hard_to_easy") == expected("ecb", "da")
    assert steps(scores, cut="shares", at=[0.2, 0.8], order="hard_to_easy") == expected("e", "abcd")


def test_clusters_by_hand(scores):
    # in one dimension the best two clusters of -3 -1 0 1 2.75 leave the least sum of squares:
    # a | rest 7.67, ad | bce 2 + 3.875, adb | ce 4.67 + 1.53 = 6.20: ad | bce
    assert steps(scores, cut="kmeans") == expected("ad", "bce")
    # with chosen tokens a 4, b 4, c 2, d 12, e 1, and their squares, all scaled to a deviation of 1, d stands alone:
    # squares of a b c e sum to 4.69 + 0.45 + 0.06, of ad and bce 1.58 + 2.44 + 2.83; d's mean -1 is below their 0.19
    further = ["chosen_tokens", "chosen_tokens * chosen_tokens"]
    assert steps(scores, cut="kmeans", cluster_on=further) == expected("d", "abce")
    # a unit of measurement says nothing: scaled, ad and bce leave 4.02, d and the others 5.13
    assert steps(scores, cut="kmeans", cluster_on=["1000 * chosen_tokens"]) == expected("ad", "bce")
    # nor does what is the same for all
    assert steps(scores, cut="kmeans", cluster_on=["0 * chosen_tokens"]) == expected("ad", "bce")


def test_too_few_points_are_no_clusters(scores):
    same = scores.with_columns(chosen_logp=pl.lit(-8.0), rejected_logp=pl.lit(-7.0))
    with pytest.raises(SdpoError, match=r"cut kmeans: 1 different point\(s\) cannot be 2 clusters\. Lower partition"):
        partition_pairs(same, PartitionConfig(cut="kmeans", difficulty="logp_margin"))


@pytest.fixture
def prompts(scores) -> pl.DataFrame:
    """a and e share a prompt: its mean difficulty is -0.125, between d -1 and b 0."""
    return scores.with_columns(prompt_id=pl.col("pair_id").replace({"e": "qa", "a": "qa"}))


def test_prompts_stay_whole_by_hand(prompts):
    # units d, qa (a e), b, c: two each
    got = partition_pairs(prompts, PartitionConfig(by="prompt"))
    assert dict(got.select("pair_id", "step").rows()) == expected("dae", "bc")
    assert dict(got.select("pair_id", "difficulty").rows()) == {"a": -0.125, "e": -0.125, "b": 0, "c": 1, "d": -1}
    # equal pairs in 3: before each d 0, qa 1, b 3, c 4; times 3 // 5: 0 0 1 2
    assert steps(prompts, by="prompt", cut="pairs", parts=3) == expected("dae", "b", "c")
    assert steps(prompts, by="prompt", order="hard_to_easy") == expected("cb", "dae")


def test_any_column_is_a_unit(scores, caplog):
    by_flag = steps(scores, by="truncated")  # d true -1; the others false (-3 + 0 + 1 + 2.75) / 4 = 0.1875
    assert by_flag == expected("d", "abce")
    pairs = pl.DataFrame({"pair_id": list("edcba"), "topic": ["x", "y", "x", "y", "y"]})  # y: a b d -4/3; x: c e 1.875
    got = partition_pairs(scores, PartitionConfig(by="topic"), pairs=pairs)
    assert dict(got.select("pair_id", "step").rows()) == expected("abd", "ce")
    with pytest.raises(
        SdpoError, match=r"partition\.by 'topic' is no unit\. .*of a column of PAIRS give the pairs too"
    ):
        partition_pairs(scores, PartitionConfig(by="topic"))
    twice = pl.concat([pairs, pairs.with_columns(topic=pl.lit("z"))])
    with pytest.raises(SdpoError, match=r"pairs has several values of 'topic' for pair_id 'a'"):
        partition_pairs(scores, PartitionConfig(by="topic"), pairs=twice)
    with pytest.raises(SdpoError, match=r"'topic' has no value for 2 of 5 pairs, e\.g\. pair_id 'd'"):
        partition_pairs(scores, PartitionConfig(by="topic"), pairs=pairs.tail(3))


def test_sources_in_an_order_given_by_hand(scores):
    given = {"by": "source", "order": "given", "difficulty": "reward_accuracy"}
    assert steps(scores, source_order=["math", "chat"], **given) == expected("ab", "cde")
    assert steps(scores, source_order=["chat", "math"], **given) == expected("cde", "ab")
    with pytest.raises(SdpoError, match=r"source_order is \['math'\], but the sources are \['chat', 'math'\]"):
        partition_pairs(scores, PartitionConfig(source_order=["math"], **given))


@pytest.mark.parametrize("order", ["random", "stratified", "token_difference"])
def test_a_controls_steps_are_those_of_rearranging_the_partition(scores, order):
    plain = partition_pairs(scores, PartitionConfig(seed=3))
    got = partition_pairs(scores, PartitionConfig(order=order, seed=3))
    assert_frame_equal(got, rearrange(plain, order, seed=3, scores=scores))


def test_what_is_left_out_by_hand(scores):
    # without e, of the hardest 0.2 of 5; then a d | b c
    got = divide_pairs(scores, PartitionConfig(drop_hardest=0.2))
    assert dict(got.partition.select("pair_id", "step").rows()) == expected("ad", "bc")
    assert got.dropped.select("pair_id", "stage", "reason").rows() == [("e", "partition", "of the hardest 1 pair(s)")]
    got = divide_pairs(scores, PartitionConfig(drop_hardest=0.2, drop_easiest=0.4))
    assert dict(got.partition.select("pair_id", "step").rows()) == expected("b", "c")
    assert sorted(got.dropped["pair_id"]) == ["a", "d", "e"]
    # per token c -1 and e -2.75 are below -0.9; half of the three left is one pair
    got = divide_pairs(scores, PartitionConfig(drop_suspect=-0.9, drop_hardest=0.5))
    assert dict(got.dropped.select("pair_id", "reason").rows()) == {
        "c": "margin per token below -0.9 nats",
        "e": "margin per token below -0.9 nats",
        "b": "of the hardest 1 pair(s)",
    }
    check(got.dropped, DROPPED, "dropped")


def test_where_nothing_is_left_it_is_said(scores):
    with pytest.raises(SdpoError, match=r"No pair is left to be cut into steps\. Score more pairs, or leave fewer"):
        partition_pairs(scores, PartitionConfig(drop_suspect=99.0))


def test_clusters_do_not_look_at_what_only_an_order_needs(scores):
    order = rearrange(partition_pairs(scores, PartitionConfig(cut="kmeans")), "token_difference", scores=scores)
    got = partition_pairs(scores, PartitionConfig(cut="kmeans", order="token_difference"))
    assert_frame_equal(got, order)


def test_what_is_left_out_is_said(scores, caplog):
    with caplog.at_level(logging.INFO):
        partition_pairs(scores, PartitionConfig(drop_easiest=0.4))
    assert "left out 2 of 5 pairs: of the easiest 2 pair(s)" in caplog.text


def test_held_out_prompts_leave_with_all_their_pairs(prompts):
    # step 1 a d b, step 2 c e: prompts of step 1 are qa (a, and e of step 2), q4, q2; of step 2 q3.
    # 0.5 of 3 prompts is 1, of 1 none
    seen = set()
    for seed in range(20):
        got = divide_pairs(prompts, PartitionConfig(hold_out=0.5, seed=seed))
        check(got.held_out, PARTITION, "held out")
        gone = dict(got.held_out.select("pair_id", "step").rows())
        assert gone in ({"a": 1, "e": 2}, {"d": 1}, {"b": 1})
        assert dict(got.dropped.select("pair_id", "reason").rows()) == {
            pair: f"held out of step {step}" for pair, step in gone.items()
        }
        seen.add(frozenset(gone))
    assert len(seen) == 3


def test_cumulative_steps(scores):
    got = partition_pairs(scores, PartitionConfig(cumulative=True, within="difficulty"))
    assert got.select("step", "pair_id").rows() == [*((1, p) for p in "adb"), *((2, p) for p in "adbce")]


def test_a_part_that_is_too_small_is_refused(scores):
    with pytest.raises(
        SdpoError,
        match=r"cut thresholds leaves step 2 with 0 pair\(s\), fewer than partition\.min_pairs 1; difficulty runs "
        r"from -3 to 2\.75\. Move the edges in partition\.at",
    ):
        partition_pairs(scores, PartitionConfig(cut="thresholds", at=[5.0]))
    with pytest.raises(
        SdpoError, match=r"step 2 with 2 pair\(s\), fewer than partition\.min_pairs 3.*Lower partition\.p"
    ):
        partition_pairs(scores, PartitionConfig(min_pairs=3))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"cut": "shares"}, r"cut shares in 2 parts takes 2 number\(s\) in at, not \[\]"),
        ({"at": [0.5]}, r"cut equal in 2 parts takes 0 number\(s\) in at, not \[0\.5\]"),
        ({"cut": "shares", "at": [0.5, 0.6]}, r"the shares in at are above 0 and sum to 1, not \[0\.5, 0\.6\]"),
        ({"cut": "shares", "at": [1.5, -0.5]}, r"the shares in at are above 0"),
        ({"cut": "thresholds", "at": [2.0, 1.0], "parts": 3}, r"the edges in at rise, not \[2\.0, 1\.0\]"),
        ({"cut": "quantiles", "at": [50.0]}, r"quantiles lie between 0 and 1, not \[50\.0\]"),
        ({"cluster_on": ["risk"]}, r"cluster_on is read by cut kmeans alone"),
        ({"order": "given", "by": "source"}, r"order given and source_order go together"),
        ({"source_order": ["a"]}, r"order given and source_order go together"),
        ({"order": "given", "source_order": ["a"]}, r"order given takes by source"),
        ({"drop_hardest": 0.5, "drop_easiest": 0.5}, r"together leave nothing"),
        ({"min_pairs": 0}, r"greater than or equal to 1"),
        ({"at": [float("nan")], "cut": "thresholds"}, r"finite number"),
    ],
)
def test_settings_that_do_not_go_together(config, said):
    with pytest.raises(pydantic.ValidationError, match=said):
        PartitionConfig(**config)


@pytest.fixture
def own_file(tmp_path):
    """Write a table; give the definition that reads its column `mine`."""

    def write(rows: dict, name: str = "own.csv") -> str:
        path = tmp_path / name
        frame = pl.DataFrame(rows)
        frame.write_csv(path) if name.endswith(".csv") else frame.write_parquet(path)
        return f"{path}:mine"

    return write


@pytest.mark.parametrize("name", ["own.csv", "own.parquet"])
def test_a_difficulty_from_a_file_of_ones_own(scores, own_file, name):
    definition = own_file({"pair_id": list("xedcba"), "mine": [9.0, 1, 2, 3, 4, 5]}, name)
    got = partition_pairs(scores, PartitionConfig(difficulty=definition))
    assert dict(got.select("pair_id", "step").rows()) == expected("edc", "ba")
    assert got["definition"].unique().to_list() == [definition]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            {"pair_id": list("abcd"), "mine": [1, 2, 3, 4]},
            r"has no number for 1 of 5 pairs, e\.g\. pair_id 'e'\. Add th",
        ),
        (
            {"pair_id": list("abcde"), "mine": [1, None, 3, None, 5]},
            r"has no number for 2 of 5 pairs, e\.g\. pair_id 'b'",
        ),
        ({"pair_id": list("abcde"), "mine": [1.0, 2.0, float("inf"), 4.0, 5.0]}, r"has inf for 1 of 5 pairs"),
        ({"pair_id": list("abcdea"), "mine": [1, 2, 3, 4, 5, 6]}, r"own\.parquet repeats pair_id 'a'"),
        ({"pair_id": list("abcde"), "mine": list("vwxyz")}, r"gives String, not a number"),
        (
            {"pair_id": list("abcde"), "other": [1, 2, 3, 4, 5]},
            r"own\.parquet has no column 'mine'\. It has: pair_id, oth",
        ),
        (
            {"id": list("abcde"), "mine": [1, 2, 3, 4, 5]},
            r"has no column 'pair_id'\. It has: id, mine; it needs pair_id",
        ),
    ],
)
def test_a_file_that_does_not_say_it_of_every_pair_is_refused(scores, own_file, rows, said):
    with pytest.raises(SdpoError, match=said):
        partition_pairs(scores, PartitionConfig(difficulty=own_file(rows, "own.parquet")))


def test_a_file_that_is_none(scores, tmp_path):
    with pytest.raises(SdpoError, match=r"there is no file .*no\.csv\. Write FILE\.parquet:COLUMN"):
        partition_pairs(scores, PartitionConfig(difficulty=f"{tmp_path}/no.csv:mine"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SdpoError, match=r"broken\.parquet cannot be read \("):
        partition_pairs(scores, PartitionConfig(difficulty=f"{tmp_path}/broken.parquet:mine"))


@st.composite
def configs(draw, pairs: int) -> PartitionConfig:
    parts = draw(st.integers(1, 3))
    cut = draw(st.sampled_from(["equal", "pairs", "tokens", "shares", "quantiles", "thresholds"]))
    rising = sorted(draw(st.lists(st.floats(0.05, 0.95), min_size=parts - 1, max_size=parts - 1, unique=True)))
    weights = draw(st.lists(st.floats(0.2, 1), min_size=parts, max_size=parts))
    at = {"shares": [weight / sum(weights) for weight in weights], "quantiles": rising, "thresholds": rising}
    return PartitionConfig(
        parts=parts,
        by=draw(st.sampled_from(["pair", "prompt", "source", "chosen_tokens"])),
        cut=cut,
        at=at.get(cut, []),
        order=draw(st.sampled_from(["easy_to_hard", "hard_to_easy", "random", "stratified", "token_difference"])),
        within=draw(st.sampled_from(["shuffle", "difficulty", "length"])),
        drop_hardest=draw(st.sampled_from([0.0, 0.1, 0.4])),
        drop_easiest=draw(st.sampled_from([0.0, 0.2])),
        drop_suspect=draw(st.sampled_from([None, -50.0, 0.0])),
        hold_out=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 3)),
    )


@settings(max_examples=80, deadline=None)
@given(scored_pairs(), st.data())
def test_every_pair_is_in_one_step_or_dropped_with_a_reason(scores, data):
    scores = scores.with_columns(prompt_id=pl.col("prompt_id").str.slice(0, 2))  # ten prompts at most
    config = data.draw(configs(scores.height))
    try:
        got = divide_pairs(scores, config)
    except SdpoError as error:
        said = str(error)
        why = ("Cannot cut", "fewer than partition.min_pairs", "No pair is left")
        assert any(reason in said for reason in why)
        return
    partition, dropped = check(got.partition, PARTITION, "partition"), check(got.dropped, DROPPED, "dropped")
    # rows in = rows out + rows dropped
    assert sorted([*partition["pair_id"], *dropped["pair_id"]]) == sorted(scores["pair_id"])
    assert sorted(partition["step"].unique()) == list(range(1, config.parts + 1))
    assert partition["rank"].to_list() == list(range(partition.height))
    assert got.held_out.height == dropped.filter(pl.col("reason").str.starts_with("held out")).height
    unit = {"pair": "pair_id", "prompt": "prompt_id"}.get(config.by, config.by)
    keys = scores.select("pair_id", "prompt_id", _unit=unit)
    # no unit in two steps, no prompt both held out and trained on
    where = partition.join(keys, on="pair_id").group_by("_unit").agg(pl.col("step").n_unique())
    assert (where["step"] == 1).all()
    both = [frame.select("pair_id").join(keys, on="pair_id")["prompt_id"] for frame in (partition, got.held_out)]
    assert not set(both[0]) & set(both[1])
    ends = partition.group_by("step").agg(low=pl.min("difficulty"), high=pl.max("difficulty")).sort("step")
    if config.order == "easy_to_hard":
        assert (ends["low"][1:] >= ends["high"][:-1]).all()
    if config.order == "hard_to_easy":
        assert (ends["high"][1:] <= ends["low"][:-1]).all()
    again = divide_pairs(scores[data.draw(st.permutations(range(scores.height)))], config)
    assert_frame_equal(again.partition, partition, check_exact=True)
    assert_frame_equal(again.dropped.sort("pair_id"), dropped.sort("pair_id"))


@settings(max_examples=40, deadline=None)
@given(scored_pairs(), st.integers(1, 4), st.data())
def test_weighted_cuts_are_off_by_no_more_than_the_largest_unit(scores, parts, data):
    by = data.draw(st.sampled_from(["pair", "source"]))
    tokens = scores.select(
        "pair_id", size=2 * pl.col("prompt_tokens") + pl.col("chosen_tokens") + pl.col("rejected_tokens")
    )
    try:
        got = partition_pairs(scores, PartitionConfig(parts=parts, by=by, cut="tokens"))
    except SdpoError:
        return
    units = {
        "pair": tokens["size"].max(),
        "source": scores.join(tokens, on="pair_id").group_by("source").agg(pl.sum("size"))["size"].max(),
    }
    sums = got.join(tokens, on="pair_id").group_by("step").agg(pl.sum("size"))["size"]
    assert (sums - tokens["size"].sum() / parts).abs().max() <= units[by]


def test_numbers_come_through_the_command_line_whatever_their_sign(tmp_path):
    flags = ["--parts", "3", "--cut", "thresholds", "--at", "-1", "0.5", "--drop-suspect", "-2", "--by", "prompt"]
    call = read_command("partition", "", "partition", {"partition": PartitionConfig}, [str(tmp_path), *flags])
    config = PartitionConfig(parts=3, cut="thresholds", at=[-1.0, 0.5], drop_suspect=-2.0, by="prompt")
    assert call.settings["partition"] == config
