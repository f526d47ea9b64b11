"""What a step did to its pairs, by hand; what must hold for any step; the alarm on the paper's numbers."""

import math

import numpy as np
import polars as pl
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sdpo_data import PartitionConfig, partition_pairs
from sdpo_data.orders import rearrange
from sdpo_data.tables import LOGP_MARGIN, METRICS, SCORES, SdpoError, check
from sdpo_train.diagnostics import contamination_alarm, diagnose_step, kl_estimate, split_held_out

LENGTHS = {"chosen": [4, 10, 2], "rejected": [4, 5, 2]}


def scored(chosen, rejected, key="key", *, prompts=None, lengths=None, source="s") -> pl.DataFrame:
    count = len(chosen)
    lengths = lengths or {"chosen": [10] * count, "rejected": [10] * count}
    columns = {
        "pair_id": [f"pair-{place}" for place in range(count)],
        "prompt_id": list(prompts or (f"prompt-{place}" for place in range(count))),
        "source": source, "model_key": key, "chosen_logp": chosen, "rejected_logp": rejected,
        "chosen_tokens": lengths["chosen"], "rejected_tokens": lengths["rejected"], "prompt_tokens": 7,
        "truncated": False, "dtype": "float32",
    }  # fmt: skip
    empty = {name: None for name in SCORES if name not in columns}
    return pl.DataFrame(columns | empty, SCORES, orient="col")


# Three pairs, the first two of one prompt. gamma: S 2, -5, -2; reference 3, -4, 0.5; trained 7, 1, -3.
BASE = scored([-10.0, -20.0, -8.0], [-12.0, -15.0, -6.0], "s", prompts="xxy", lengths=LENGTHS)
BEFORE = scored([-9.0, -18.0, -7.0], [-12.0, -14.0, -7.5], "ref", prompts="xxy", lengths=LENGTHS)
AFTER = scored([-11.0, -17.0, -9.0], [-18.0, -18.0, -6.0], "new", prompts="xxy", lengths=LENGTHS)


def diagnose(**changes) -> pl.DataFrame:
    given = {"beta": 0.5, "base": BASE, "before": BEFORE, "after": AFTER, "definition": "logp_margin"}
    return check(diagnose_step("sdpo", 1, 2, 40, **given | changes), METRICS, "metrics")


def values(metrics: pl.DataFrame, update: int) -> dict[str, float]:
    return dict(metrics.filter(update=update).select("name", "value").rows())


def test_a_step_by_hand():
    metrics = diagnose()
    assert metrics.select("arm", "seed", "step").unique().rows() == [("sdpo", 1, 2)]
    assert set(metrics["update"]) == {0, 40}
    got = values(metrics, 40)
    expected = {
        "margin_ref_after": (7 + 1 - 3) / 3,
        "margin_change": (4 + 5 - 3.5) / 3,
        # residues 13/6, 19/6 of prompt x and -16/3 of y: sums 16/3 and -16/3; sqrt(2 * 2 * (16/3)^2) / 3
        "margin_change/stderr": 2 * (16 / 3) / 3,
        "reward_accuracy_after": 2 / 3,
        "step_rewards/chosen": (-1 + 0.5 - 1) / 3,  # beta (logp - reference's): -2, 1, -2 halved
        "step_rewards/rejected": (-3 - 2 + 0.75) / 3,
        "step_rewards/margins": (2 + 2.5 - 1.75) / 3,
        "step_rewards/accuracies": 2 / 3,
        "displacement/chosen": (-2 + 1 - 2) / 3,
        "displacement/rejected": (-6 - 4 + 1.5) / 3,
        "displacement/chosen_fell": 2 / 3,
        "log_ratio_base/chosen": (-1 / 4 + 3 / 10 - 1 / 2) / 3,
        "log_ratio_base/rejected": (-6 / 4 - 3 / 5 + 0) / 3,
        "log_ratio_ref/chosen": (-2 / 4 + 1 / 10 - 2 / 2) / 3,
        "log_ratio_ref/rejected": (-6 / 4 - 4 / 5 + 1.5 / 2) / 3,
        "flipped/to_right": 1 / 3,  # the second: -4 to 1
        "flipped/to_wrong": 1 / 3,  # the third: 0.5 to -3
        "flipped/to_right/pairs": 1,
        "flipped/to_wrong/pairs": 1,
        "drift/kendall_tau": 1 / 3,  # from 1st, 3rd, 2nd to 1st, 2nd, 3rd: two of three pairs keep their order
        "drift/spearman_rho": 1 - 6 * (0 + 1 + 1) / (3 * 8),
        "drift/pairs": 3,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    # sigma of -2, -2.5 and 1.75: 0.119, 0.076, 0.852
    bins = {name: value for name, value in got.items() if name.startswith("weight/") and "stderr" not in name}
    assert {name: value for name, value in bins.items() if value} == pytest.approx(
        {"weight/0.0-0.1": 1 / 3, "weight/0.1-0.2": 1 / 3, "weight/0.8-0.9": 1 / 3}
    )
    assert len(bins) == 10
    start = values(metrics, 0)
    expected = {"margin_base": -5 / 3, "reward_accuracy_base": 1 / 3, "margin_ref_before": -0.5 / 3}
    expected |= {"reward_accuracy_before": 2 / 3, "weight/0.5-0.6": 1.0}  # every weight is exactly 1/2
    assert {name: start[name] for name in expected} == pytest.approx(expected)


def test_where_start_is_not_the_reference_change_is_told_from_the_start():
    got = diagnose(start=BASE)
    # gamma from S's 2, -5, -2 to 7, 1, -3; rewards stay against the reference
    assert values(got, 40)["margin_change"] == pytest.approx((5 + 6 - 1) / 3)
    assert values(got, 40)["flipped/to_wrong"] == 0
    assert values(got, 40)["step_rewards/margins"] == pytest.approx(2.75 / 3)
    # sigma(0.5 (gamma_ref - gamma_S)) = sigma of 0.5, 0.5 and 1.25: 0.622, 0.622, 0.777
    start = values(got, 0)
    assert (start["weight/0.6-0.7"], start["weight/0.7-0.8"]) == pytest.approx((2 / 3, 1 / 3))


def test_means_have_errors_and_what_shows_no_spread_has_none():
    metrics = diagnose()
    of_means = ~pl.col("name").str.contains("^drift/|/pairs$|/stderr$")
    means = metrics.filter(of_means, ~pl.col("name").str.starts_with("weight/") | pl.col("value").is_between(0.1, 0.9))
    assert means.height == 4 + 16 + 3
    assert {f"{name}/stderr" for name in means["name"]} == set(
        metrics["name"].filter(metrics["name"].str.ends_with("/stderr"))
    )
    alone = [frame.head(2) for frame in (BASE, BEFORE, AFTER)]  # one prompt: nothing shows its spread
    got = diagnose(**dict(zip(("base", "before", "after"), alone, strict=True)))
    assert not got["name"].str.ends_with("stderr").any()


def test_pairs_are_met_by_their_id_and_not_by_their_place():
    assert diagnose(after=AFTER.reverse(), base=BASE[[1, 0, 2]]).equals(diagnose())


def test_a_measure_of_sources_drifts_by_the_margin():
    assert diagnose(definition="reward_accuracy").equals(diagnose())


def test_a_difficulty_against_a_second_model_keeps_that_model():
    second = {"against_key": "other", "against_chosen_logp": [-9.0, -19.0, -8.0], "against_rejected_logp": [-9.0] * 3}
    base = BASE.with_columns(**{
        name: pl.lit(value) if isinstance(value, str) else pl.Series(value) for name, value in second.items()
    })  # fmt: skip
    got = values(diagnose(base=base, definition="implicit_reward"), 40)
    # second margins 0, -10, 1: before 3, 6, -0.5, after 7, 11, -4: the same order
    assert got["drift/kendall_tau"] == pytest.approx(1.0)


def test_pairs_of_one_difficulty_have_no_drift():
    same = [frame.with_columns(rejected_logp=pl.col("chosen_logp") - 1) for frame in (BEFORE, AFTER)]
    names = set(diagnose(before=same[0], after=same[1])["name"])
    assert "drift/pairs" in names
    assert not names & {"drift/kendall_tau", "drift/spearman_rho"}


def test_held_out_pairs_and_those_of_earlier_parts_by_hand():
    got = diagnose(held_out=(BASE, AFTER), earlier={1: (BEFORE, AFTER)})
    last, first = values(got, 40), values(got, 0)
    assert first["held_out/margin_before"] == pytest.approx(-5 / 3)
    assert last["held_out/reward_accuracy_change"] == pytest.approx(1 / 3)
    assert first["forgetting/part_1/reward_accuracy_before"] == pytest.approx(2 / 3)
    # right: the second pair becomes so, the third no more. Changes 0, 1 | -1: mean 0, sums 1, -1; sqrt(2 * 2) / 3
    assert last["forgetting/part_1/reward_accuracy_change"] == pytest.approx(0.0)
    assert last["forgetting/part_1/reward_accuracy_change/stderr"] == pytest.approx(2 / 3)
    assert last["forgetting/part_1/margin_change"] == pytest.approx(5.5 / 3)
    assert last["forgetting/part_1/pairs"] == 3


@pytest.mark.parametrize(
    "after, message",
    [
        (AFTER.head(2), r"scores \(after\) and scores \(base\) share 2 pairs of the same tokens, of 2 and 3"),
        (AFTER.with_columns(chosen_tokens=pl.Series([4, 10, 3])), r"Score the same pairs with the same max_length"),
        (AFTER.with_columns(chosen_logp=pl.Series([-1.0, math.nan, -1.0])), r"pair_id 'pair-1' .* are not finite"),
        (AFTER.drop("prompt_id"), r"scores \(after\) is missing column 'prompt_id'"),
    ],
)
def test_what_cannot_be_compared_is_refused(after, message):
    with pytest.raises(SdpoError, match=message):
        diagnose(after=after)


def test_no_pairs_are_no_diagnosis():
    nothing = SCORES.to_frame()
    with pytest.raises(SdpoError, match="no scored pairs"):
        diagnose(base=nothing, before=nothing, after=nothing)


@st.composite
def steps(draw):
    count = draw(st.integers(1, 12))
    logps = st.lists(st.floats(-400, 0), min_size=count, max_size=count)
    prompts = draw(st.lists(st.sampled_from("xyz"), min_size=count, max_size=count))
    return [scored(draw(logps), draw(logps), key, prompts=prompts) for key in ("s", "ref", "new")]


@given(steps(), st.sampled_from([0.01, 0.1, 2.0]))
def test_of_any_step(frames, beta):
    base, before, after = frames
    metrics = diagnose(base=base, before=before, after=after, beta=beta)
    assert metrics["value"].is_finite().all()
    assert not metrics.select("update", "name").is_duplicated().any()
    first, got = values(metrics, 0), values(metrics, 40)
    for update in (first, got):
        assert sum(v for name, v in update.items() if name[:7] == "weight/" and "std" not in name) == pytest.approx(1)
    gap = got["reward_accuracy_after"] - first["reward_accuracy_before"]
    assert got["flipped/to_right"] - got["flipped/to_wrong"] == pytest.approx(gap)
    assert got["step_rewards/margins"] == pytest.approx(got["step_rewards/chosen"] - got["step_rewards/rejected"])
    assert got["step_rewards/margins"] == pytest.approx(beta * got["margin_change"], abs=1e-9)
    # against itself nothing has moved
    still = values(diagnose(base=base, before=before, after=before, beta=beta), 40)
    assert still["margin_change"] == still["displacement/chosen"] == still["flipped/to_wrong"] == 0
    assert still.get("drift/kendall_tau", 1.0) == pytest.approx(1.0)


def test_held_out_pairs_fall_into_the_part_of_their_difficulty():
    trained = scored([-9.0, -9.0, -9.0, -9.0], [-19.0, -14.0, -10.0, -4.0])  # margins 10, 5 | 1, -5
    partition = partition_pairs(trained, PartitionConfig(parts=2, difficulty="logp_margin"))
    held_out = scored([-9.0] * 5, [-60.0, -14.0, -13.0, -10.0, -1.0])  # margins 51, 5, 4, 1, -8
    parts = {part: rows["pair_id"].to_list() for part, rows in split_held_out(held_out, partition).items()}
    # part 1 ends at margin 5: what is harder than that is of part 2, and so is what is harder than all
    assert parts == {1: ["pair-0", "pair-1"], 2: ["pair-2", "pair-3", "pair-4"]}


def test_held_out_pairs_fall_into_the_part_of_their_difficulty_from_hard_to_easy():
    trained = scored([-9.0, -9.0, -9.0, -9.0], [-19.0, -14.0, -10.0, -4.0])  # margins 10, 5 | 1, -5, the last first
    partition = rearrange(partition_pairs(trained, PartitionConfig(parts=2, difficulty="logp_margin")), "hard_to_easy")
    held_out = scored([-9.0] * 5, [-60.0, -14.0, -13.0, -10.0, -1.0])  # margins 51, 5, 4, 1, -8
    parts = split_held_out(held_out, partition, falling=True)
    # part 1 ends at margin 1: what is easier than that is of part 2, and so is what is easier than all
    assert {part: rows["pair_id"].to_list() for part, rows in parts.items()} == {
        1: ["pair-3", "pair-4"], 2: ["pair-0", "pair-1", "pair-2"]
    }  # fmt: skip


def test_held_out_pairs_of_whole_sources_fall_into_the_part_of_their_source():
    easy, hard = scored([-1.0], [-2.0], source="a"), scored([-2.0], [-1.0], source="b")
    both = pl.concat([easy, hard.with_columns(pair_id=pl.lit("other"))])
    partition = partition_pairs(both, PartitionConfig(parts=2, by="source", difficulty="reward_accuracy"))
    held_out = scored([-9.0, -1.0], [-1.0, -9.0], source="b")
    assert {part: rows.height for part, rows in split_held_out(held_out, partition).items()} == {2: 2}
    with pytest.raises(SdpoError, match="held-out pairs of source 'c' have no part"):
        split_held_out(held_out.with_columns(source=pl.lit("c")), partition)


def test_kl_by_hand():
    # log ratios 0, log 2, -log 2: k1 0; k3 = e^-r - 1 + r: 0, 1/2 - 1 + log 2, 2 - 1 - log 2; mean 1/6
    got = kl_estimate([-5.0, -4.0, -3.0], [-5.0, -4.0 - math.log(2), -3.0 + math.log(2)])
    assert (got["k1"], got["k3"], got["samples"]) == pytest.approx((0.0, 1 / 6, 3))
    assert got["k1/stderr"] == pytest.approx(math.log(2) / math.sqrt(3))  # deviations 0, +-log 2: sd log 2
    assert "k1/stderr" not in kl_estimate([-5.0, -4.0], [-5.0, -3.0], ["same", "same"])


def test_kl_of_samples_is_the_kl():
    """Answers drawn from p, known q: both estimates are within three errors of the sum over all answers."""
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.3, 0.3, 0.2, 0.2])
    exact = scipy.stats.entropy(p, q)
    drawn = np.random.default_rng(0).choice(4, 4000, p=p)
    got = kl_estimate(np.log(p[drawn]).tolist(), np.log(q[drawn]).tolist())
    assert abs(got["k1"] - exact) < 3 * got["k1/stderr"]
    assert abs(got["k3"] - exact) < 3 * got["k3/stderr"] < 3 * got["k1/stderr"]


@pytest.mark.parametrize(
    "policy, reference, message",
    [
        ([], [], "there are 0 of the policy"),
        ([-1.0], [-1.0, -2.0], "1 of the policy, 2 of the reference, 1 prompts"),
        ([-1.0, -math.inf], [-1.0, -2.0], "Answer 1 has a log-probability that is not finite"),
    ],
)
def test_kl_of_what_is_no_sample_is_refused(policy, reference, message):
    with pytest.raises(SdpoError, match=message):
        kl_estimate(policy, reference)


def drawn_scores(mean, spread, key="s", *, count=600, seed=0, tokens=(280, 250)) -> pl.DataFrame:
    """Pairs whose gamma is normal; answers about as long as UltraFeedback's."""
    gamma = np.random.default_rng(seed).normal(mean, spread, count)
    rejected = np.full(count, -300.0)
    lengths = {side: [length] * count for side, length in zip(("chosen", "rejected"), tokens, strict=True)}
    return scored((rejected + gamma - 250).tolist(), (rejected - 250).tolist(), key, lengths=lengths)


@pytest.mark.parametrize("spread", [30.0, 60.0, 120.0, 220.0])
def test_the_alarm_on_the_papers_numbers(spread):
    """Mean gamma on UltraFeedback: S -38.6, M_1 -25.1 (no alarm), M_2 +84.35, trained on it (alarm)."""
    s = drawn_scores(-38.6, spread)
    first, second = (
        s.with_columns(chosen_logp=pl.col("chosen_logp") + mean + 38.6, model_key=pl.lit(key))
        for mean, key in ((-25.1, "m1"), (84.35, "m2"))
    )
    assert contamination_alarm(first, s) is None
    said = contamination_alarm(second, s)
    assert said is not None
    mean = second.select(LOGP_MARGIN.mean()).item()
    assert f"by {mean:+.1f} nats" in said
    assert "a median rise of 122.9" in said or "a median rise of 123.0" in said


def test_the_alarm_is_not_moved_by_a_few_wild_pairs():
    s = drawn_scores(-38.6, 60.0)
    wild = pl.when(pl.int_range(pl.len()) < 60).then(5000.0).otherwise(0.0)
    some = s.with_columns(rejected_logp=pl.col("rejected_logp") - wild, model_key=pl.lit("m"))
    assert some.select(LOGP_MARGIN.mean()).item() > 400
    assert contamination_alarm(some, s) is None
    # nor do wild pairs of S, whose standard deviation is then 1,500 nats, silence it
    s = drawn_scores(-38.6, 120.0)
    rude = s.with_columns(rejected_logp=pl.col("rejected_logp") - wild)
    lifted = rude.with_columns(chosen_logp=pl.col("chosen_logp") + 120, model_key=pl.lit("m"))
    assert contamination_alarm(lifted, rude) is not None


def test_the_alarm_without_another_s_is_for_nearly_all_right():
    ordinary, suspect = drawn_scores(5.0, 60.0), drawn_scores(150.0, 60.0)
    assert contamination_alarm(ordinary) is None
    said = contamination_alarm(suspect)
    assert said is not None
    assert said.startswith("The reference is right about 9")
    assert contamination_alarm(suspect, suspect) == said  # S as its own reference is no other model
    assert contamination_alarm(suspect.head(12)) is None  # too few to be sure
    # short chosen answers are right by sum alone: no alarm
    short = scored([-60.0] * 200, [-110.0] * 200, lengths={"chosen": [40] * 200, "rejected": [100] * 200})
    assert contamination_alarm(short) is None
