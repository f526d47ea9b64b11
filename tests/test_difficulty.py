import math

import polars as pl
import pytest

from sdpo_data.difficulty import DIFFICULTIES, describe_scores, difficulty_named, length_correlation, unclear_orders
from sdpo_data.tables import SdpoError


def test_every_difficulty_by_hand(scores):
    # the conftest's margins, turned round: higher is harder
    got = scores.select(**{name: difficulty.expression for name, difficulty in DIFFICULTIES.items()})
    assert got["logp_margin"].to_list() == [-1.0, 3.0, -1.0, 9.0, -4.0]
    assert got["margin_per_token"].to_list() == [-3.0, 0.0, 1.0, -1.0, 2.75]
    assert got["reward_accuracy"].to_list() == [0.0, 1.0, 0.0, 1.0, 0.0]  # its mean is 1 - reward accuracy


def test_a_tie_of_the_log_probabilities_is_a_wrong_pair(scores):
    # reward accuracy is a strict >: with a's rejected answer as likely as the chosen one, a is wrong
    tied = scores.with_columns(rejected_logp="chosen_logp")
    assert tied.select(DIFFICULTIES["reward_accuracy"].expression.mean()).item() == 1.0


@pytest.mark.parametrize("name", sorted(set(DIFFICULTIES) - {"risk"}))  # |margin|: both ways are risky
def test_a_likelier_chosen_answer_is_never_harder(name, scores):
    expression = DIFFICULTIES[name].expression
    easier = scores.with_columns(pl.col("chosen_logp") + 2.5).select(expression).to_series()
    assert (easier <= scores.select(expression).to_series()).all()


@pytest.mark.parametrize("name", DIFFICULTIES)
def test_a_difficulty_says_its_unit_and_its_source(name):
    assert DIFFICULTIES[name].unit
    assert "arXiv" in DIFFICULTIES[name].source


def test_an_unknown_difficulty_is_refused_with_all_there_are():
    with pytest.raises(
        SdpoError,
        match=r"partition\.difficulty 'lenght' is not defined\. There are: margin_per_token, logp_margin, reward_acc",
    ):
        difficulty_named("lenght")


def test_description_of_the_sources_by_hand(scores):
    # per source: reward accuracy chat 2/3, math 1/2; per token above 0: chat d of c d e, math a of a b;
    # mean margin chat (1 - 9 + 4)/3, math (1 - 3)/2; longer chosen: chat only d (12 > 5), math both.
    # Every pair has a prompt of its own: SE^2 = G/(G-1) p (1-p) / G, so the effective pairs are G - 1: 2 and 1.
    # Wilson, z = 1.95996, z^2 = 3.84146, (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n):
    #   chat p 2/3, n 2: (0.66667 + 0.96036 -+ 1.95996 * 0.59262) / 2.92073 = 0.55706 -+ 0.39768; p 1/3 mirrors it
    #   math p 1/2, n 1: (0.5 + 1.92073 -+ 1.95996 * 1.10017) / 4.84146 = 0.5 -+ 0.44538
    # chat's margins 1 -9 4 against its token differences -1 7 -3: opposite orders; math's two pairs are too few
    got = describe_scores(scores)
    chat = ("chat", 3, 3, 2 / 3, 0.15938, 0.95474, 1 / 3, 0.04526, 0.84062, 2.0, -4 / 3, 1 / 3, -1.0)
    math_ = ("math", 2, 2, 1 / 2, 0.05462, 0.94538, 1 / 2, 0.05462, 0.94538, 1.0, -1.0, 1.0, None)
    for row, expected in zip(got.rows(), (chat, math_), strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    accuracies = [f"{name}{end}" for name in ("reward_accuracy", "per_token") for end in ("", "_low", "_high")]
    others = ["effective_pairs", "mean_margin", "longer_chosen", "length_rho"]
    assert got.columns == ["source", "pairs", "prompts", *accuracies, *others]


def test_sources_whose_order_may_be_chance_are_named_with_the_p_value(scores):
    # chat 2/3 at 2 effective pairs, math 1/2 at 1: pooled 11/18, variance 11/18 * 7/18 * (1/2 + 1) = 0.35648,
    # z = (1/6) / 0.59706 = 0.27915: two-sided 0.780
    [line] = unclear_orders(describe_scores(scores))
    told = "reward accuracy does not tell chat (0.667) from math (0.500)"
    assert line == f"{told}: p = 0.78 (two-sided, clustered by prompt)"


def repeated(row: pl.DataFrame, source: str, pairs: int, prompts: int) -> pl.DataFrame:
    return pl.concat([row] * pairs).with_columns(
        source=pl.lit(source),
        pair_id=pl.format("{}{}", pl.lit(source), pl.int_range(pl.len())),
        prompt_id=pl.format("{}{}", pl.lit(source), pl.int_range(pl.len()) % prompts),
    )


def test_sources_whose_order_is_clear_go_without_remark_unless_few_prompts_are_behind_it(scores):
    # all right against all wrong, 4 prompts each: pooled 1/2, variance 1/4 * 2/4 = 1/8, z = sqrt(8): p = 0.005;
    # of 1 prompt each, the same 12 pairs: variance 1/2, z = sqrt(2): p = 0.157
    right, wrong = scores.filter(pair_id="a"), scores.filter(pair_id="b")
    for prompts, said in ((4, []), (1, ["p = 0.16"])):
        both = pl.concat([repeated(right, "chat", 12, prompts), repeated(wrong, "math", 12, prompts)])
        lines = list(unclear_orders(describe_scores(both)))
        assert len(lines) == len(said)
        assert all(part in line for part, line in zip(said, lines, strict=True))


def test_length_correlation_by_hand(scores):
    # token differences a 2, b 1, c -1, d 7, e -3: ranks 4 3 2 5 1, from their mean +1 0 -1 +2 -2
    # logp_margin -1 3 -1 9 -4: ranks 2.5 4 2.5 5 1, from their mean -.5 +1 -.5 +2 -2
    #   products -.5 + 0 + .5 + 4 + 4 = 8, squares 10 and 9.5: 8 / sqrt(95)
    # margin_per_token -3 0 1 -1 2.75: ranks 1 3 4 2 5, from their mean -2 0 +1 -1 +2
    #   products -2 + 0 - 1 - 2 - 4 = -9, squares 10 and 10: -9 / 10
    rho, n = length_correlation(scores, "logp_margin")
    assert rho == pytest.approx(8 / math.sqrt(95))
    assert n == 5
    assert length_correlation(scores, "margin_per_token")[0] == pytest.approx(-0.9)


def test_length_correlation_of_what_does_not_vary_is_not_a_number(scores):
    same = scores.with_columns(chosen_tokens=pl.col("rejected_tokens"))
    rho, n = length_correlation(same, "logp_margin")
    assert math.isnan(rho)
    assert n == 5
