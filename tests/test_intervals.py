import polars as pl
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sdpo_data.intervals import clustered_means, compare_shares, effective_size, wilson_interval


def means(right: list[int], prompts: str) -> dict:
    values = pl.DataFrame({"source": "s", "prompt_id": list(prompts), "share": [bool(one) for one in right]})
    table = clustered_means(values, ["source"]).with_columns(size=effective_size("share"))
    low, high = wilson_interval(pl.col("share"), pl.col("size"))
    return table.with_columns(low=low, high=high).row(0, named=True)


def test_a_clustered_error_and_its_effective_size_by_hand():
    # 1 1 0 | 0 of prompts x x x | y: mean 1/2, residues 1/2 1/2 -1/2 | -1/2, prompts' sums 1/2 and -1/2;
    # SE^2 = 2/1 * (1/4 + 1/4) / 4^2 = 1/16; effective size 1/4 / (1/16) = 4
    got = means([1, 1, 0, 0], "xxxy")
    assert (got["share"], got["share_stderr"], got["n"], got["clusters"], got["size"]) == (0.5, 0.25, 4, 2, 4.0)
    # 1 1 1 | 0: mean 3/4, sums 3/4 and -3/4, SE^2 = 2 * (9/8) / 16 = 9/64; 3/16 / (9/64) = 4/3, and not 4
    assert means([1, 1, 1, 0], "xxxy")["size"] == pytest.approx(4 / 3)


def test_prompts_that_balance_themselves_are_no_proof():
    # one right and one wrong of each prompt: no spread between prompts, SE 0, and still only 4 pairs
    got = means([1, 0, 0, 1], "xxyy")
    assert (got["share_stderr"], got["size"]) == (0.0, 4.0)


@pytest.mark.parametrize(("right", "prompts", "size"), [([1] * 5, "xxyyz", 3), ([0] * 3, "xyy", 2), ([1, 0], "xx", 1)])
def test_without_spread_or_with_one_prompt_the_size_is_the_number_of_prompts(right, prompts, size):
    assert means(right, prompts)["size"] == size


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(2, 4))
def test_saying_a_prompt_again_makes_nothing_surer(right, times):
    prompts = "abcdefghijkl"[: len(right)]
    once, again = means(right, prompts), means(right * times, prompts * times)
    assert (again["low"], again["high"]) == pytest.approx((once["low"], once["high"]))


@given(st.integers(1, 300), st.data())
def test_the_interval_of_a_whole_number_of_draws_is_scipys(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson_interval(pl.lit(k / n), pl.lit(float(n)))
    oracle = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert pl.select(low=low, high=high).row(0) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


@given(st.integers(1, 200), st.integers(1, 200), st.data())
def test_the_test_of_two_whole_numbers_of_draws_is_scipys(n, m, data):
    k, j = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    got = compare_shares((k / n, n), (j / m, m))
    if 0 < k + j < n + m:
        oracle = scipy.stats.chi2_contingency([[k, n - k], [j, m - j]], correction=False).pvalue
        assert got == pytest.approx(oracle, abs=1e-9)
    else:
        assert got == 1.0
