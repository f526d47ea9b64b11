import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sdpo_eval.stats import (
    Differences,
    compare_checkpoints,
    compare_methods,
    detectable_difference,
    holm,
    judge,
    macro_mean_stderr,
    mcnemar,
    mean_of_means,
    questions_needed,
)

# arXiv 2403.19270, table 2: ARC, HellaSwag, MMLU, TruthfulQA, printed H4
TABLE_2 = {
    "SOLAR 10.7B + SFT + sDPO": (71.33, 88.08, 65.39, 72.45, 74.31),
    "SOLAR 10.7B + SFT + DPO": (69.62, 87.16, 66.00, 67.90, 72.67),
    "Mixtral 8x7B-Instruct-v0.1": (70.22, 87.63, 71.16, 64.58, 73.40),
    "SOLAR-0-70B-16bit": (71.08, 87.89, 70.58, 62.25, 72.95),  # printed 72.93, a slip: its parts give 72.95
    "Falcon 180B": (69.45, 88.86, 70.50, 45.47, 68.57),
    "Mistral 7B": (59.98, 83.31, 64.16, 42.15, 62.40),
    "SOLAR 10.7B + SFT + sDPO Rand.": (69.20, 87.27, 65.96, 67.81, 72.56),
}


@pytest.mark.parametrize("model", TABLE_2)
def test_h4_is_the_mean_the_paper_prints(model):
    *tasks, printed = TABLE_2[model]
    assert mean_of_means(tasks, [None] * 4)[0] == pytest.approx(printed, abs=0.0051)  # printed to two digits


def test_a_plain_mean_by_hand():
    # mean (1 + 0 + 0 + 1 + 1) / 5 = 3/5; squares 2 * (3/5)^2 + 3 * (2/5)^2 = 30/25; s^2 = 30/25 / 4 = 3/10; / 5 = 3/50
    assert macro_mean_stderr([1, 0, 0, 1, 1]) == pytest.approx((0.6, math.sqrt(3 / 50)))


def test_one_value_has_no_standard_error():
    assert macro_mean_stderr([7.0]) == (7.0, None)
    assert macro_mean_stderr([7.0], ["a"]) == (7.0, None)


def test_mean_of_means_by_hand():
    # (1 + 2 + 6) / 3 = 3; sqrt(2^2 + 3^2 + 6^2) / 3 = sqrt(49) / 3 = 7/3
    assert mean_of_means([1, 2, 6], [2, 3, 6]) == pytest.approx((3, 7 / 3))


def test_mean_of_means_knows_no_error_where_one_is_unknown():
    assert mean_of_means([1, 2, 6], [2, None, 6]) == (3, None)


def test_macro_mean_by_hand():
    # a: 1, 0, 0, 1: mean 1/2, s^2 = 1/3, SE^2 = 1/12.   b: 1, 1, 0: mean 2/3, s^2 = 1/3, SE^2 = 1/9.
    # mean (1/2 + 2/3) / 2 = 7/12, where the micro mean is 4/7; SE = sqrt(1/12 + 1/9) / 2 = sqrt(7/36) / 2
    got = macro_mean_stderr([1, 1, 0, 1, 0, 0, 1], ["a", "b", "a", "b", "b", "a", "a"])
    assert got == pytest.approx((7 / 12, math.sqrt(7 / 36) / 2))


def test_differences_between_strata_are_no_error():
    # a: 0, 2: mean 1, SE 1.   b: 100, 104: mean 102, SE 2.   mean 51.5; SE = sqrt(1 + 4) / 2
    got = macro_mean_stderr([0, 100, 2, 104], ["a", "b", "a", "b"])
    assert got == pytest.approx((51.5, math.sqrt(5) / 2))


def test_equal_values_are_not_taken_for_certainty():
    assert macro_mean_stderr([0, 0, 0, 0]) == (0, None)
    assert macro_mean_stderr([0, 0, 0, 0], ["a", "a", "b", "b"]) == (0, None)


def test_strata_without_spread_take_the_variance_of_all():
    # a: 1, 0: mean 1/2; b: 0, 0, 0. All: mean 1/5, s^2 = (16/25 + 4 * 1/25) / 4 = 1/5. SE^2: a 1/10, b 1/15.
    # mean (1/2 + 0) / 2 = 1/4; SE = sqrt(1/10 + 1/15) / 2 = sqrt(1/6) / 2
    got = macro_mean_stderr([1, 0, 0, 0, 0], ["a", "a", "b", "b", "b"])
    assert got == pytest.approx((1 / 4, math.sqrt(1 / 6) / 2))


def test_values_of_a_cluster_are_one_draw_of_the_mean():
    # x: 0, 1; y: 3, 4; mean 2; residues of the sums x -3, y +3; SE = sqrt(2 / 1 * 18) / 4 = 1.5; unclustered 0.91
    assert macro_mean_stderr([0, 3, 1, 4], clusters=["x", "y", "x", "y"]) == pytest.approx((2, 1.5))
    assert macro_mean_stderr([0, 3, 1, 4])[1] == pytest.approx(math.sqrt(10 / 3) / 2)


def test_strata_of_one_take_the_variance_of_all():
    # a: 1, 0; b: 1; c: 1. All: mean 3/4, s^2 = (3/16 + 9/16) / 3 = 1/4. SE^2: a 1/8, b 1/4, c 1/4, together 5/8.
    # mean (1/2 + 1 + 1) / 3 = 5/6; SE = sqrt(5/8) / 3
    assert macro_mean_stderr([1, 0, 1, 1], ["a", "a", "b", "c"]) == pytest.approx((5 / 6, math.sqrt(5 / 8) / 3))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_one_stratum_or_one_value_in_each_is_the_plain_mean(values):
    assume(np.ptp(values) > 1e-6)
    plain = (np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values)))
    assert macro_mean_stderr(values) == pytest.approx(plain)
    assert macro_mean_stderr(values, ["a"] * len(values)) == pytest.approx(plain)
    assert macro_mean_stderr(values, range(len(values))) == pytest.approx(plain, abs=1e-9)


# --- two checkpoints ------------------------------------------------------------------------


def test_a_bootstrap_by_hand():
    # 3 of 4 questions are answered alike, one better by 4: mean 1. Drawn residues are -1 (3 of 4) or +3, stretched by
    # sqrt(4 / 3); with k threes among 4 draws the mean moves by (4k - 4) / 4 * sqrt(4/3) = (k - 1) * 1.1547.
    # k = 0 has probability (3/4)^4 = 0.316: both tails beyond 0 are P(1 - 1.1547 <= 0) = 0.316; p = 2 * 0.316 = 0.633.
    # P(k >= 3) = 4 * 3/256 + 1/256 = 0.0508, P(k = 4) = 0.0039: the 97.5 % point is k = 3, 1 + 2 * 1.1547 = 3.309.
    # s^2 = (3 * 1 + 9) / 3 = 4, SE = sqrt(4 / 4) = 1.
    got = compare_checkpoints([Differences.of([0, 4, 0, 0])])
    assert (got.value, got.stderr, got.n, got.seeds) == (1, pytest.approx(1), 4, 1)
    assert got.p == pytest.approx(2 * 0.75**4, abs=0.02)
    assert (got.low, got.high) == (pytest.approx(1 - math.sqrt(4 / 3)), pytest.approx(1 + 2 * math.sqrt(4 / 3)))


def test_clusters_count_as_one_draw():
    # mean 2; residues of the clusters (0, 4): (0 - 2) + (1 - 2) = -3 and (3 - 2) + (4 - 2) = +3, so
    # SE = sqrt(2 / (2 - 1) * (9 + 9)) / 4 = 6 / 4. Unclustered: s^2 = (4 + 1 + 1 + 4) / 3, SE = sqrt(10 / 12) = 0.91.
    got = compare_checkpoints([Differences.of([0, 3, 1, 4], clusters=["a", "b", "a", "b"])])
    assert (got.value, got.stderr) == (2, pytest.approx(1.5))


def test_h4_of_differences_by_hand():
    # task 1: mean 1, SE 1 (above). Task 2, strata a: 0, 2 (mean 1, SE 1), b: 5, 9 (mean 7, SE 2): mean 4,
    # SE sqrt(1 + 4) / 2. Both: (1 + 4) / 2; sqrt(1 + 5/4) / 2 = 3/4
    tasks = [Differences.of([0, 4, 0, 0]), Differences.of([0, 5, 2, 9], ["a", "b", "a", "b"])]
    got = compare_checkpoints(tasks)
    assert (got.value, got.stderr, got.n) == (2.5, pytest.approx(0.75), 8)
    assert got.detectable == pytest.approx(0.75 * (1.95996 + 0.84162), rel=1e-4)


few_kinds = st.lists(st.sampled_from([-100.0, 0.0, 100.0]), min_size=2, max_size=60)
many_kinds = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=2, max_size=60)


def textbook(values, groups):
    """Mean of the strata's means; sqrt(sum of s^2 / n) / k, with s of all values where one stratum has none."""
    parts = [[value for value, own in zip(values, groups, strict=True) if own == group] for group in set(groups)]
    spreads = [float(np.std(part, ddof=1)) if len(set(part)) > 1 else 0 for part in parts]
    if 0 in spreads:
        own = float(np.std(values, ddof=1)) if len(set(values)) > 1 else 0  # numpy rounds three of 21.844 apart
        spreads = [own] * len(parts)
    error = math.hypot(*(spread / len(part) ** 0.5 for spread, part in zip(spreads, parts, strict=True))) / len(parts)
    return np.mean([np.mean(part) for part in parts]), error or None


@given(few_kinds | many_kinds, st.integers(1, 4))
def test_what_is_drawn_spreads_as_the_formula_says(values, strata):
    """Against the textbook's formula written out; and the draws against both."""
    groups = [place % strata for place in range(len(values))]
    got = compare_checkpoints([Differences.of(values, groups)], resamples=1500)
    value, stderr = macro_mean_stderr(values, groups)
    assert (value, stderr) == pytest.approx(textbook(values, groups))
    assert got.value == pytest.approx(value)
    if stderr is None or stderr < 1e-6:
        return
    assert got.stderr == pytest.approx(stderr)
    assert got.low <= value + 1e-9
    assert got.high >= value - 1e-9
    assert got.high - got.low <= 2 * 3.5 * stderr  # 95 % lie within 4.47 SE of the mean whatever the shape


@pytest.mark.parametrize("kinds", [[-1.0, 0.0, 2.0], np.linspace(-1, 2, 50)])  # drawn by counting, and one by one
def test_draws_spread_by_the_standard_error(kinds):
    # of a normal mean, which 300 questions make it, the interval is 2 * 1.96 SE wide; 10,000 draws know it to 2 %
    got = compare_checkpoints([Differences.of(np.resize(kinds, 300), np.arange(300) % 3)])
    assert (got.high - got.low) / got.stderr == pytest.approx(2 * 1.96, rel=0.03)


@given(few_kinds, st.randoms(use_true_random=False))
def test_the_order_of_the_questions_is_nothing(values, random):
    questions = [(value, place % 3) for place, value in enumerate(values)]
    shuffled = random.sample(questions, len(questions))
    one, two = (
        compare_checkpoints([Differences.of(*zip(*q, strict=True))], resamples=200) for q in (questions, shuffled)
    )
    assert one == pytest.approx(two) if one.stderr is None else one.low == pytest.approx(two.low)


def test_turning_a_comparison_round_turns_its_sign():
    one, two = (compare_checkpoints([Differences.of(np.resize([sign, 0, sign, -sign, 0], 90))]) for sign in (1, -1))
    assert (one.value, one.stderr) == (-two.value, two.stderr)
    assert (one.p, one.low) == (pytest.approx(two.p, abs=0.01), pytest.approx(-two.high, abs=0.01))


def test_equal_answers_prove_nothing():
    for values in ([0.0] * 9, [100.0], [100.0, 100.0]):
        got = compare_checkpoints([Differences.of(values), Differences.of([1, 2])])
        assert (got.stderr, got.low, got.high, got.p, got.detectable) == (None,) * 5
        assert judge(got.value, got.p) == "not distinguishable"


def test_arrays_that_disagree():
    with pytest.raises(ValueError, match=r"values are \(1, 2\), but there are 3 strata and 2 clusters"):
        Differences.of([1, 2], ["a", "b", "c"])


# --- two methods ----------------------------------------------------------------------------


def test_seeds_crossed_with_questions_by_hand():
    # seeds' means 1, 2, 6 (mean 3): s^2 = (4 + 1 + 9) / 2 = 7, V_seed = 7/3.
    # questions' means 4, 2 (mean 3): s^2 = 2, V_question = 2/2 = 1.
    # rest, value - seed's mean - question's mean + 3: seed 1: 0 - 1 - 4 + 3 = -2, +2; seed 2: +1, -1; seed 3: +1, -1;
    # squares 8 + 2 + 2 = 12 over (3 - 1)(2 - 1) is 6, over 3 * 2 questions: V_rest = 1.
    # V = 7/3 + 1 - 1 = 7/3. df = V^2 / (V_seed^2 / 2 + V_question^2 / 1) = (49/9) / (49/18 + 1) = 98/67.
    got = compare_methods([Differences.of([[0, 2], [4, 0], [8, 4]])])
    assert (got.value, got.stderr, got.n, got.seeds) == (3, pytest.approx(math.sqrt(7 / 3)), 2, 3)
    freedom = 98 / 67
    from scipy.stats import t  # the quantiles alone are scipy's

    assert got.high - 3 == pytest.approx(t.ppf(0.975, freedom) * math.sqrt(7 / 3))
    assert got.p == pytest.approx(2 * t.sf(3 / math.sqrt(7 / 3), freedom))
    assert got.detectable == pytest.approx((t.ppf(0.975, freedom) + t.ppf(0.8, freedom)) * math.sqrt(7 / 3))


def test_equal_seeds_leave_the_questions_error():
    # no seed noise: V_seed = V_rest = 0, what is left is the questions' standard error
    values = np.resize([1.0, 0.0, 4.0], 30)
    got = compare_methods([Differences.of([values] * 5)])
    assert got.stderr == pytest.approx(macro_mean_stderr(values)[1])


def test_questions_alike_leave_the_seeds_error():
    # every seed moves all questions alike: Student's t on the seeds' means 1 2 3 4 5, s^2 = 2.5, SE = sqrt(0.5), df 4
    questions = np.resize([-1e-3, 1e-3], 40)  # spread enough to be known, too little to count
    got = compare_methods([Differences.of(np.arange(1, 6)[:, None] + questions)])
    assert got.stderr == pytest.approx(math.sqrt(0.5), rel=1e-4)
    assert got.high - got.value == pytest.approx(2.776 * math.sqrt(0.5), rel=1e-3)  # t(0.975, 4) of any table


def test_one_seed_is_no_method():
    with pytest.raises(ValueError, match="One seed says nothing of other seeds"):
        compare_methods([Differences.of([1, 2, 3])])


# --- small parts ----------------------------------------------------------------------------


def test_mcnemar_by_hand():
    # 1 against 4: two-sided exact 2 * (1 + 5) / 32 = 0.375; mid-p takes off one P(1 of 5) = 5/32: 7/32
    assert mcnemar(1, 4) == pytest.approx(7 / 32)
    assert mcnemar(4, 1) == pytest.approx(7 / 32)
    assert mcnemar(0, 3) == 1 / 8  # 2 * 1/8 - 1/8
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1


def test_holm_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04; the last may not be below the one before: .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_nothing_and_bonferroni(p_values):
    for p, adjusted in zip(p_values, holm(p_values), strict=True):
        assert p <= adjusted <= min(1, p * len(p_values))


def test_what_can_be_found_by_hand():
    # z(0.975) + z(0.8) = 1.95996 + 0.84162 = 2.80159
    assert detectable_difference(0.5) == pytest.approx(1.40079, rel=1e-4)
    # half the difference takes four times the questions; 100 * (2.80159 * 0.5 / 0.7)^2 = 400.45
    assert questions_needed(0.5, 100, 0.7) == 401


def test_a_verdict_is_read_off_p():
    assert judge(-1.0, 0.01) == "worse"
    assert judge(-1.0, 0.06) == judge(1.0, None) == "not distinguishable"
    assert judge(1.0, 0.04) == "better"
