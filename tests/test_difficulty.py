import logging
import math

import polars as pl
import pytest

from sdpo_data.difficulty import DIFFICULTIES, describe_scores, difficulty_named, length_correlation
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


@pytest.mark.parametrize("name", DIFFICULTIES)
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
    # Wilson, z = 1.95996, z^2 = 3.84146, (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n):
    #   chat p 2/3, n 3: (0.66667 + 0.64024 -+ 1.95996 * 0.42518) / 2.28049 = 0.5731 -+ 0.3654
    #   math p 1/2, n 2: (0.5 + 0.96036 -+ 1.95996 * 0.60423) / 2.92073 = 0.5 -+ 0.4055
    got = describe_scores(scores)
    columns = ["source", "pairs", "reward_accuracy", "accuracy_95", "accuracy_per_token", "mean_margin"]
    assert got.columns == [*columns, "longer_chosen"]
    assert got.rows() == [
        ("chat", 3, 2 / 3, "[0.21, 0.94]", 1 / 3, -4 / 3, 1 / 3),
        ("math", 2, 1 / 2, "[0.09, 0.91]", 1 / 2, -1.0, 1.0),
    ]


def test_sources_whose_intervals_overlap_are_said_to_have_no_order(scores, caplog):
    caplog.set_level(logging.INFO)
    describe_scores(scores)
    assert "reward accuracy does not tell chat from math: their 95 % intervals overlap" in caplog.text


def test_sources_whose_intervals_do_not_overlap_go_without_remark(scores, caplog):
    caplog.set_level(logging.INFO)
    # 30 right pairs of chat, 30 wrong ones of math: Wilson's [0.886, 1] and [0, 0.114]
    right, wrong = scores.filter(pair_id="a"), scores.filter(pair_id="b")
    describe_scores(pl.concat([right.with_columns(source=pl.lit("chat"))] * 30 + [wrong] * 30))
    assert caplog.text == ""


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
