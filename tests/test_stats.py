import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpo_eval.stats import macro_mean_stderr, mean_of_means, mean_stderr

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


def test_mean_stderr_by_hand():
    # mean (1 + 0 + 0 + 1 + 1) / 5 = 3/5; squares 2 * (3/5)^2 + 3 * (2/5)^2 = 30/25; s^2 = 30/25 / 4 = 3/10; / 5 = 3/50
    assert mean_stderr([1, 0, 0, 1, 1]) == pytest.approx((0.6, math.sqrt(3 / 50)))


def test_one_value_has_no_standard_error():
    assert mean_stderr([7.0]) == (7.0, None)
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
    assert mean_stderr([0, 0, 0, 0]) == (0, None)
    assert macro_mean_stderr([0, 0, 0, 0], ["a", "a", "b", "b"]) == (0, None)


def test_strata_without_spread_take_the_variance_of_all():
    # a: 1, 0: mean 1/2; b: 0, 0, 0. All: mean 1/5, s^2 = (16/25 + 4 * 1/25) / 4 = 1/5. SE^2: a 1/10, b 1/15.
    # mean (1/2 + 0) / 2 = 1/4; SE = sqrt(1/10 + 1/15) / 2 = sqrt(1/6) / 2
    got = macro_mean_stderr([1, 0, 0, 0, 0], ["a", "a", "b", "b", "b"])
    assert got == pytest.approx((1 / 4, math.sqrt(1 / 6) / 2))


def test_strata_of_one_take_the_variance_of_all():
    # a: 1, 0; b: 1; c: 1. All: mean 3/4, s^2 = (3/16 + 9/16) / 3 = 1/4. SE^2: a 1/8, b 1/4, c 1/4, together 5/8.
    # mean (1/2 + 1 + 1) / 3 = 5/6; SE = sqrt(5/8) / 3
    assert macro_mean_stderr([1, 0, 1, 1], ["a", "a", "b", "c"]) == pytest.approx((5 / 6, math.sqrt(5 / 8) / 3))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_one_stratum_or_one_value_in_each_is_the_plain_mean(values):
    plain = mean_stderr(values)
    assert macro_mean_stderr(values, ["a"] * len(values)) == pytest.approx(plain)
    assert macro_mean_stderr(values, range(len(values))) == pytest.approx(plain, abs=1e-9)
