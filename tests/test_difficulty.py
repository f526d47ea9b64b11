import math

import polars as pl
import pytest

from sdpo_data.describe import (
    describe_definitions,
    describe_noise,
    describe_scores,
    length_correlation,
    noise_band,
    print_report,
    unclear_orders,
)
from sdpo_data.difficulty import DIFFICULTIES, difficulty_named
from sdpo_data.tables import SCORES, SdpoError


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
    assert ("arXiv" in DIFFICULTIES[name].source) != (name == "risk")  # BALIGN is known by name alone


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
    chat = ("chat", 3, 3, 2 / 3, 0.15938, 0.95474, 2.0, 1 / 3, 0.04526, 0.84062, 2.0, -4 / 3, 1 / 3, -1.0)
    math_ = ("math", 2, 2, 1 / 2, 0.05462, 0.94538, 1.0, 1 / 2, 0.05462, 0.94538, 1.0, -1.0, 1.0, None)
    for row, expected in zip(got.rows(), (chat, math_), strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    accuracies = [
        f"{name}{end}" for name in ("reward_accuracy", "per_token") for end in ("", "_low", "_high", "_effective")
    ]
    others = ["mean_margin", "longer_chosen", "length_rho"]
    assert got.columns == ["source", "pairs", "prompts", *accuracies, *others]


def test_sources_whose_order_may_be_chance_are_named_with_the_p_value(scores):
    # chat 2/3 at 2 effective pairs, math 1/2 at 1: pooled 11/18, variance 11/18 * 7/18 * (1/2 + 1) = 0.35648,
    # z = (1/6) / 0.59706 = 0.27915: two-sided 0.780
    # per token math comes first with 1/2, chat has 1/3: pooled 7/18, the same variance and distance
    told = "reward accuracy does not tell chat (0.667) from math (0.500)"
    per_token = "reward accuracy per token does not tell math (0.500) from chat (0.333)"
    how = "p = 0.78 (two-sided, clustered by prompt)"
    assert list(unclear_orders(describe_scores(scores))) == [f"{told}: {how}", f"{per_token}: {how}"]


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
    for prompts, said in ((4, []), (1, ["p = 0.16"] * 2)):  # of the accuracy, and of that per token
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


@pytest.fixture
def judged(scores):
    """Give the five pairs ratings and a second model.

    implicit margin, model's minus the second's: a 1 - (-2) = 3, b -3 - 1 = -4, c 1 - 1 = 0, d -9 - (-9.5) = 0.5,
    e 4 - 6 = -2; ratings' gaps a 5, b 1, c 0, d -2, e 3.
    """
    return scores.with_columns(
        against_key=pl.lit("other"),
        against_chosen_logp=pl.Series([-12.0, -8.0, -8.0, -24.5, -3.0]),
        against_rejected_logp=pl.Series([-10.0, -9.0, -9.0, -15.0, -9.0]),
        rating_chosen=pl.Series([9.0, 6.0, 5.0, 3.0, 8.0]),
        rating_rejected=pl.Series([4.0, 5.0, 5.0, 5.0, 5.0]),
    )


def test_the_definitions_that_need_more_by_hand(judged):
    got = {name: DIFFICULTIES[name].measure(judged).to_list() for name in DIFFICULTIES}
    assert got["implicit_reward"] == [-3.0, 4.0, 0.0, -0.5, 2.0]
    assert got["rating_gap"] == [-5.0, -1.0, 0.0, 2.0, -3.0]
    assert got["risk"] == [3.0, 0.0, 1.0, 1.0, 2.75]
    # e to the 10/4, 12/4, 8/2, 24/12, 5/1
    assert got["chosen_perplexity"] == pytest.approx([math.exp(power) for power in (2.5, 3.0, 4.0, 2.0, 5.0)])


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("abs(chosen_logp - rejected_logp) / prompt_tokens", [1 / 7, 3 / 8, 1 / 9, 9 / 10, 4 / 11]),
        ("chosen_tokens / rejected_tokens", [2.0, 4 / 3, 2 / 3, 12 / 5, 1 / 4]),  # of whole numbers, not rounded
        ("CASE WHEN truncated THEN 1 ELSE 0 END", [0.0, 0.0, 0.0, 1.0, 0.0]),
        ("(prompt_tokens)", [7.0, 8.0, 9.0, 10.0, 11.0]),
        ("coalesce(rating_chosen, 3.5) + prompt_tokens", [10.5, 11.5, 12.5, 13.5, 14.5]),
        ("chosen_tokens - avg(chosen_tokens) OVER (PARTITION BY source)", [0.0, 0.0, -3.0, 7.0, -4.0]),
    ],
)
def test_an_expression_over_scores_by_hand(scores, expression, expected):
    difficulty = difficulty_named(expression)
    assert difficulty.name == expression
    assert difficulty.measure(scores).to_list() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "margin-per-token",
            r"'margin-per-token' names 'margin', which SCORES does not have\. Did you mean 'margin_per_t",
        ),
        ("chosen_lopg / 2", r"'chosen_lopg / 2' names 'chosen_lopg', which SCORES does not have\. It has: pair_id, "),
        ("chosen_logp +", r"'chosen_logp \+' is not an expression \(unable to parse .*\)\. Write SQL, e\.g\. 'abs\(ch"),
        ("", r"'' is not an expression"),
        ("lenght(chosen_logp)", r"is not an expression \(unsupported function 'lenght'\)"),
        (
            "avg(chosen_logp)",
            r"'avg\(chosen_logp\)' gives 1 value\(s\) for 3 pairs\. Give each pair its own, e\.g\. 'a",
        ),
        ("1 + 1", r"'1 \+ 1' gives 1 value\(s\) for 3 pairs"),
        ("lower(source)", r"'lower\(source\)' gives String, not a number\. Give a number, higher for harder pairs"),
        (
            "chosen_logp > rejected_logp",
            r"gives Boolean, not a number\..* e\.g\. CASE WHEN truncated THEN 1 ELSE 0 END",
        ),
        ("COLUMNS('.*logp')", r"cannot be computed \(.*\)\. Mend the expression\."),
    ],
)
def test_what_is_no_definition_is_refused_before_there_are_scores(name, said):
    with pytest.raises(SdpoError, match=rf"^partition\.difficulty .*{said}"):
        difficulty_named(name)


def test_a_misspelt_name_gets_the_one_that_was_meant():
    with pytest.raises(
        SdpoError, match=r"'logp_margn' is not defined\. Did you mean 'logp_margin'\? There are: margin_p"
    ):
        difficulty_named("logp_margn")


def test_a_value_that_is_not_finite_is_refused_with_its_pair(scores):
    with pytest.raises(
        SdpoError, match=r"'ln\(chosen_tokens - 1\)' is not finite for 1 of 5 pairs, e\.g\. pair_id 'e', wh"
    ):
        difficulty_named("ln(chosen_tokens - 1)").measure(scores)  # e has one token: ln 0
    with pytest.raises(SdpoError, match=r"has no value for 2 of 5 pairs, e\.g\. pair_id 'c'\. Mend the expression"):
        difficulty_named("CASE WHEN prompt_tokens BETWEEN 9 AND 10 THEN NULL ELSE 1.5 END").measure(scores)


@pytest.mark.parametrize("name", ["implicit_reward", "chosen_logp - against_chosen_logp"])
def test_without_a_second_model_its_setting_is_named(scores, name):
    with pytest.raises(
        SdpoError,
        match=r"the log-probabilities of a second model, which 5 of 5 pairs lack\. Name that model in score\.against",
    ):
        difficulty_named(name).measure(scores)


@pytest.mark.parametrize("name", ["implicit_reward", "chosen_logp - against_chosen_logp"])
def test_a_model_against_itself_is_refused(judged, name):
    with pytest.raises(
        SdpoError, match=r"against itself \(both keys are 'key'\), which is 0 for every pair by definition"
    ):
        difficulty_named(name).measure(judged.with_columns(against_key="model_key"))


def test_pairs_without_ratings_are_counted_per_source(judged):
    unrated = judged.with_columns(rating_rejected=pl.Series([4.0, None, None, None, 5.0]))
    with pytest.raises(
        SdpoError,
        match=r"needs the judge's ratings, which 3 of 5 pairs lack \(2 of source 'chat', 1 of source 'math'\)\. Give",
    ):
        difficulty_named("rating_gap").measure(unrated)


def test_definitions_compared_by_hand(scores):
    # logp_margin -1 3 -1 9 -4 against margin_per_token -3 0 1 -1 2.75, all ten pairs of rows: ab ad rise together,
    # ae bc bd be cd ce de turn, ac is a tie of the first: tau-b = (2 - 7) / sqrt(9 * 10)
    # (their rank correlations with the token difference: see length_correlation)
    got = describe_definitions(scores)
    assert got["definition"].to_list() == ["margin_per_token", "logp_margin", "chosen_perplexity", "risk"]
    assert got["margin_per_token"][1] == got["logp_margin"][0]
    assert got["logp_margin"][0] == pytest.approx(-5 / math.sqrt(90))
    assert got["length_rho"].to_list()[:2] == pytest.approx([-0.9, 8 / math.sqrt(95)])
    assert got.select("pairs", "tau_pairs").unique().rows() == [(5, 5)]
    assert got["unit"][1] == "nats"


def test_what_the_scores_allow_is_compared_and_an_expression_with_it(judged):
    got = describe_definitions(judged, "-prompt_tokens * 2")
    names = [*(name for name in DIFFICULTIES if name != "reward_accuracy"), "-prompt_tokens * 2"]
    assert got["definition"].to_list() == names
    taus = got.select(names).to_numpy()
    assert (taus == taus.T).all()
    assert taus.diagonal() == pytest.approx([1.0] * len(names))


def test_a_definition_that_does_not_vary_agrees_with_none(scores):
    got = describe_definitions(scores.with_columns(chosen_logp=-1.0 * pl.col("chosen_tokens")))
    perplexity = got.filter(definition="chosen_perplexity")
    assert perplexity.select("length_rho", "logp_margin").row(0) == (None, None)


def test_above_the_limit_tau_is_that_of_a_sample_whatever_the_order_of_the_rows(monkeypatch, capsys):
    chosen = [-1.0 - (7 * row) % 50 for row in range(50)]
    frame = pl.DataFrame(
        [
            (f"p{i:02}", f"q{i}", "s", "key", c, -20.0, 1 + i % 9, 3, 4, False, "bfloat16", *[None] * 5)
            for i, c in enumerate(chosen)
        ],
        SCORES,
        orient="row",
    )
    whole = describe_definitions(frame)
    monkeypatch.setattr("sdpo_data.describe.TAU_PAIRS", 20)
    sampled = describe_definitions(frame)
    assert sampled["tau_pairs"].unique().to_list() == [20]
    assert sampled["logp_margin"][0] != whole["logp_margin"][0]
    assert sampled["length_rho"].to_list() == whole["length_rho"].to_list()  # of all pairs
    assert describe_definitions(frame.sample(fraction=1, shuffle=True, seed=3))[
        "logp_margin"
    ].to_list() == pytest.approx(sampled["logp_margin"].to_list())
    print_report(frame)
    assert "tau on a seeded sample of 20 of 50 pairs" in capsys.readouterr().out


def test_the_report_shows_sources_intervals_and_definitions(scores, capsys):
    print_report(scores, "chosen_tokens - rejected_tokens")
    out = capsys.readouterr().out
    assert "0.667 [0.159, 0.955]" in out
    assert "reward accuracy does not tell chat (0.667) from math (0.500): p = 0.78" in out
    assert "5 chosen_tokens - rejected_tokens" in out
    assert "sample" not in out


def test_the_noise_band_by_hand(scores):
    # chosen moved by +0.4, -0.8, 0, +1.2 nats for a, b, c, d of 4, 4, 2, 12 tokens: per token 0.1, 0.2, 0, 0.1;
    # sorted 0 0.1 0.1 0.2, place 0.95 * 3 = 2.85: 0.1 + 0.85 * 0.1; the sums sorted 0 0.4 0.8 1.2: 0.8 + 0.85 * 0.4
    moved = pl.Series([0.4, -0.8, 0.0, 1.2])
    rescored = scores.head(4).with_columns(pl.col("chosen_logp") + moved, dtype=pl.lit("float32")).reverse()
    assert noise_band(scores, rescored, "margin_per_token") == (pytest.approx(0.185), 4)
    assert noise_band(scores, rescored, "logp_margin") == (pytest.approx(1.14), 4)
    assert noise_band(scores, rescored, "chosen_logp - rejected_logp")[0] == pytest.approx(1.14)
    # of the five per token the median is b's 0, the next are 1 away; of the sums a's and c's -1, the next e's, 3 away
    table = {row["definition"]: row for row in describe_noise(scores, rescored).iter_rows(named=True)}
    assert list(table["margin_per_token"].values())[2:] == [pytest.approx(0.185), 4, 1, 0.2]
    assert list(table["logp_margin"].values())[2:] == [pytest.approx(1.14), 4, 2, 0.4]
    assert "reward_accuracy" not in table  # of no single pair


def test_the_noise_of_scores_with_token_lists_is_told_too(scores, capsys):
    lists = {f"{side}_token_logps": pl.lit([-1.0]) for side in ("chosen", "rejected")}
    print_report(scores.with_columns(**lists, dtype=pl.lit("bfloat16")), rescored=scores)
    out = capsys.readouterr().out
    assert "noise of bfloat16" in out
    assert "near_median" in out


def test_a_noise_band_of_other_scores_is_refused(scores):
    with pytest.raises(
        SdpoError, match=r"Re-scored pairs are not of the same scores \(pair_id 'b' has model_key 'old'"
    ):
        noise_band(scores, scores[1:2].with_columns(model_key=pl.lit("old")), "logp_margin")
    with pytest.raises(SdpoError, match=r"no pair of theirs is among the scores"):
        noise_band(scores, scores.clear(), "logp_margin")
