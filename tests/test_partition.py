import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from sdpo_data.cards import count_edge_pairs, describe_edges, describe_partition
from sdpo_data.config import read_command
from sdpo_data.difficulty import DIFFICULTIES
from sdpo_data.partition import (
    PartitionConfig,
    main,
    partition_pairs,
)
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
    # pairs sorted by difficulty get the places of numpy's permutation; easiest-first would be a d b | c e
    for seed in (0, 1):
        places = dict(zip("adbce", np.random.default_rng(seed).permutation(5), strict=True))
        expected = sorted("adb", key=places.get) + sorted("ce", key=places.get)
        assert partition_pairs(scores, PartitionConfig(seed=seed))["pair_id"].to_list() == expected
    orders = {tuple(partition_pairs(scores, PartitionConfig(seed=seed))["pair_id"]) for seed in range(9)}
    assert len(orders) > 4


def test_description_of_the_parts_by_hand(scores):
    # step 1 = a d b, step 2 = c e; tokens: 2 x prompt + chosen + rejected
    #   a 14 + 6, d 20 + 17, b 16 + 7: 80 tokens; c 18 + 5, e 22 + 5: 50
    # margins a +1, d -9, b -3: accuracy 1/3, median -3; c +1, e +4: accuracy 1, median 2.5
    got = describe_partition(partition_pairs(scores, PartitionConfig()), scores).parts
    columns = ["step", "pairs", "tokens", "sources", "easiest", "median", "hardest", "reward_accuracy", "margin_q50"]
    assert got.select(columns).rows() == [
        (1, 3, 80, "math 2, chat 1", -3.0, -1.0, 0.0, 1 / 3, -3.0),
        (2, 2, 50, "chat 2", 1.0, 1.875, 2.75, 1.0, 2.5),
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


def test_pairs_by_an_expression_by_hand(scores):
    # |margin| per prompt token a 1/7, b 3/8, c 1/9, d 9/10, e 4/11: c a | e b d by floor(2 r / 5) is c a e | b d
    text = "abs(chosen_logp - rejected_logp) / prompt_tokens"
    assert ordered(scores, difficulty=text) == [("c", 1), ("a", 1), ("e", 1), ("b", 2), ("d", 2)]
    assert partition_pairs(scores, PartitionConfig(difficulty=text))["definition"].unique().to_list() == [text]


def test_sources_by_an_expression_are_ranked_by_its_mean_over_all_pairs(scores):
    # tokens above the mean of all chosen tokens, 23/5: math (4 + 4)/2 - 4.6 = -0.6, chat (2 + 12 + 1)/3 - 4.6 = 0.4
    # (above the mean of their own source both would be 0)
    got = partition_pairs(scores, PartitionConfig(by="source", difficulty="chosen_tokens - avg(chosen_tokens)"))
    by_source = dict(got.select("source", "difficulty").unique().rows())
    assert by_source == pytest.approx({"math": -0.6, "chat": 0.4})


@pytest.mark.parametrize("text", ["chosen_logp - FIRST(chosen_logp)", "row_number() OVER (ORDER BY truncated)"])
def test_an_expression_that_looks_at_other_rows_does_not_see_their_order(scores, text):
    got = [partition_pairs(rows, PartitionConfig(difficulty=text)) for rows in (scores, scores.reverse())]
    assert_frame_equal(*got)


@pytest.mark.parametrize("name", DIFFICULTIES)
def test_the_help_of_the_setting_names_every_definition(name):
    assert name in str(PartitionConfig.model_fields["difficulty"].description)


@pytest.mark.parametrize("written", [["--difficulty", "ln(prompt_tokens)"], ["--difficulty=-abs(chosen_logp)"]])
def test_an_expression_comes_through_the_command_line_as_it_is(written, tmp_path):
    call = read_command("partition", "", "partition", {"partition": PartitionConfig}, [str(tmp_path), *written])
    assert call.settings["partition"].difficulty == written[-1].removeprefix("--difficulty=")


def test_edges_against_the_noise_band_by_hand(scores):
    # margin_per_token in 3 steps: a -3, d -1 | b 0, c 1 | e 2.75; edges (-1 + 0)/2 and (1 + 2.75)/2
    # band 0.9: |d + .5| .5, |b + .5| .5 are within, a 2.5 and c 1.5 not; c .875 and e .875 are within, b 1.875 not
    partition = partition_pairs(scores, PartitionConfig(parts=3))
    assert describe_edges(partition, 0.9).rows() == [("1 | 2", -0.5, 1, 0.2, 1, 0.2), ("2 | 3", 1.875, 1, 0.2, 1, 0.2)]
    assert count_edge_pairs(partition, 0.9) == 4
    # band 1.875: c is 1.5 and b 1.875 from either edge: counted once
    assert describe_edges(partition, 1.875)["harder_pairs"].to_list() == [2, 1]
    assert describe_edges(partition, 1.875)["easier_pairs"].to_list() == [1, 2]
    assert count_edge_pairs(partition, 1.875) == 4
    assert count_edge_pairs(partition, 0.0) == 0


def test_a_tie_that_an_edge_cuts_counts_without_any_noise(scores):
    tied = scores.with_columns(chosen_logp=pl.lit(-8.0), rejected_logp=pl.lit(-7.0))
    assert count_edge_pairs(partition_pairs(tied, PartitionConfig(difficulty="logp_margin")), 0.0) == 5


def test_one_part_has_no_edge(scores):
    partition = partition_pairs(scores, PartitionConfig(parts=1))
    assert describe_edges(partition, 9.0).is_empty()
    assert count_edge_pairs(partition, 9.0) == 0


@given(scored_pairs(), st.integers(1, 4), st.floats(0, 5), st.floats(0, 5))
def test_more_noise_never_frees_a_pair_and_no_pair_counts_twice(frame, parts, one, other):
    partition = partition_pairs(frame, PartitionConfig(parts=min(parts, frame.height)))
    low, high = (count_edge_pairs(partition, band) for band in sorted((one, other)))
    assert low <= high <= frame.height


@pytest.fixture
def command(scores, pairs, tmp_path, monkeypatch):
    """Run main on the hand-made scores; the second value it gives counts how often scores were asked for."""
    asked = []

    def make_scores(call, given):
        asked.append(given)
        with call.run.stage("scores", {}) as stage:
            return stage.write("scores", scores)

    monkeypatch.setattr("sdpo_data.partition.make_pairs", lambda call: pairs)
    monkeypatch.setattr("sdpo_data.partition.make_scores", make_scores)

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["partition", str(tmp_path / "run"), *flags])
        main()

    return run, asked, tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sum(chosen_logp)", r"gives 1 value\(s\) for 3 pairs"),
        ("chosen_lopg + 1", r"names 'chosen_lopg', which SCORES does not have"),
        (
            "implicit_reward",
            r"needs the log-probabilities of a second model, but score\.against is None\. Name a model",
        ),
        ("rating_gap", r"needs the judge's ratings, which 8 of 8 pairs lack \(4 of source 'even', 4 of source 'odd'\)"),
    ],
)
def test_what_no_scores_can_mend_is_refused_before_scoring(command, name, said):
    run, asked, _ = command
    with pytest.raises(SdpoError, match=said):
        run("--difficulty", name)
    assert asked == []


def test_the_command_explains_every_pair_that_is_missing(command, scores, caplog):
    run, _, folder = command
    run("--drop-hardest", "0.2", "--hold-out", "0.34")
    dropped, held = pl.read_parquet(folder / "dropped.parquet"), pl.read_parquet(folder / "held_out_parts.parquet")
    made = pl.read_parquet(folder / "partition.parquet")
    assert sorted([*made["pair_id"], *dropped.filter(stage="partition")["pair_id"]]) == list("abcde")
    assert held.height == 0  # of two prompts in each step a third is none
    run("--force", "--drop-hardest", "0", "--hold-out", "0.5")  # step 1 a d b, step 2 c e: one of each
    dropped, held = pl.read_parquet(folder / "dropped.parquet"), pl.read_parquet(folder / "held_out_parts.parquet")
    assert dropped["reason"].sort().to_list() == ["held out of step 1", "held out of step 2"]
    assert sorted(held["pair_id"]) == sorted(dropped["pair_id"])
    run("--force", "--hold-out", "0")
    assert not (folder / "held_out_parts.parquet").exists()
    assert pl.read_parquet(folder / "dropped.parquet").is_empty()


def test_another_content_of_a_file_is_another_partition(command, pairs, tmp_path):
    run, _, folder = command
    own = tmp_path / "own.csv"
    own.write_text(
        "pair_id,mine\n" + "".join(f"{pair},{place}\n" for place, pair in enumerate([*"abcde", *pairs["pair_id"]]))
    )
    run("--difficulty", f"{own}:mine")
    run("--difficulty", f"{own}:mine")
    assert pl.read_parquet(folder / "partition.parquet").filter(step=1)["pair_id"].sort().to_list() == list("abc")
    own.write_text(own.read_text().replace("a,0", "a,9"))
    with pytest.raises(SdpoError, match=r"partition was made with .*own\.csv:mine = "):
        run("--difficulty", f"{own}:mine")


def test_a_unit_that_is_none_is_refused_before_scoring(command):
    run, asked, _ = command
    with pytest.raises(SdpoError, match=r"partition\.by 'topic' is no unit\. There are: pair, prompt, pair_id, "):
        run("--by", "topic")
    assert asked == []


def test_the_command_shows_the_edges_where_there_is_a_noise_table(command, scores, capsys):
    # chosen -0.5 nats for all: per token 1/8, 1/8, 1/4, 1/24, 1/2; sorted, place 0.95 * 4 = 3.8: 1/4 + 0.8 / 4 = 0.45;
    # the default's one edge lies between b 0 and c 1: 0.5 away from both, so no pair is near; twice as noisy, both are
    run, _, folder = command
    run()
    assert "noise" not in capsys.readouterr().out
    bands = {-0.5: "noise band 0.45 nats per token (95 % of 5 re-scored pairs): 0 of 5", -1.0: "pairs): 2 of 5"}
    for seed, (nats, said) in enumerate(bands.items(), 1):
        scores.with_columns(pl.col("chosen_logp") + nats).write_parquet(folder / "noise.parquet")
        run("--force", "--seed", str(seed))
        out = capsys.readouterr().out
        assert f"{said} pairs could be on the other side of an edge" in out
        assert "1 | 2" in out
    scores.with_columns(model_key=pl.lit("old")).write_parquet(folder / "noise.parquet")
    run("--force", "--seed", "3")
    assert "noise band unknown: Re-scored pairs are not of the same scores (pair_id 'a'" in capsys.readouterr().out
    run("--force", "--by", "source")
    assert "noise" not in capsys.readouterr().out  # of single pairs: it says nothing of a source's mean
