import importlib.util
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from made_run import KEYS, make_run, write

import sdpo_eval
from sdpo_data.messages import plain_texts
from sdpo_data.run import Run
from sdpo_data.tables import CONTAMINATION, DOCUMENTS, ITEMS, PARTITION, SdpoError
from sdpo_eval.arms import contrast_factorial, describe_order, say_effects
from sdpo_eval.blocks import Table
from sdpo_eval.changes import FIELDS, find_changes, find_flips, find_forgetting
from sdpo_eval.clean import Clean, read_clean
from sdpo_eval.compare import compare_models, find_worse, main, tabulate, tabulate_beneath, tabulate_clean
from sdpo_eval.contrasts import (
    CHECKPOINTS,
    CONTRASTS,
    METHODS,
    CompareConfig,
    Side,
    choose_models,
    contrast_models,
    pair_questions,
    tell_kind,
)
from sdpo_eval.detail import tell_changes
from sdpo_eval.evidence import pair_steps, read_evidence
from sdpo_eval.margins import HELD_OUT, HELD_OUT_SCORES, as_documents, as_items, read_held_out
from sdpo_eval.report import Report


def items(
    arm: str, scores: list[float], *, seed: int = 0, step: int = 1, task: str = "arc_challenge", **change
) -> pl.DataFrame:
    """Answers of one model; a question's subject is its task but for MMLU, where questions take turns in two."""
    rows = []
    for number, score in enumerate(scores):
        subject = ("philosophy", "virology")[number % 2] if task == "mmlu" else task
        correct = None if task == "truthfulqa_mc2" else score
        head = (arm, seed, step, f"key of {arm} {seed} {step}", f"p@{task}", task, f"{subject}/{number}", subject)
        rows.append((*head, f"{subject}/{number}", correct, score, -1.0 - number, [-1.0 - number, -2.0]))
    return pl.DataFrame(rows, ITEMS, orient="row").with_columns(
        pl.lit(value).alias(name) for name, value in change.items()
    )


def side(frame: pl.DataFrame) -> Side:
    return Side(frame["arm"][0], frame["arm"][0], frame)


TASKS = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2")


def all_tasks(arm: str, scores: list[float], **model) -> pl.DataFrame:
    return pl.concat([items(arm, scores, task=task, **model) for task in TASKS])


# --- contrasts ------------------------------------------------------------------------------


def test_a_contrast_by_hand():
    # questions 0 to 3 of both: differences 1, 0, 0, 1: mean 50 points; s^2 = 4 * 0.25 / 3 = 1/3; standard error
    # 100 * sqrt(1/3 / 4) = 28.87. Question 4 was asked of one model only and does not count.
    # Right alone: the first 2, the second 0: mid-p (1/2)^2 = 1/4. Questions for 1 point: 4 * (2.80159 * 28.8675)^2
    got = contrast_models([(side(items("a", [1, 1, 0, 1, 1])), side(items("b", [0, 1, 0, 0])))])
    row = got.row(0, named=True)
    assert got.schema == CONTRASTS
    assert (row["task"], row["effect"], row["n"], row["verdict_on"]) == ("arc_challenge", 50, 4, CHECKPOINTS)
    assert row["stderr"] == pytest.approx(28.8675, rel=1e-5)
    assert (row["only_first"], row["only_second"], row["p_mcnemar"]) == (2, 0, 0.25)
    assert row["n_for_1_point"] == math.ceil(4 * (2.801585 * 28.867513) ** 2)


def test_mmlu_counts_every_subject_once():
    # philosophy (0, 2, 4): 1, 1, 0 more, mean 2/3; virology (1, 3): 0, 0. Mean of both 1/3, where the plain mean is 2/5
    row = contrast_models([(side(items("a", [1, 0, 1, 0, 0], task="mmlu")), side(items("b", [0] * 5, task="mmlu")))])
    assert row["effect"][0] == pytest.approx(100 / 3)
    assert row["p_mcnemar"][0] is None  # its score is no plain share


def test_h4_is_there_with_all_four_tasks_alone():
    first, second = all_tasks("a", [1, 0, 1, 1, 0, 0]), all_tasks("b", [0, 0, 1, 0, 0, 1])
    got = contrast_models([(side(first), side(second))])
    assert got["task"].to_list() == ["h4", *TASKS]
    assert got["effect"][0] == pytest.approx(got["effect"][1:].mean())
    assert got["n"][0] == 24
    three = [side(frame.filter(pl.col("task") != "mmlu")) for frame in (first, second)]
    assert "h4" not in contrast_models([tuple(three)])["task"]


FOUR = {
    "sdpo": [1, 1, 0, 1, 1], "sdpo_fixed": [1, 0, 0, 1, 1],
    "random": [0, 1, 0, 0, 1], "random_fixed": [0, 0, 1, 0, 0],
}  # fmt: skip


def test_the_core_factorial_by_hand():
    # order, ((sdpo + sdpo_fixed) - (random + random_fixed)) / 2 by question: 1, 0, -1/2, 1, 1/2: mean 0.4; residues
    # 0.6, -0.4, -0.9, 0.6, 0.1, their squares 1.7: standard error sqrt(1.7 / 4 / 5) = 0.29155.
    # reference, ((sdpo + random) - (sdpo_fixed + random_fixed)) / 2: 0, 1, -1/2, 0, 1/2: mean 0.2.
    # interaction, ((sdpo - sdpo_fixed) - (random - random_fixed)) / 2: 0, 0, 1/2, 0, -1/2: mean 0.
    # Question 5 was asked of three arms only and does not count.
    answers = [items(arm, scores if arm == "random" else [*scores, 1]) for arm, scores in FOUR.items()]
    got = contrast_factorial(pl.concat([*answers, items("dpo", [1] * 6)]), CompareConfig())
    rows = {row["effect_of"]: row for row in got.iter_rows(named=True)}
    assert {name: row["effect"] for name, row in rows.items()} == {
        "order": pytest.approx(40), "reference": pytest.approx(20), "interaction": pytest.approx(0),
    }  # fmt: skip
    assert rows["order"]["stderr"] == pytest.approx(29.155, rel=1e-4)
    assert {(row["n"], row["verdict_on"], row["primary"]) for row in rows.values()} == {(5, CHECKPOINTS, False)}
    assert (rows["order"]["first"], rows["order"]["second"]) == ("easy to hard", "random")
    assert rows["order"]["p_holm"] == pytest.approx(min(1, 3 * rows["order"]["p"]))  # the smallest of three
    assert contrast_factorial(pl.concat(answers[:3]), CompareConfig()).is_empty()


def test_the_core_factorial_is_judged_on_methods_from_five_seeds_that_all_four_arms_have():
    # every arm's own answers, but that sdpo is right once more in odd seeds: order 40, 50, 40, 50, 40: 44 on average
    frames = [
        items(arm, [*scores[:2], 1, *scores[3:]] if arm == "sdpo" and seed % 2 else scores, seed=seed)
        for arm, scores in FOUR.items()
        for seed in range(5)
    ]
    late = [items(arm, scores, seed=9, step=2) for arm, scores in FOUR.items() if arm != "random"]
    got = contrast_factorial(pl.concat([*frames, *late]), CompareConfig())
    order = got.filter(effect_of="order", verdict_on=METHODS).row(0, named=True)
    assert (order["effect"], order["seeds"], order["n"]) == (pytest.approx(44), 5, 5)
    assert got.filter(effect_of="order", verdict_on=CHECKPOINTS)["effect"].to_list() == pytest.approx(
        [40, 50] * 2 + [40]
    )
    assert say_effects(got.filter(effect_of="order", verdict_on=CHECKPOINTS)) == ["order +40.0 to +50.0 over 5 seeds"]
    assert say_effects(got.filter(effect_of="order", verdict_on=METHODS))[0].startswith("order +44.0")
    assert contrast_factorial(pl.concat([*frames[:15], *late]), CompareConfig()).is_empty()  # random_fixed: no seed


@pytest.mark.parametrize(
    ("ids", "steps", "order", "rho"),
    [
        ("abcdef", "111222", "the parts, easiest first", 1.0),
        ("fedcba", "111222", "the parts, hardest first", -1.0),
        ("bafced", "111222", "other parts (67 % of pairs as the partition has them)", 1 - 6 * 16 / 210),
        ("fedcba", "111122", "the parts, hardest first", -1.0),  # steps that keep their sizes, where parts differ
        ("abcdef", "111111", "all pairs in one step", 1.0),
        ("abcabcdef", "111222222", "growing: each step trains on its part and all before it", None),
        ("abcd", "1112", "the parts, easiest first, 67 % of all", 1.0),
    ],
)
def test_what_an_arm_did_is_read_off_its_order(ids, steps, order, rho):
    def partition(ids, steps):
        rows = [
            (i, "s", int(step), rank, float(ord(i)), "mine")
            for rank, (i, step) in enumerate(zip(ids, steps, strict=True))
        ]
        return pl.DataFrame(rows, PARTITION, orient="row")

    got = describe_order(partition(ids, steps), partition("abcdef", "111222"))
    assert got["order"] == order
    assert rho is None or got["rank_with_difficulty"] == pytest.approx(rho)


def test_metrics_beside_the_score_by_hand():
    # choices -1, -2, -4, the second one right: shares e^-2 and e^-1 of e^-1 + e^-2 + e^-4, margin their difference;
    # the other model has the first right: margin turned round. Gold: -2 - (-1) = -1.
    one = items("a", [0.0], gold_logp=-2.0).with_columns(choice_logps=pl.lit([-1.0, -2.0, -4.0]))
    two = items("b", [1.0], gold_logp=-1.0).with_columns(choice_logps=pl.lit([-1.0, -2.0, -4.0]))
    got = contrast_models([(side(one), side(two))], metrics=["gold_logp", "choice_margin"])
    whole = math.exp(-1) + math.exp(-2) + math.exp(-4)
    assert got.select("metric", "effect").rows() == [
        ("gold_logp", -1.0),
        ("choice_margin", pytest.approx(100 * 2 * (math.exp(-2) - math.exp(-1)) / whole)),
    ]
    assert contrast_models([(side(one), side(one))], metrics=["choice_margin"])["effect"].to_list() == [0]


def test_two_equally_likely_choices_have_no_margin():
    frame = items("a", [1.0]).with_columns(gold_logp=-3.0, choice_logps=pl.lit([-3.0, -3.0, -9.0]))
    values = pair_questions(
        [(side(frame), side(frame.with_columns(choice_logps=pl.lit([-3.0, -3.0, -3.0]))))], "choice_margin"
    )
    assert values["arc_challenge"][1].values.tolist() == [[0.0]]


def test_several_right_answers_have_no_margin():
    frame = items("a", [0.4, 0.7], task="truthfulqa_mc2")
    assert pair_questions([(side(frame), side(frame))], "choice_margin") == {}


def test_questions_of_one_cluster_are_one_draw():
    first, second = items("a", [0, 3, 1, 4]), items("b", [0, 0, 0, 0])
    got = contrast_models([(side(first.with_columns(cluster=pl.Series(["x", "y", "x", "y"]))), side(second))])
    assert got["stderr"][0] == pytest.approx(150)  # see test_stats.test_clusters_count_as_one_draw


def seeds(arm: str, count: int, key: str | None = None) -> pl.DataFrame:
    draw = np.random.default_rng(len(arm))
    frames = [items(arm, (draw.random(60) < 0.5).astype(float).tolist(), seed=seed) for seed in range(count)]
    return pl.concat(frames if key is None else [frame.with_columns(model_key=pl.lit(key)) for frame in frames])


@pytest.mark.parametrize(("count", "kinds"), [(4, [CHECKPOINTS] * 4), (5, [CHECKPOINTS] * 5 + [METHODS])])
def test_methods_are_judged_from_five_seeds_on(count, kinds):
    got = contrast_models([(side(seeds("sdpo", count)), side(seeds("dpo", count)))])
    assert got["verdict_on"].to_list() == kinds
    assert got["first"][0] == "sdpo seed 0"
    assert ("these methods cross at least 5 seeds" in tell_kind(got)) == (count == 5)
    assert ("on these checkpoints, not on the methods" in tell_kind(got)) == (count == 4)
    if count == 5:
        assert (got["seeds"][-1], got["first"][-1]) == (5, "sdpo")
        assert got["effect"][-1] == pytest.approx(got["effect"][:-1].mean())


def test_one_base_model_meets_every_seed():
    got = contrast_models([(side(seeds("sdpo", 5)), side(items("base", [0.0, 1.0] * 30, step=0)))])
    assert got["verdict_on"].to_list() == [CHECKPOINTS] * 5 + [METHODS]


def test_seeds_of_equal_weights_are_one_draw():
    got = contrast_models([(side(seeds("sdpo", 6, key="one key")), side(seeds("dpo", 6, key="other")))])
    assert METHODS not in got["verdict_on"]


def test_the_primary_contrast_alone_is_not_adjusted():
    first, second, base = (
        all_tasks("sdpo", [1, 1, 0, 1] * 9),
        all_tasks("dpo", [0, 1, 1, 1] * 9),
        all_tasks("base", [0, 1] * 18),
    )
    pairs = [(side(first), side(second)), (side(first), side(base))]
    got = contrast_models(pairs)
    primary = got.filter("primary")
    assert primary.select("first", "second", "task").rows() == [("sdpo", "dpo", "h4")]
    assert primary["p_holm"].to_list() == primary["p"].to_list()
    secondary = got.filter(~pl.col("primary"))
    assert secondary["p_holm"].min() == pytest.approx(min(1, 9 * secondary["p"].min()))
    other = contrast_models(pairs, CompareConfig(primary="sdpo - base", primary_task="mmlu")).filter("primary")
    assert other.select("second", "task").rows() == [("base", "mmlu")]
    assert not contrast_models(pairs, CompareConfig(primary="dpo - sdpo"))["primary"].any()


def test_methods_are_judged_on_what_every_seed_was_asked():
    sdpo, dpo = seeds("sdpo", 5), seeds("dpo", 5)
    late = (pl.col("seed") == 3) & pl.col("item_id").is_in([f"arc_challenge/{number}" for number in range(50, 60)])
    got = contrast_models([(side(sdpo.filter(~late)), side(dpo))])
    assert got["n"].to_list() == [60, 60, 60, 50, 60, 50]
    assert got["effect"].null_count() == 0


def test_several_seeds_leave_the_primary_to_the_methods():
    config = CompareConfig(primary_task="arc_challenge")
    got = contrast_models([(side(seeds("sdpo", 5)), side(seeds("dpo", 5)))], config)
    assert got.filter("primary")["verdict_on"].to_list() == [METHODS]


def test_a_primary_contrast_has_two_arms():
    with pytest.raises(ValueError, match="write two arms with ' - ' between them"):
        CompareConfig(primary="sdpo")


def test_other_protocols_are_refused():
    one, two = items("a", [1, 0]), items("b", [1, 0], protocol="q@1")
    with pytest.raises(
        SdpoError, match=r"a answered arc_challenge under p@arc_challenge, b under q@1: other questions"
    ):
        contrast_models([(side(one), side(two))])


def test_no_question_and_no_seed_in_common():
    with pytest.raises(SdpoError, match="a and b have no answered question in common"):
        contrast_models([(side(items("a", [1, 0])), side(items("b", [1, 0], task="hellaswag")))])
    late = seeds("dpo", 4).filter(pl.col("seed") > 1)
    with pytest.raises(SdpoError, match=r"sdpo has the seeds \[0, 1\], dpo \[2, 3\]: none in common"):
        contrast_models([(side(seeds("sdpo", 2)), side(late))])


def test_models_are_chosen_by_arm_seed_and_step():
    known = pl.concat([items("sdpo", [1], step=step, seed=seed) for seed, step in ((0, 1), (0, 2), (1, 1))])
    assert choose_models(known, "sdpo", 0).name == "sdpo step 2"
    assert choose_models(known, "sdpo", step=1).models == [(0, "key of sdpo 0 1"), (1, "key of sdpo 1 1")]
    with pytest.raises(SdpoError, match=r"do not end at the same step \(seed 0: step 2, seed 1: step 1\)"):
        choose_models(known, "sdpo")
    with pytest.raises(
        SdpoError, match=r"No answers of sdpo/0/3. There are, as arm/seed/step: sdpo/0/1, sdpo/0/2, sdpo/1/1"
    ):
        choose_models(known, "sdpo", 0, 3)


# --- clean questions ------------------------------------------------------------------------


def decontaminated(run: Path, touched: list[tuple[str, str, str]], unmatched: list[str] = []) -> Clean:  # noqa: B006
    """Write what decontamination leaves: all of the run's questions were matched but for some, and some stand in pairs.

    Args:
        touched: (item_id, the pair, the rule).
    """
    items = Run(run).items.select("protocol", "task", "item_id").unique(maintain_order=True)
    texts = items.filter(~pl.col("item_id").is_in(unmatched)).with_columns(text=pl.lit("What?"))
    write(run / "documents.parquet", texts, DOCUMENTS)
    rows = [(pair, item.split("/")[0], item, rule, "what") for item, pair, rule in touched]
    write(run / "contamination.parquet", pl.DataFrame(rows, CONTAMINATION, orient="row"), CONTAMINATION)
    clean = read_clean(Run(run))
    assert clean
    return clean


def test_clean_is_what_was_matched_and_stands_in_no_pair_of_the_run(run):
    assert read_clean(Run(run)) is None
    pair = Run(run).pairs["pair_id"][0]
    touched = [("hellaswag/1", pair, "question"), ("hellaswag/2", pair, "13-gram"), ("hellaswag/3", "gone", "8-gram")]
    clean = decontaminated(run, touched, unmatched=["hellaswag/4"])
    kept = clean.keep(Run(run).items.filter(task="hellaswag", arm="base"))["item_id"].to_list()
    assert kept == [f"hellaswag/{number}" for number in range(80) if number not in (1, 4)]
    (run / "config.yaml").write_text("decontaminate:\n  rules: [13-gram]\n")
    assert read_clean(Run(run)).touched["item_id"].to_list() == ["hellaswag/2"]
    (run / "documents.parquet").unlink()
    with pytest.raises(SdpoError, match=r"documents.parquet does not exist. Make it with: python -m sdpo_eval .*--doc"):
        read_clean(Run(run))


def test_clean_questions_are_contrasted_beside_all(run, tmp_path, capsys):
    # of six questions the first has 1, 3 and 5 alone; 1 and 3 stand in the pairs: 1 of 4 remains
    one, two = side(items("a", [0, 1, 0, 1, 0, 1])), side(items("b", [0] * 6))
    key = {"task": "arc_challenge", "item_id": [f"arc_challenge/{number}" for number in range(6)]}
    clean = Clean(pl.DataFrame(key), pl.DataFrame(key).filter(pl.col("item_id").str.contains("[13]$")))
    got = contrast_models([(one, two)], CompareConfig(primary="a - b", primary_task="arc_challenge"), clean=[clean])
    assert got.select("subset", "effect", "n", "only_first", "primary").rows() == [
        ("all", 50.0, 6, 3, True), ("clean", 25.0, 4, 1, True),
    ]  # fmt: skip
    half = Clean(pl.DataFrame(key).head(5), pl.DataFrame(key).head(0))
    both = contrast_models([(one, two)], clean=[clean, half])
    assert both.filter(subset="clean").select("effect", "n").rows() == [(0.0, 3)]  # 5 was not matched: not known
    nothing = Clean(pl.DataFrame(key).head(0), pl.DataFrame(key).head(0))
    assert contrast_models([(one, two)], clean=[nothing])["subset"].to_list() == ["all"]
    pair = Run(run).pairs["pair_id"][0]
    decontaminated(run, [(f"hellaswag/{number}", pair, "question") for number in range(30)])
    main([str(run)])
    assert "without the questions that the training pairs give away" in capsys.readouterr().out
    beside = tabulate_clean(compare_models(run)).rows(named=True)
    assert list(beside[0]) == ["task", "clean", "n clean", "clean:", "all", "n all", "all:"]
    assert [(row["task"], row["n clean"], row["n all"]) for row in beside[:3]] == [
        ("H4", 255, 285), ("ARC-Challenge", 60, 60), ("HellaSwag", 50, 80),
    ]  # fmt: skip
    rows = compare_models(run).filter(task="hellaswag").select("subset", "n").rows()
    assert rows == [("all", 80), ("clean", 50)]
    other = undecontaminated(tmp_path / "old", seed=1)  # not decontaminated: what this run says holds
    assert compare_models(other, run).filter(task="hellaswag")["n"].to_list() == [80, 50]


# --- what changed beneath -------------------------------------------------------------------


def test_fields_are_lm_evals_groups():
    harness = importlib.util.find_spec("lm_eval")
    assert harness is not None
    found: dict[str, list[str]] = {}
    for file in sorted((Path(harness.origin).parent / "tasks/mmlu/default").glob("mmlu_*.yaml")):
        text = file.read_text()
        if group := re.search(r'"?tag"?: "?mmlu_(\w+)_tasks', text):
            found.setdefault(group[1], []).append(re.search(r'"?dataset_name"?: "?(\w+)', text)[1])
    assert {field.lower().replace(" ", "_"): sorted(subjects) for field, subjects in FIELDS.items()} == found
    assert sum(map(len, FIELDS.values())) == 57


def test_forgetting_is_seen_where_it_is():
    # philosophy (humanities): 30 questions, 12 lost; virology (other): the 30 odd ones, 1 lost and 1 won
    before = items("base", [1.0] * 58 + [1.0, 0.0], step=0, task="mmlu")
    after = items("sdpo", [0.0, 1.0] * 12 + [1.0] * 33 + [0.0, 1.0, 1.0], task="mmlu")
    got = find_forgetting(side(after), side(before))
    told = {row["field"]: row for row in got.iter_rows(named=True)}
    assert told.keys() == {None, "humanities", "other"}
    assert told["humanities"]["effect"] == pytest.approx(-100 * 12 / 30)
    assert told["humanities"]["verdict"] == told[None]["verdict"] == "worse"
    assert (told["other"]["effect"], told["other"]["verdict"]) == (pytest.approx(0), "not distinguishable")
    assert told["other"]["n"] == 30


def test_flips_with_and_without_text():
    # 0 and 2 flip; the right answer's log-probability changed by -4 in 0 and +6 in 2: 2 comes first
    first = items("a", [0, 1, 1, 0]).with_columns(gold_logp=pl.Series([-5.0, -1.0, -1.0, -9.0]))
    second = items("b", [1, 1, 0, 0]).with_columns(gold_logp=pl.Series([-1.0, -9.0, -7.0, -1.0]))
    got = find_flips(find_changes(side(first), side(second), DOCUMENTS.to_frame()))
    assert got.select("item_id", "outcome", "change", "question").rows() == [
        ("arc_challenge/2", "became right", 6.0, "arc_challenge/2"),
        ("arc_challenge/0", "became wrong", -4.0, "arc_challenge/0"),
    ]
    documents = first.select("protocol", "task", "item_id", text=pl.lit("Why?")).head(1)
    told = find_flips(find_changes(side(first), side(second), documents))
    assert told["question"].to_list() == ["arc_challenge/2", "Why?"]


# --- the command ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    return undecontaminated(tmp_path / "new")


def undecontaminated(path, **settings) -> Path:
    made = make_run(path, **settings)
    (made / "contamination.parquet").unlink()
    return made


def test_two_runs_and_two_models_of_one(run, tmp_path):
    other = undecontaminated(tmp_path / "old", seed=1)
    got = sdpo_eval.compare_models(run, other)
    assert got.select("first", "second").unique().rows() == [("new: sdpo step 2", "old: sdpo step 2")]
    assert not got["primary"].any()  # sdpo - dpo is, by default
    assert compare_models(run)["second"][0] == "base"
    one, two = compare_models(run, a="sdpo/0/2", b="dpo"), compare_models(run, a="dpo", b="sdpo/0/2")
    assert (one["first"][0], one["second"][0]) == ("sdpo step 2", "dpo step 1")
    assert one["effect"].to_list() == pytest.approx([-effect for effect in two["effect"]])
    twin = make_run(tmp_path / "more" / "new", seed=1)
    assert compare_models(run, twin)["first"][0] == f"{run}: sdpo step 2"


@pytest.mark.parametrize(
    ("a", "words"),
    [
        ("sdpo/first", "'sdpo/first' names no model. Write ARM, ARM/SEED or ARM/SEED/STEP"),
        ("sdpo/0/1/2", "names no model"),
        ("random", "No answers of random. There are, as arm/seed/step: base/0/0, dpo/0/1, sdpo/0/1, sdpo/0/2"),
    ],
)
def test_a_model_that_is_not_there(run, a, words):
    with pytest.raises(SdpoError, match=words):
        compare_models(run, a=a)


def test_which_arm_is_meant_must_be_said(run):
    shutil.rmtree(run / "held_out_scores")
    for file in (run / "items").glob("sdpo-*"):
        frame = pl.read_parquet(file).with_columns(arm=pl.lit("random"))
        frame.write_parquet(file.with_name(file.name.replace("sdpo", "random")))
        file.unlink()
    with pytest.raises(SdpoError, match=r"has the arms dpo, random\. Say which to compare: --a ARM or --b ARM"):
        compare_models(run)


def test_a_run_without_answers(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(SdpoError, match=r"holds no answers. Make them with: python -m sdpo_eval "):
        compare_models(tmp_path / "run")


def test_non_inferiority_is_read_off_the_lower_end():
    row = {"verdict_on": CHECKPOINTS, "first": "a", "second": "b", "metric": "score", "subset": "all"}
    row |= {"effect": -0.5, "n": 9}
    rows = [row | {"task": "h4", "low": -1.0}, row | {"task": "mmlu", "low": -9.0}]
    table = pl.DataFrame([dict.fromkeys(CONTRASTS) | one for one in rows], CONTRASTS)
    assert find_worse(table, 1.0) == []  # exactly the margin; MMLU does not count beside H4
    assert find_worse(table, 0.99) == ["a against b, H4: it may be 1.00 points worse, allowed are 0.99."]
    assert find_worse(table.filter(task="mmlu"), 1.0) == [
        "a against b, MMLU: it may be 9.00 points worse, allowed are 1."
    ]
    methods = table.with_columns(verdict_on=pl.lit(METHODS), low=-3.0)
    assert len(find_worse(pl.concat([table, methods]), 2.0)) == 1  # the methods', where there are any
    assert len(find_worse(pl.concat([table, table.with_columns(subset=pl.lit("clean"), low=-9.0)]), 1.0)) == 0


def test_the_command_prints_the_contrasts(run, capsys):
    main([str(run), "--a", "sdpo", "--b", "dpo"])
    said = capsys.readouterr().out
    assert "sdpo step 2 − dpo step 1" in said
    assert "H4" in said
    assert "on these checkpoints, not on the methods behind them" in said


def test_the_command_shows_questions_that_flipped(run, capsys):
    texts = Run(run).items.filter(arm="base", task="hellaswag").select("protocol", "task", "item_id")
    texts = texts.with_columns(text=pl.format("What is {}?", "item_id"))
    write(run / "questions/hellaswag.parquet", texts, DOCUMENTS)
    main([str(run), "--flips", "9999"])
    said = " ".join(capsys.readouterr().out.split())
    held, prompts = as_items(read_held_out(Run(run))), Run(run).held_out
    texts = pl.concat([Run(run).questions, as_documents(prompts, read_held_out(Run(run)))])
    answers = pl.concat([Run(run).items, held])
    flips = find_flips(find_changes(choose_models(answers, "sdpo"), choose_models(answers, "base"), texts))
    assert f"sdpo step 2 − base: {flips.height:,} questions that one alone gets right" in said
    of_pairs = flips.filter(task=HELD_OUT)["question"]
    assert of_pairs.len()
    assert set(of_pairs) <= set(prompts.select(plain_texts(prompts, "prompt")).to_series())
    shown = flips.filter(task="hellaswag").height
    assert 0 < shown == said.count("What is hellaswag/")


def test_the_exit_code_of_a_worse_model(run, capsys):
    main([str(run), "--fail-if-worse", "99"])
    with pytest.raises(SystemExit) as exit_:
        main([str(run), "--a", "base", "--b", "sdpo", "--fail-if-worse", "0"])
    assert exit_.value.code == 3
    assert (
        "fail-if-worse: base against sdpo step 2, H4: it may be 4.80 points worse, allowed are 0."
        in capsys.readouterr().out
    )
    with pytest.raises(SdpoError, match=r"--fail-if-worse -1\.0: name how many points worse is still allowed"):
        main([str(run), "--fail-if-worse", "-1"])


def test_the_same_weights_do_not_differ(run, capsys):
    main([str(run), "--a", "base", "--fail-if-worse", "0"])
    assert "base and base are the same weights: there is no difference" in capsys.readouterr().out


# --- the report -----------------------------------------------------------------------------


def test_the_report_shows_changes_and_alarms(run):
    base = pl.read_parquet(run / "items/base-0-0-hellaswag.parquet").with_columns(correct=1.0, score=1.0)
    base.write_parquet(run / "items/base-0-0-hellaswag.parquet")
    report = Report(run)
    assert any(warning.startswith("Forgetting: sdpo step 2 − base, HellaSwag −") for warning in report.warnings)
    assert report.table("forgetting").filter(part="HellaSwag")["forgotten"].to_list() == ["yes", "yes"]
    assert report.table("likelihoods").columns[-3:] == ["gold_logp", "logp_margin", "choice_margin"]
    asked = report.table("flipped_questions")["question"].to_list()
    texts = base.select("protocol", "task", "item_id", text=pl.format("What is {}?", "item_id"))
    write(run / "questions/hellaswag.parquet", texts, DOCUMENTS)
    assert "What is hellaswag/0?" not in asked
    assert any("What is hellaswag/" in question for question in Report(run).table("flipped_questions")["question"])


def test_the_primary_contrast_is_read_from_the_config(run):
    with (run / "config.yaml").open("a") as file:
        file.write("compare:\n  primary: sdpo - base\n")
    assert "The primary contrast is sdpo - base by H4" in Report(run).markdown()
    (run / "config.yaml").write_text("compare:\n  primary: sdpo - random\n")
    assert "sdpo - random by H4, the primary one, cannot be had from this run" in Report(run).markdown()
    (run / "config.yaml").write_text("compare:\n  primry: sdpo - random\n")
    with pytest.raises(SdpoError, match=r"compare has no setting 'primry'. Did you mean 'primary'\?"):
        Report(run)


def test_the_report_crosses_seeds(run):
    """Arms of five seeds: the verdict is on the methods, the table has both kinds."""
    for (arm, step), key in KEYS.items():
        for seed in range(1, 5) if step else ():
            for task in TASKS:
                frame = pl.read_parquet(run / f"items/{arm}-0-{step}-{task}.parquet")
                model = {"seed": pl.lit(seed, pl.Int64), "model_key": pl.lit(f"{key}{seed}")}
                moved = pl.col("score") if seed % 2 else pl.col("score").reverse()
                frame.with_columns(**model, score=moved).write_parquet(
                    run / f"items/{arm}-{seed}-{step}-{task}.parquet"
                )
    results = pl.read_parquet(run / "results.parquet")
    later = [results.filter(pl.col("step") > 0).with_columns(seed=pl.lit(seed, pl.Int64)) for seed in range(1, 5)]
    pl.concat([results, *later]).write_parquet(run / "results.parquet")
    report = Report(run)
    assert "| sdpo step 2 − base | these methods | H4 | " in report.markdown()
    kinds = report.table("contrasts")["verdict_on"].value_counts().rows()
    assert kinds == [(METHODS, 3)]  # what decides; the fifteen pairs of checkpoints stand with all others
    others = report.table("task_contrasts").filter(task="H4")["verdict_on"].value_counts().rows()
    assert others == [(CHECKPOINTS, 15)]
    assert 'id="figure-contrasts"' in report.html()


def test_held_out_pairs_are_questions_by_hand():
    # margins: base +2, -1, -3, +1; sdpo +3, +1, -2, 0 (a tie is not right). Right: base 1 0 0 1, sdpo 1 1 0 0.
    # differences of the score 0, 100, 0, -100: mean 0; of logp_margin 1, 2, 1, -1: mean 0.75 nats
    prompts = ["a", "a", "b", "c"]
    table = {"base": [2.0, -1.0, -3.0, 1.0], "sdpo": [3.0, 1.0, -2.0, 0.0]}
    sides = []
    for arm, margins in table.items():
        rows = [
            (arm, 0, int(arm != "base"), f"p{n}", prompts[n], "s", f"key of {arm}", margin - 9.0, -9.0, 3, 3, 5, False,
             "float32", *[None] * 5)
            for n, margin in enumerate(margins)
        ]  # fmt: skip
        sides.append(side(as_items(pl.DataFrame(rows, HELD_OUT_SCORES, orient="row"))))
    assert sides[1].items["correct"].to_list() == [1, 1, 0, 0]
    config = CompareConfig(primary="sdpo - base", primary_task=HELD_OUT)
    got = contrast_models([(sides[1], sides[0])], config, ["score", "logp_margin"])
    assert got.select("task", "metric", "effect", "n", "primary").rows() == [
        (HELD_OUT, "score", 0.0, 4, True),
        (HELD_OUT, "logp_margin", 0.75, 4, False),
    ]
    assert got.select("only_first", "only_second").row(0) == (1, 1)
    asked, _ = pair_questions([(sides[1], sides[0])])[HELD_OUT]
    assert asked["cluster"].to_list() == prompts
    coarse = Side("base", "base", sides[0].items.with_columns(protocol=pl.lit("held_out@bfloat16")))
    with pytest.raises(SdpoError, match=r"held_out under held_out@float32, base under held_out@bfloat16"):
        contrast_models([(sides[1], coarse)])


def test_the_verdict_may_be_named_on_held_out_pairs(run):
    with (run / "config.yaml").open("a") as file:
        file.write("compare:\n  primary_task: held_out\n")
    report = Report(run)
    lead = report.markdown().split("sdpo step 2 against dpo step 1: ", 1)[1]
    assert lead.index("held-out accuracy, ") < lead.index("H4, ")
    assert "The primary contrast is sdpo - dpo by held-out accuracy" in report.markdown()
    assert set(report.table("contrasts")["task"]) == {"held-out accuracy"}
    assert "H4" in set(report.table("task_contrasts")["task"])
    for file in (*run.glob("items/*"), run / "results.parquet"):
        file.unlink()
    alone = Report(run)  # not evaluated yet: held-out pairs decide, and H4's command is named
    assert "held-out accuracy: base " in alone.markdown()
    assert any(warning.startswith("H4 of the base model and of every step is missing") for warning in alone.warnings)


def test_answers_that_do_not_differ_show_no_less_than_the_rule_of_three():
    # no question of 300 differs: at most 3 of 300 became wrong, 1 point. H4 of four tasks, the smallest of 40: that one
    # may have lost 3 of 40, 7.5 points, a quarter of which is H4's: 1.875
    same = [side(items(arm, [1, 0, 1] * 100)) for arm in "ab"]
    got = contrast_models([tuple(same)])
    assert got["low"].to_list() == [None]
    assert find_worse(got, 1.0) == []
    [sentence] = find_worse(got, 0.99)
    assert sentence.startswith("a against b, ARC-Challenge: it may be 1.00 points worse, allowed are 0.99: no question")
    assert sentence.endswith("no question of 300 differs from another, and so few show no less (rule of three, 95 %).")
    four = [
        side(pl.concat([items(arm, [1, 0] * (20 if task == "mmlu" else 60), task=task) for task in TASKS]))
        for arm in "ab"
    ]
    h4 = contrast_models([tuple(four)])
    assert find_worse(h4, 1.875) == []
    assert "H4: it may be 1.88 points worse, allowed are 1.87" in find_worse(h4, 1.87)[0]
    lost = contrast_models([(side(items("a", [0] * 300)), side(items("b", [1] * 300)))])  # every one of them is wrong
    assert "it may be 101.00 points worse" in find_worse(lost, 50)[0]


def test_the_gate_passes_the_same_weights_of_the_same_tokenizer(run, capsys):
    base = {task: pl.read_parquet(run / f"items/base-0-0-{task}.parquet") for task in TASKS}
    shutil.rmtree(run / "held_out_scores")

    def copy(**change):
        for task, own in base.items():
            values = {"arm": pl.lit("copy"), "seed": pl.lit(3, pl.Int64)} | change
            own.with_columns(**values).write_parquet(run / f"items/copy-3-0-{task}.parquet")

    copy()
    main([str(run), "--a", "copy", "--fail-if-worse", "0"])
    assert "copy and base are the same weights: there is no difference" in capsys.readouterr().out
    for task, own in base.items():
        own.with_columns(tokenizer_key=pl.lit("one")).write_parquet(run / f"items/base-0-0-{task}.parquet")
    copy(tokenizer_key=pl.lit("one"))
    main([str(run), "--a", "copy", "--fail-if-worse", "0"])
    capsys.readouterr()
    for change in ({"tokenizer_key": pl.lit("other")}, {"model_key": pl.lit("other weights")}):
        copy(**change)  # the same answers of another model: of 50 to 95 questions a task, 3 / 50 / 4 is shown
        main([str(run), "--a", "copy", "--fail-if-worse", "1.5"])
        with pytest.raises(SystemExit):
            main([str(run), "--a", "copy", "--fail-if-worse", "1.49"])
        assert "it may be 1.50 points worse, allowed are 1.49: no question of 285 differs" in capsys.readouterr().out


def test_only_the_contrast_that_the_config_names_is_primary(run, capsys):
    def primary(**sides):
        return compare_models(run, **sides).filter("primary").select("first", "second", "task").rows()

    assert primary() == []  # sdpo - base; named is sdpo - dpo
    whole = compare_models(run)
    p = whole["p"].fill_null(1.0).to_list()
    assert whole["p_holm"].min() == pytest.approx(min(1, len(p) * min(p)))
    main([str(run)])
    said = " ".join(capsys.readouterr().out.split())
    assert "is sdpo - dpo by H4, which is none of these: all are adjusted for looking at several" in said
    assert primary(b="dpo") == [("sdpo step 2", "dpo step 1", "h4")]
    assert primary(a="dpo", b="sdpo") == [("dpo step 1", "sdpo step 2", "h4")]
    main([str(run), "--b", "dpo"])
    assert "The primary contrast is sdpo - dpo by H4: it alone is not adjusted" in capsys.readouterr().out
    with (run / "config.yaml").open("a") as file:
        file.write("compare:\n  primary: sdpo - base\n  primary_task: mmlu\n")
    assert primary() == [("sdpo step 2", "base", "mmlu")]
    assert primary(b="dpo") == []


def test_mcnemar_takes_independent_questions_alone(run, capsys):
    first, second = items("a", [1, 1, 0, 1]), items("b", [0, 1, 0, 0])
    shared = first.with_columns(cluster=pl.Series(["x", "y", "x", "z"]))
    assert contrast_models([(side(first), side(second))])["p_mcnemar"].to_list() == [0.25]
    assert contrast_models([(side(shared), side(second))])["p_mcnemar"].to_list() == [None]
    table = tabulate(compare_models(run))
    told = dict(table.select("task", "p McNemar").rows())
    assert told["H4"] == told["MMLU"] == told["TruthfulQA"] == told["held-out accuracy"] == ""  # pairs share prompts
    assert told["ARC-Challenge"] == f"{compare_models(run).filter(task='arc_challenge')['p_mcnemar'][0]:.4f}"
    assert all(table["n for 1 point"].str.contains(r"^[\d,]+$"))


def test_what_lies_beneath_the_score_is_shown(run, capsys):
    metrics = ["score", "gold_logp", "logp_margin", "choice_margin"]
    got = compare_models(run, metrics=metrics)
    beneath = tabulate_beneath(got)
    assert beneath.columns == ["task", "gold_logp", "logp_margin", "choice_margin", "n"]
    assert beneath["task"].to_list() == ["ARC-Challenge", "HellaSwag", "MMLU", "TruthfulQA", "held-out accuracy"]
    row = got.filter(task="mmlu", metric="gold_logp").row(0, named=True)
    shown = f"{row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] {row['verdict']}"
    assert beneath["gold_logp"][2] == shown
    assert beneath["logp_margin"][3] == ""  # TruthfulQA's has several right answers
    assert tabulate_beneath(compare_models(run)).is_empty()
    assert set(tabulate(got)["task"]) == set(tabulate(compare_models(run))["task"])
    main([str(run)])
    assert "beneath the score" in capsys.readouterr().out


def test_flips_are_told_from_step_to_step(run):
    """Of sdpo's two steps: step 1 against the base model, step 2 against step 1; dpo's one step is no chain."""
    pairs = [(one.name, two.name) for one, two in pair_steps(read_evidence(Run(run)))]
    assert pairs == [("sdpo seed 0 step 1", "base"), ("sdpo seed 0 step 2", "sdpo seed 0 step 1")]
    counted = Report(run).table("flips")
    assert "sdpo seed 0 step 2 − sdpo seed 0 step 1" in set(counted["contrast"])


def test_flips_are_told_of_one_arm_by_itself(run):
    """Without base and without another arm there are no two sides, but still step 2 after step 1."""
    whole = read_evidence(Run(run))
    own = {name: getattr(whole, name).filter(arm="sdpo", seed=0) for name in ("items", "results", "held_out_scores")}
    alone = replace(whole, **own)
    tables = {block.name: block for block in tell_changes(alone) if isinstance(block, Table)}
    assert {row["contrast"] for row in tables["flips"].rows} == {"sdpo seed 0 step 2 − sdpo seed 0 step 1"}


def test_held_out_pairs_fail_no_gate_but_alone():
    known = contrast_models([(side(items("a", [0, 1] * 20)), side(items("b", [1, 0] * 20)))])
    held = known.with_columns(task=pl.lit(HELD_OUT), low=pl.lit(-50.0))
    fine = known.with_columns(low=pl.lit(0.0))
    assert find_worse(pl.concat([fine, held]), 1.0) == []
    assert "held-out accuracy: it may be 50.00 points worse" in find_worse(held, 1.0)[0]
