"""What each figure draws, read from its specification."""

import math

import polars as pl
import pytest
import vl_convert
from made_run import make_run

from sdpo_data.run import Run
from sdpo_data.tables import FINDINGS, METRICS, PARTITION, RESULTS
from sdpo_eval import canvas, plots, plots_chain, plots_pairs
from sdpo_eval.evidence import measure_drift, read_evidence
from sdpo_eval.margins import measure_displacement
from sdpo_eval.published import TABLE_2
from sdpo_eval.sections import write_sections


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    return read_evidence(Run(make_run(tmp_path_factory.mktemp("made") / "run")))


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return read_evidence(Run(make_run(tmp_path_factory.mktemp("made") / "core", core=True)))


def rows_of(chart) -> list[dict]:
    """The rows that a chart holds."""
    spec = chart.to_dict()
    return spec["datasets"][spec["data"]["name"]]


def encodings_of(spec: dict) -> list[dict]:
    """The encodings of every layer."""
    inner = spec.get("spec", spec)
    return [{**inner.get("encoding", {}), **layer.get("encoding", {})} for layer in inner.get("layer", [inner])]


def results_of(*rows) -> pl.DataFrame:
    """RESULTS from (arm, seed, step, value, stderr)."""
    full = [
        (arm, seed, step, "key", "p@1", "h4", "mean", value, stderr, 99, 99, "all")
        for arm, seed, step, value, stderr in rows
    ]
    return pl.DataFrame(full, RESULTS, orient="row")


def metrics_of(name: str, **updates: int) -> pl.DataFrame:
    """METRICS of arm "a", seed 0: step_1=3 has updates 1, 2, 3 of step 1, with values 1.1, 1.2, 1.3."""
    rows = [
        ("a", 0, int(step[-1]), update, name, int(step[-1]) + update / 10)
        for step, last in updates.items()
        for update in range(1, last + 1)
    ]
    return pl.DataFrame(rows, METRICS, orient="row")


def test_h4_starts_every_arm_at_the_base_model_with_95_percent_bars():
    # 40 +- 1.959964 * 2 = 36.08 .. 43.92
    chart = plots.plot_h4(results_of(("base", 0, 0, 40.0, 2.0), ("a", 0, 1, 41.0, None), ("b", 0, 1, 39.0, 1.0)))
    rows = rows_of(chart)
    assert [(row["arm"], row["step"], row["model"]) for row in rows] == [
        ("a", 0, "base"), ("a", 1, "a seed 0 step 1"), ("b", 0, "base"), ("b", 1, "b seed 0 step 1"),
    ]  # fmt: skip
    assert (rows[0]["low"], rows[0]["high"]) == (pytest.approx(36.08, abs=0.001), pytest.approx(43.92, abs=0.001))
    assert (rows[1]["low"], rows[1]["high"]) == (None, None)  # no standard error, no bar
    assert rows[0]["x"] == rows[2]["x"] == 0
    assert rows[1]["x"] < 1 < rows[3]["x"]  # bars of two arms do not hide each other


def test_seeds_start_at_the_base_model_each():
    results = results_of(("base", 0, 0, 40.0, 2.0), ("a", 0, 1, 41.0, 1.0), ("a", 7, 1, 42.0, 1.0))
    rows = rows_of(plots.plot_h4(results))
    assert [(row["seed"], row["step"]) for row in rows] == [(0, 0), (0, 1), (7, 0), (7, 1)]


def test_tasks_carry_the_chance_they_have(evidence):
    chart = plots.plot_tasks(evidence.results, {"mmlu": 25.0}, {"mmlu": "MMLU"})
    chance = {row["task"]: row["chance"] for row in rows_of(chart)}
    assert chance == {"MMLU": 25.0, "arc_challenge": None, "hellaswag": None, "truthfulqa_mc2": None}
    assert "guessing" in chart.to_dict()["title"]["subtitle"]
    assert "guessing" not in plots.plot_tasks(evidence.results, {}, {}).to_dict()["title"]["subtitle"]


def test_updates_of_the_steps_stand_end_to_end():
    # step 1 has 3 updates: update 2 of step 2 is the arm's fifth
    metrics = pl.concat([metrics_of("loss", step_2=2, step_1=3), metrics_of("grad_norm", step_1=3)])
    got = [(row["step"], row["update"], row["at"], row["value"]) for row in rows_of(plots_chain.plot_loss(metrics))]
    assert got == [(1, 1, 1, 1.1), (1, 2, 2, 1.2), (1, 3, 3, 1.3), (2, 1, 4, 2.1), (2, 2, 5, 2.2)]


def test_the_loss_is_drawn_against_log_2_once():
    spec = plots_chain.plot_loss(metrics_of("loss", step_1=2)).to_dict()
    starts = [encoding["y"]["datum"] for encoding in encodings_of(spec) if "datum" in encoding.get("y", {})]
    assert starts == [math.log(2)] * 2  # the line and its label
    assert all(
        "aggregate" in layer["transform"][0] for layer in spec["spec"]["layer"] if "datum" in layer["encoding"]["y"]
    )


def test_a_long_training_is_thinned_and_says_so():
    chart = plots_chain.plot_loss(metrics_of("loss", step_1=3 * canvas.MOST_POINTS))
    rows = rows_of(chart)
    assert len(rows) == canvas.MOST_POINTS
    assert [row["update"] for row in rows[:3]] == [1, 4, 7]  # the first update, at log 2, is always there
    assert "One update in 3 is drawn." in chart.to_dict()["title"]["subtitle"]
    assert "One update" not in plots_chain.plot_loss(metrics_of("loss", step_1=3)).to_dict()["title"]["subtitle"]


def test_margin_curves_by_hand(scores):
    # margins a +1, b -3, c +1, d -9, e +4. Step 1 (e, a, c): 1, 1, 4; step 2 (b, d): -9, -3
    steps = pl.DataFrame({"pair_id": ["e", "a", "c", "b", "d"], "step": [1, 1, 1, 2, 2]})
    rows = rows_of(plots_pairs.plot_margin_curves(scores, steps))
    assert [(row["step"], row["margin"], row["share"]) for row in rows] == [
        (1, 1.0, 0.3333), (1, 1.0, 0.6667), (1, 4.0, 1.0), (2, -9.0, 0.5), (2, -3.0, 1.0),
    ]  # fmt: skip


def test_margin_curves_of_many_pairs_stay_small_and_reach_1(scores):
    many = pl.concat(
        [scores.head(1).with_columns(pair_id=pl.lit(str(i)), chosen_logp=pl.lit(-float(i))) for i in range(999)]
    )
    rows = rows_of(plots_pairs.plot_margin_curves(many, many.select("pair_id", step=pl.lit(1))))
    assert len(rows) == plots_pairs.QUANTILES
    assert rows[-1] == {"step": 1, "margin": 11.0, "share": 1.0}  # largest: -0 + 11
    assert [row["share"] for row in rows] == sorted(row["share"] for row in rows)


def test_length_confound_by_hand_and_sampled(scores):
    # chosen minus rejected tokens: a 2, b 1, c -1, d 7, e -3
    mine = {"step": pl.lit(1), "definition": pl.lit("mine")}
    partition = scores.select("pair_id", "source", difficulty=-pl.col("chosen_logp"), **mine)
    chart = plots_pairs.plot_length_confound(scores, partition)
    assert {row["pair_id"]: row["tokens"] for row in rows_of(chart)} == {"a": 2, "b": 1, "c": -1, "d": 7, "e": -3}
    assert "mine" in chart.to_dict()["encoding"]["y"]["title"]
    many = pl.concat([scores.with_columns(pair_id=pl.col("pair_id") + str(i)) for i in range(canvas.MOST_POINTS // 4)])
    parts = many.select("pair_id", "source", difficulty=pl.lit(1.0), **mine)
    sampled = plots_pairs.plot_length_confound(many, parts)
    assert len(rows_of(sampled)) == canvas.MOST_POINTS
    assert "2,000 of 2,500 pairs" in sampled.to_dict()["title"]["subtitle"]


def test_every_figure_has_title_units_tooltip_and_more_than_colour(core):
    drawings = [block for section in write_sections(core) for block in section.blocks if block.kind == "drawing"]
    drawn = [name for module in (plots, plots_pairs, plots_chain) for name in vars(module) if name.startswith("plot_")]
    assert sorted(f"plot_{drawing.name}" for drawing in drawings) == sorted(drawn)
    for drawing in drawings:
        spec = drawing.draw().to_dict()  # validates it
        assert spec["title"]["text"]
        assert spec["title"]["subtitle"]
        encodings = encodings_of(spec)
        assert any("tooltip" in encoding for encoding in encodings), drawing.name
        for encoding in encodings:
            if "color" in encoding and drawing.name != "definitions":  # whose squares have numbers written on them
                assert {"shape", "strokeDash"} & set(encoding), drawing.name
        axes = [encoding.get(axis, {}) for encoding in encodings for axis in "xy"]
        assert drawing.name == "definitions" or any(axis.get("field") and axis.get("title") for axis in axes), (
            drawing.name
        )


def test_h4_title_says_where_every_arm_ends():
    # seeds 41 and 43 of a end at 42 in the mean; b at 39; both begin at 40
    rows = ("base", 0, 0, 40.0, 2.0), ("a", 0, 1, 41.0, None), ("a", 1, 1, 43.0, None), ("b", 0, 1, 39.0, 1.0)
    title = plots.plot_h4(results_of(*rows), 29.96).to_dict()["title"]
    assert title["text"] == "H4 ends at 42.0 for a, 39.0 for b, from 40.0 before step 1"
    assert "guessing" in title["subtitle"]


def title_of(chart) -> str:
    return chart.to_dict()["title"]["text"]


def test_titles_of_the_training_say_what_it_did():
    # step 2, the last, goes from 2.1 to 2.2; of arm b, named after it, from 1.1 to 1.3; the largest value is 2.2
    metrics = pl.concat(
        [metrics_of("loss", step_1=3, step_2=2), metrics_of("loss", step_1=3).with_columns(arm=pl.lit("b"))]
    )
    assert title_of(plots_chain.plot_loss(metrics)) == "Loss over the last step: 2.100 to 2.200 (a), 1.100 to 1.300 (b)"
    norms = metrics.with_columns(name=pl.lit("grad_norm"))
    assert (
        title_of(plots_chain.plot_gradient_norms(norms)) == "The largest gradient norm is 2.2, at update 2 of a step 2"
    )
    sdpo = metrics.with_columns(arm=pl.col("arm").replace({"b": "sdpo"}), name=pl.lit("rewards/margins"))
    said = title_of(plots_chain.plot_reward_margins(sdpo))
    assert said == "Reward margins over the last step: 1.10 to 1.30 (sdpo), 2.10 to 2.20 (a)"
    weights = pl.DataFrame(
        [("a", 0, 2, "0.2-0.3", 25.0), ("a", 0, 2, "0.4-0.5", 75.0), ("a", 0, 1, "0.0-0.1", 100.0)],
        ["arm", "seed", "step", "weight", "share"], orient="row",
    )  # fmt: skip
    assert (
        title_of(plots_chain.plot_weights(weights)) == "After a step 2 25 % of its pairs weigh below 0.3, from 0.5 each"
    )


def test_a_zero_in_a_title_has_no_minus():
    assert [canvas.minus(value, "+.1f") for value in (-0.04, -0.06, 0.06)] == ["+0.0", "−0.1", "+0.1"]


def test_log_2_is_left_out_of_another_loss():
    spec = plots_chain.plot_loss(metrics_of("loss", step_1=2), sigmoid=False).to_dict()
    assert not any("datum" in encoding.get("y", {}) for encoding in encodings_of(spec))
    assert "need not start at log 2" in spec["title"]["subtitle"]


def test_titles_of_the_scores_say_what_changed():
    rows = [
        ("base", 0, "x", 40.0),
        ("a", 1, "x", 44.0),
        ("a", 2, "x", 41.5),
        ("base", 0, "y", 30.0),
        ("a", 2, "y", 28.0),
    ]
    results = pl.DataFrame(
        [(arm, 0, step, "key", "p@1", task, "acc", value, 1.0, 99, 99, "all") for arm, step, task, value in rows],
        RESULTS, orient="row",
    )  # fmt: skip
    said = title_of(plots.plot_tasks(results, {}, {"x": "X", "y": "Y"}))
    assert said == "From the base model to a's last step: X +1.5, Y −2.0 points"
    changes = pl.DataFrame(
        [("x", "q", "right in both", 1.0), ("x", "q", "became right", 2.0), ("x", "q", "became wrong", -1.0)],
        ["task", "question", "outcome", "change"], orient="row",
    )  # fmt: skip
    said = title_of(plots.plot_items(changes, ("a", "base")))
    assert said == "2 of 3 right answers became likelier; 1 questions became right, 1 wrong"


@pytest.mark.parametrize(("verdict", "can"), [("better", "can"), ("not distinguishable", "cannot")])
def test_one_difference_alone_is_told_as_one(verdict, can):
    row = {"contrast": "a − b", "effect": 1.0, "low": 0.5, "high": 1.5, "p_holm": 0.01, "n": 9, "seeds": 5}
    row |= {"verdict_on": "these methods", "verdict": verdict, "primary": False}
    assert title_of(plots.plot_contrasts(pl.DataFrame([row]), "H4")) == f"The difference {can} be told from 0"


def test_findings_of_pairs_without_any_are_a_figure_that_says_so():
    found = pl.DataFrame([("empty text", "look", 1, 0.5, "p", "drop it")], FINDINGS, orient="row")
    assert title_of(plots_pairs.plot_findings(found)) == "Nothing is wrong with the pairs; some are worth a look"
    chart = plots_pairs.plot_findings(found.with_columns(severity=pl.lit("fine")))
    assert title_of(chart) == "Nothing is wrong with the pairs"
    assert vl_convert.vegalite_to_png(chart.to_dict())  # a legend of nothing: "SVG has an invalid size"


def test_a_long_definition_does_not_stand_out_over_its_axis(scores):
    part = pl.DataFrame(
        [(pair, "s", 1, 0, 0.5, "abs(x) / " * 30) for pair in scores["pair_id"]], PARTITION, orient="row"
    )
    axis = encodings_of(plots_pairs.plot_length_confound(scores, part).to_dict())[0]["y"]["axis"]
    assert axis["titleLimit"] == canvas.HEIGHT


def test_titles_of_the_pairs_say_how_hard_they_are(scores):
    # margins a +1, b -3, c +1, d -9, e +4; longer by a 2, b 1, c -1, d 7, e -3 tokens. By difficulty e, a, c, b, d the
    # lengths rank 1, 4, 2, 3, 5: rho = 1 - 6 * (0 + 4 + 1 + 1 + 0) / 120 = 0.7
    order = {"e": 0.0, "a": 1.0, "c": 2.0, "b": 3.0, "d": 5.0}
    parts = pl.DataFrame(
        [(i, "s", 1 + (place > 2), place, hard, "mine") for place, (i, hard) in enumerate(order.items())],
        PARTITION, orient="row",
    )  # fmt: skip
    said = title_of(plots_pairs.plot_difficulties(parts, "nats"))
    assert said == "Median difficulty rises from 1.00 in step 1 to 4.00 in step 2"
    said = title_of(plots_pairs.plot_margin_curves(scores, parts))
    assert said == "The base model already has 100 % of step 1's pairs right, and 0 % of step 2's"
    said = title_of(plots_pairs.plot_length_confound(scores, parts))
    assert said == "Rank correlation of difficulty with length: +0.70, 5 pairs"
    one = parts.filter(step=1)
    assert title_of(plots_pairs.plot_difficulties(one, "nats")) == "The median pair has a difficulty of 1.00"


def test_models_stand_among_the_papers(evidence):
    models = pl.DataFrame({"model": ["mine"], "of": ["this run"], "h4": [50.0], "stderr": [1.0]})
    paper = TABLE_2.select("model", pl.lit("the paper").alias("of"), "h4", stderr=pl.lit(None, pl.Float64))
    rows = rows_of(plots.plot_paper_scale(pl.concat([models, paper])))
    assert len(rows) == 17
    said = title_of(plots.plot_paper_scale(pl.concat([models, paper])))
    assert said == "This run's best, mine at 50.0 H4, is above none of the paper's 16 models"
    assert rows[0]["low"] == pytest.approx(48.04, abs=0.001)  # 50 - 1.96
    tasks = ["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"]
    means = TABLE_2.with_columns(mean=pl.mean_horizontal(tasks))
    off = means.filter((pl.col("mean") - pl.col("h4")).abs() > 0.0051)["model"].to_list()
    assert off == ["SOLAR-0-70B-16bit"]  # as printed: 72.93, its parts give 72.95


def test_difficulties_by_source_and_step_by_hand():
    # 0, 1, 2, 3, 4: quantiles at 0.05 * 4 = 0.2, 1, 2, 3, 3.8
    part = pl.DataFrame({"source": "s", "step": 1, "difficulty": [4.0, 0.0, 3.0, 1.0, 2.0], "definition": "mine"})
    row = rows_of(plots_pairs.plot_difficulties(part, "nats"))[0]
    assert [row[name] for name in ("q05", "q25", "median", "q75", "q95", "pairs")] == [0.2, 1.0, 2.0, 3.0, 3.8, 5]


def test_definitions_agree_with_themselves_and_a_missing_number_leaves_a_gap():
    table = pl.DataFrame({"definition": ["a", "b"], "length_rho": [0.5, None], "a": [1.0, -0.25], "b": [-0.25, 1.0],
                          "tau_pairs": [9, 9]})  # fmt: skip
    rows = {(row["definition"], row["against"]): row["said"] for row in rows_of(plots_pairs.plot_definitions(table))}
    assert rows == {
        ("a", "a"): "+1.00", ("b", "b"): "+1.00", ("a", "b"): "−0.25", ("b", "a"): "−0.25",
        ("a", "how much longer chosen is"): "+0.50",
    }  # fmt: skip


def test_displacement_by_hand(scores):
    # step 1 takes 1 nat from every chosen answer and 3 from every rejected one; five prompts, no spread
    held = scores.with_columns(arm=pl.lit("base"), seed=pl.lit(0, pl.Int64), step=pl.lit(0, pl.Int64))
    later = held.with_columns(
        arm=pl.lit("a"), step=pl.lit(1, pl.Int64), chosen_logp=pl.col("chosen_logp") - 1,
        rejected_logp=pl.col("rejected_logp") - 3,
    )  # fmt: skip
    moved = measure_displacement(pl.concat([held, later]))
    said = "By a step 1 since the base model: chosen answers −1.0 nats, rejected answers −3.0 nats"
    assert title_of(plots_chain.plot_displacement(moved)) == said
    assert moved.select("arm", "step", "answer", "mean", "n").rows() == [
        ("a", 1, "chosen", -1.0, 5), ("a", 1, "rejected", -3.0, 5),
    ]  # fmt: skip
    assert measure_displacement(later).is_empty()  # no base model, nothing to be set against


def test_drift_by_hand(evidence):
    # sdpo's step 2 sees chosen answers 4 nats likelier: margins from -4 up to 0 turn right, none wrong
    row = measure_drift(evidence).row(0, named=True)
    own = evidence.scores.join(evidence.partition.filter(step=2), on="pair_id")
    margins = own.select(pl.col("chosen_logp") - pl.col("rejected_logp")).to_series()
    assert (row["arm"], row["step"], row["pairs"]) == ("sdpo", 2, 80)
    assert row["got_right"] == margins.is_between(-4, 0, closed="right").sum()
    assert row["got_wrong"] == 0
    assert measure_drift(evidence).height == 1  # both first steps refer to the base model itself
