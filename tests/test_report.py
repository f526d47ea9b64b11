"""The report, from run folders of test data: as files, as a page in Chromium, with hostile pairs."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
import ruamel.yaml
from made_run import KEYS, make_run, write
from markdown_it import MarkdownIt

import sdpo_eval
from sdpo_data.run import Run
from sdpo_data.tables import DOCUMENTS, ITEMS, METRICS, PAIRS, RESULTS, SCORES, STEPS, SdpoError
from sdpo_eval import compare
from sdpo_eval.blocks import Estimate, write_number
from sdpo_eval.chain import CURVES, FAMILIES, LOGGED
from sdpo_eval.changes import find_changes
from sdpo_eval.contrasts import Side
from sdpo_eval.evidence import comparable_results, last_metrics, read_evidence
from sdpo_eval.hub import write_model_index
from sdpo_eval.margins import summarise_margins
from sdpo_eval.render import LONGEST_ANSWER, visible
from sdpo_eval.report import Report, is_current, main
from sdpo_eval.sections import _floor, list_commands

OF_PAIRS = {"difficulties", "margin_curves", "length_confound", "definitions"}
OF_TRAINING = {"loss", "gradient_norms", "reward_margins", "reward_accuracies", "reference_margins", "weights"}
OF_TRAINING |= {"held_out", "displacement"}
OF_ANSWERS = {"h4", "tasks", "paper_scale", "items", "contrasts"}
FIGURES = {"findings"} | OF_ANSWERS | OF_PAIRS | OF_TRAINING
HOSTILE = (
    "</script><script>document.documentElement.dataset.hacked = 1</script>"
    '<img src=x onerror="document.documentElement.dataset.hacked = 1"> {{ 7*7 }} {% raw %} | a ``` b _c_ **d**'
    " [e](http://x.example)\n```\n<b>out</b>\n\u202egnol\u2066 \x00\x07\x1b[31m \u2028 &lt; <!-- \U000e0041"
)
MEGABYTES = "long " * 400_000


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def page(run) -> str:
    return Report(run).html()


@pytest.fixture(scope="module")
def hostile_page(hostile_run) -> str:
    return Report(hostile_run).html()


@pytest.fixture
def own_run(run, tmp_path) -> Path:
    """A run to spoil."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory) -> Path:
    return attack(make_run(tmp_path_factory.mktemp("hostile") / "run"))


def attack(path: Path) -> Path:
    """Let a run's pairs, sources, reasons, questions and settings attack the page."""
    pairs, partition = pl.read_parquet(path / "pairs.parquet"), pl.read_parquet(path / "partition.parquet")
    edges = partition.sort("difficulty")["pair_id"]
    hit = pl.when(pl.col("pair_id").is_in(edges.gather([0, -1]).to_list()))
    texts = {
        "prompt": HOSTILE,
        "chosen": MEGABYTES,
        "rejected": HOSTILE + MEGABYTES,
        "source": HOSTILE,
        "format": "text",
    }
    pairs = pairs.with_columns(**{name: hit.then(pl.lit(text)).otherwise(name) for name, text in texts.items()})
    write(path / "pairs.parquet", pairs, PAIRS)
    for name in ("scores", "partition"):
        table = pl.read_parquet(path / f"{name}.parquet")
        table.with_columns(source=hit.then(pl.lit(HOSTILE + MEGABYTES)).otherwise("source")).write_parquet(
            path / f"{name}.parquet"
        )
    dropped = pl.read_parquet(path / "dropped.parquet")
    dropped.with_columns(reason=pl.lit(HOSTILE), source=pl.lit(MEGABYTES)).write_parquet(path / "dropped.parquet")
    items = pl.read_parquet(path / "items/sdpo-0-2-hellaswag.parquet")
    documents = items.select("protocol", "task", "item_id", text=pl.lit(HOSTILE + MEGABYTES))
    documents.write_parquet(path / "documents.parquet")
    lineage = json.loads((path / "lineage.json").read_text())
    lineage["pairs"] |= {"host": HOSTILE, "recipe": {"limit": 36, "source": [HOSTILE]}}
    (path / "lineage.json").write_text(json.dumps(lineage))
    quoted = re.sub(r"[^ -~]", "", HOSTILE).replace("'", "''")
    (path / "config.yaml").write_text(f"model: '{quoted}'  # \u202egnol\n")
    return path


# --- what it says ---------------------------------------------------------------------------


def test_the_whole_report_is_written_and_small(own_run):
    page = Report(own_run).save()
    assert page == own_run / "report.html"
    content = page.read_text("utf-8")
    assert set(re.findall(r'<figure id="figure-(\w+)">', content)) == FIGURES
    sections = ["verdict", "h4", "difficulty", "chain", "data", "cost", "reproduce"]
    assert re.findall(r'<section id="(\w+)"', content) == sections
    assert re.findall(r'<a href="#(\w+)">', content) == sections
    assert len(content) < 5e6
    assert not list(own_run.glob(".*.tmp"))


def test_numbers_in_json_are_those_of_the_tables(run):
    report, results = json.loads(Report(run).json()), pl.read_parquet(run / "results.parquet")
    row = report["tables"]["h4"]["scores"]["rows"][3]
    value, stderr, n = results.filter(arm="sdpo", step=2, task="h4").select("value", "stderr", "n").row(0)
    assert row["model"] == "sdpo step 2"
    assert row["H4"] == {"value": value, "stderr": stderr, "n": n}
    losses = [row["first_loss"] for row in report["tables"]["chain"]["hand_off"]["rows"]]
    assert losses == pytest.approx([math.log(2)] * 3)
    assert report["tables"]["difficulty"]["sizes"]["rows"][0]["pairs"] == 80
    assert report["tables"]["data"]["dropped"]["rows"][0] == {
        "stage": "pairs", "source": "alpaca-eval", "reason": "tie", "rows": 31,
    }  # fmt: skip


@pytest.mark.real
def test_the_same_run_gives_the_same_report(run, page):
    one, two = Report(run), Report(run)
    assert (one.html(), one.markdown(), one.json()) == (page, two.markdown(), two.json())


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(run, page):
    shown = sdpo_eval.Report(run)._repr_html_()
    frame = re.fullmatch(r'<iframe srcdoc="([^"]*)" sandbox="allow-scripts" [^>]*></iframe>', shown)
    assert frame
    assert html.unescape(frame[1]) == page
    assert "save()" in repr(Report(run))


@pytest.mark.real
def test_few_questions_make_a_wiring_run_and_all_of_them_make_none(own_run):
    assert "Wiring run: it shows that the chain works; its H4 decides nothing." in said(own_run)
    assert "ARC-Challenge 60 of 1,172" in said(own_run)
    results = pl.read_parquet(own_run / "results.parquet")
    results.with_columns(n=pl.lit(600, pl.Int64)).write_parquet(own_run / "results.parquet")
    assert "Limited run." in said(own_run)
    assert "Wiring run" not in said(own_run)
    results.with_columns(n="n_full").write_parquet(own_run / "results.parquet")
    assert "Limited run" not in said(own_run)
    assert "Wiring run" not in said(own_run)


@pytest.mark.real
def test_a_missing_task_leaves_no_h4(tmp_path):
    run = make_run(tmp_path / "run", tasks=["arc_challenge", "hellaswag", "mmlu"])
    report = Report(run)
    missing = json.loads(report.json())["missing"]
    assert "no H4" in missing[0]["text"]
    assert "TruthfulQA" in missing[0]["text"]
    assert missing[0]["command"] == f"python -m sdpo_eval {run} --truthfulqa FILE"
    assert "H4" not in report.table("scores").columns
    assert "its scores decide nothing" in said(run)
    assert 'id="figure-h4"' not in report.html()


def test_verdict_on_a_difference_by_its_interval(own_run):
    # Every answer of sdpo's step 2 is 0.25 better than the base model's or 0.15 better, in turn: over 80
    # questions the difference is 20 points, far from 0. For dpo it is +0.2 and -0.2: 0 on average.
    changes = {("sdpo", 2): [0.25, 0.15], ("dpo", 1): [0.2, -0.2]}
    base = pl.read_parquet(own_run / "items/base-0-0-hellaswag.parquet").with_columns(score=0.5)
    base.write_parquet(own_run / "items/base-0-0-hellaswag.parquet")
    for (arm, step), change in changes.items():
        model = {"arm": pl.lit(arm), "step": pl.lit(step, pl.Int64), "model_key": pl.lit(KEYS[arm, step])}
        scores = pl.Series([0.5 + change[i % 2] for i in range(base.height)])
        base.with_columns(**model, score=scores).write_parquet(own_run / f"items/{arm}-0-{step}-hellaswag.parquet")
    rows = json.loads(Report(own_run).json())["tables"]["h4"]["task_contrasts"]["rows"]
    told = {(row["contrast"], row["task"]): row for row in rows}
    assert told["sdpo step 2 − base", "HellaSwag"]["difference"]["value"] == pytest.approx(20)
    assert told["sdpo step 2 − base", "HellaSwag"]["verdict"] == "better"
    assert told["dpo step 1 − base", "HellaSwag"]["verdict"] == "not distinguishable"
    assert told["sdpo step 2 − dpo step 1", "HellaSwag"]["verdict"] == "better"
    assert "These verdicts are on these checkpoints, not on the methods" in said(own_run)


EACH = "each step started from"
NEITHER = "not a chain: a step starts from, or is held to, weights that its chain did not write"


@pytest.mark.real
@pytest.mark.parametrize(
    ("changed", "declared", "words"),
    [
        ({}, {}, f"{EACH}, and was held to, the very weights that the step before wrote"),
        ({"reference_key": "S"}, {}, f"{EACH} the step before and was held to S"),  # sdpo_fixed
        ({"start_key": "S"}, {}, f"{EACH} S and was held to the step before"),  # target_from_s
        ({"reference_key": "f0" * 16}, {}, NEITHER),
        ({"start_key": "f0" * 16, "reference_key": "f0" * 16}, {}, NEITHER),
        ({}, {"reference": "S"}, "the reference of step 2 does not have the weights that its arm declares"),
        ({"start_key": "S"}, {"start": "M1"}, "the start of step 2 does not have the weights that its arm declares"),
    ],
)
def test_the_hand_off_is_judged_by_the_weights_and_by_what_the_arm_declares(own_run, changed, declared, words):
    keys = {"S": KEYS["base", 0], "M1": KEYS["sdpo", 1]}
    path = own_run / "arms/sdpo/seed_0/steps.parquet"
    late = pl.col("step") == 2
    own = {name: pl.when(late).then(pl.lit(keys.get(key, key))).otherwise(name) for name, key in changed.items()}
    write(path, pl.read_parquet(path).with_columns(**own), STEPS)
    lineage = json.loads((own_run / "lineage.json").read_text())
    recipe = lineage["arms/sdpo/seed_0/step_2"]["recipe"]
    told = {name.removesuffix("_key"): keys.get(key, key) for name, key in changed.items()}
    recipe |= told | {name: keys[key] for name, key in declared.items()}  # what was done was declared, but where said
    (own_run / "lineage.json").write_text(json.dumps(lineage))
    report = Report(own_run)
    assert f"sdpo, seed 0: {words}" in said(own_run)
    loud = any(text.startswith("sdpo, seed 0:") for text in report.warnings)
    assert loud == (words == NEITHER or "declares" in words)
    off = [row["off_log_2"] for row in json.loads(report.json())["tables"]["chain"]["hand_off"]["rows"]]
    assert (off[2] is None) == (len(changed) == 1)  # only what starts from its reference starts at log 2


def test_the_arms_are_told_by_what_they_did(tmp_path):
    run = make_run(tmp_path / "run", core=True)
    lineage = json.loads((run / "lineage.json").read_text())
    lineage["arms/dpo/seed_0/step_1"]["recipe"] |= {"beta": 0.05}
    (run / "lineage.json").write_text(json.dumps(lineage))
    report = Report(run)
    arms = {row["arm"]: row for row in json.loads(report.json())["tables"]["h4"]["arms"]["rows"]}
    assert list(arms) == ["sdpo", "dpo", "random", "random_fixed", "sdpo_fixed"]
    assert [arms["sdpo_fixed"][name] for name in ("order", "starts_from", "held_to")] == [
        "the parts, easiest first", "the step before", "S",
    ]  # fmt: skip
    assert arms["sdpo_fixed"]["differs_from_sdpo_in"] == "held to"
    assert arms["random_fixed"]["differs_from_sdpo_in"] == "order, held to"
    assert arms["dpo"]["differs_from_sdpo_in"] == "order, starts from, held to, steps, updates, beta"
    assert (arms["sdpo"]["beta"], arms["dpo"]["beta"]) == ("0.1", "0.05")
    assert "learning_rate" not in arms["dpo"]  # which no arm has of its own
    tokens = pl.read_parquet(run / "arms/dpo/seed_0/steps.parquet")["tokens"][0]
    sizes = report.table("arm_sizes").filter(arm="dpo").row(0, named=True)
    assert [sizes[name] for name in ("pairs", "tokens", "updates")] == ["160", f"{tokens:,}", "8"]
    assert any(text.startswith("The arms are not equal in updates (8 to 16)") for text in report.warnings)
    assert report.table("factorial")["contrast"].to_list() == [
        "order: easy to hard − random", "reference: moving − fixed", "interaction: both or neither − one alone",
    ]  # fmt: skip
    assert 'id="figure-factorial"' in report.html()
    assert "The core factorial, points of H4: order (easy to hard − random)" in said(run)


def test_log_2_is_drawn_and_told_of_the_sigmoid_loss_alone(own_run):
    assert "log 2 = 0.6931" in Report(own_run).html()
    lineage = json.loads((own_run / "lineage.json").read_text())
    lineage["arms/sdpo/seed_0/step_1"]["recipe"] |= {"loss": ["ipo"]}
    (own_run / "lineage.json").write_text(json.dumps(lineage))
    report = Report(own_run)
    assert "log 2 = 0.6931" not in report.html()
    assert "off_log_2" not in report.table("hand_off").columns


def said(run: Path) -> str:
    return " ".join(prose["text"] for prose in json.loads(Report(run).json())["prose"])


def test_the_verdict_begins_with_two_sentences_the_first_on_the_primary_contrast(run):
    leads = [prose["text"] for prose in json.loads(Report(run).json())["prose"] if prose["lead"]]
    number, interval = r"[+−]\d+\.\d", r"\[[+−]\d+\.\d, [+−]\d+\.\d\]"
    verdict = rf"{number} {interval} H4, (better|worse|not distinguishable)( once adjusted [a-z ]+,)? at n = 285"
    assert len(leads) == 2
    assert re.fullmatch(rf"sdpo step 2 against dpo step 1: {verdict}\.", leads[0])
    assert re.fullmatch(rf"sdpo step 2 against base: {verdict}; dpo step 1 against base: {verdict}\.", leads[1])


def test_how_to_reproduce_names_every_stage_in_an_order_that_runs(own_run):
    lineage = json.loads((own_run / "lineage.json").read_text())
    for stage in ("fix", "contamination", "documents", "held_out_scores/base-0-0", "adaptive/sdpo"):
        lineage[stage] = lineage["pairs"]
    (own_run / "lineage.json").write_text(json.dumps(lineage))
    listed = [line.split(" ", 2)[2].replace(str(own_run), "RUN") for line in list_commands(read_evidence(Run(own_run)))]
    assert listed == [
        "sdpo_data.pairs RUN", "sdpo_data.pairs RUN --fix", "sdpo_eval RUN --documents",
        "sdpo_data.decontaminate RUN", "sdpo_data.partition RUN", "sdpo_train RUN", "sdpo_eval.held_out RUN",
        "sdpo_eval RUN", "sdpo_eval.report RUN",
    ]  # fmt: skip
    assert "commands that this list does not know: adaptive" in said(own_run)
    for stage in ("fix", "contamination", "documents", "held_out_scores/base-0-0", "adaptive/sdpo"):
        del lineage[stage]
    (own_run / "lineage.json").write_text(json.dumps(lineage))
    assert "sdpo_data.pairs" not in " ".join(list_commands(read_evidence(Run(own_run))))  # partition makes them


def test_what_a_pass_costs_by_hand(scores):
    # prompts 7 + 8 + 9 + 10 + 11 = 45, answers 6 + 7 + 5 + 17 + 5 = 40: apart 2 * 45 + 40 = 130, together 85;
    # with a and b asking the same (8 tokens at most): 85 - 7 = 78, of which 130 is 1.67 times
    both = scores.with_columns(prompt_id=pl.when(pl.col("pair_id") == "a").then(pl.lit("q2")).otherwise("prompt_id"))
    rows = next(_floor(both)).rows
    assert [(row["tokens"], str(row["times_the_floor"])) for row in rows] == [(130, "1.67"), (85, "1.09"), (78, "1.00")]


def test_the_time_of_scoring_and_of_updates_is_set_against_the_floor(own_run, scores):
    # 85 tokens a pass, 78 with a and b asking the same: see above. Scored in 2 s: 42.5 and 39 a second. Trained on for
    # two epochs, 170 tokens of at least 156, in 5 s: 34 and 31.2 a second.
    both = scores.with_columns(prompt_id=pl.when(pl.col("pair_id") == "a").then(pl.lit("q2")).otherwise("prompt_id"))
    write(own_run / "scores.parquet", both, SCORES)
    write(own_run / "arms/dpo/seed_0/step_1/reference_scores.parquet", both, SCORES)
    steps = pl.read_parquet(own_run / "arms/dpo/seed_0/steps.parquet")
    write(own_run / "arms/dpo/seed_0/steps.parquet", steps.with_columns(tokens=pl.lit(170, pl.Int64)), STEPS)
    logged = pl.read_parquet(own_run / "arms/dpo/seed_0/step_1/metrics.parquet")
    took = pl.when(pl.col("name") == "cost/train_seconds").then(5.0).otherwise("value")
    write(own_run / "arms/dpo/seed_0/step_1/metrics.parquet", logged.with_columns(value=took), METRICS)
    lineage = json.loads((own_run / "lineage.json").read_text())
    lineage["scores"]["seconds"] = 2.0
    (own_run / "lineage.json").write_text(json.dumps(lineage))
    cost = json.loads(Report(own_run).json())["tables"]["cost"]
    rows = {row["what"]: row for row in cost["speed"]["rows"]}
    told = ("pairs", "seconds", "tokens", "tokens_per_second", "floor_tokens", "floor_tokens_per_second")
    assert [rows["scoring all pairs"][name] for name in told] == [5, 2.0, 85, 42, 78, 39]
    assert [rows["updates of dpo/0/1"][name] for name in told] == [5, 5.0, 170, 34, 156, 31]
    assert rows["updates of dpo/0/1"]["times_the_floor"]["value"] == pytest.approx(85 / 78)
    phases = {(row["arm"], row["step"]): row for row in cost["phases"]["rows"]}
    assert phases["sdpo", 2] == {"arm": "sdpo", "seed": 0, "step": 2, "reference": 30, "train": 160, "diagnose": 24} | {
        "peak_memory": 2525
    }


def test_what_limits_the_data_and_what_is_not_pinned_is_said_loudly(own_run):
    lineage = json.loads((own_run / "lineage.json").read_text())
    limits = {"caps": {"piqa": 1200, "alpaca-eval": 30}, "weights": {"piqa": 3.0, "alpaca-eval": 1.0}}
    lineage["pairs"]["recipe"] = {"limit": None, "source": ["org/pairs:train", "embedded:piqa"]} | limits
    (own_run / "lineage.json").write_text(json.dumps(lineage))
    (own_run / "config.yaml").write_text("model: org/model\nscore:\n  against: other/strong\n")
    loud = Report(own_run).warnings
    assert "Limited data: at most 1,200 of piqa, 30 of alpaca-eval were taken (pairs.caps)." in loud
    assert any(text.endswith("(pairs.weights): piqa 3, alpaca-eval 1.") for text in loud)
    unpinned = [text.split()[1] for text in loud if text.startswith("Unpinned: ")]
    assert unpinned == ["org/model", "other/strong", "org/pairs:train"]


def test_a_report_is_out_of_date_when_the_questions_change(own_run):
    write(own_run / "questions/mmlu.parquet", pl.read_parquet(own_run / "documents.parquet"), DOCUMENTS)
    Report(own_run).save()
    assert is_current(Run(own_run))
    write(own_run / "questions/mmlu.parquet", pl.read_parquet(own_run / "documents.parquet").head(3), DOCUMENTS)
    assert not is_current(Run(own_run))


def test_what_training_logged_is_told_with_its_standard_error(run):
    # KL: answers with log ratios 0.5 and 1 against the reference, twice that against S in step 2: k1 is their mean,
    # its error s / sqrt(2) = 0.5 / 2. The margin change is the mean of 1.5 + 2 (chosen tokens mod 7) nats.
    tables = json.loads(Report(run).json())["tables"]["chain"]
    logged = pl.read_parquet(run / "arms/sdpo/seed_0/step_2/metrics.parquet")
    value = dict(logged.sort("update").select("name", "value").rows())
    rows = {(row["arm"], row["step"]): row for row in tables["diagnostics"]["rows"]}
    for name in ("margin_ref_before", "margin_ref_after", "margin_change"):
        told = {"value": value[name], "stderr": value[f"{name}/stderr"], "n": None}
        assert rows["sdpo", 2][name] == told
    assert 1.5 <= value["margin_change"] <= 13.5
    assert rows["sdpo", 2]["pairs"] == 80
    rows = {(row["arm"], row["step"]): row for row in tables["divergence"]["rows"]}
    assert rows["sdpo", 2]["from_reference_k1"] == {"value": 0.75, "stderr": pytest.approx(0.25), "n": 2}
    assert rows["sdpo", 2]["from_base_k1"] == {"value": 1.5, "stderr": pytest.approx(0.5), "n": 2}
    assert tables["log_ratios"]["rows"][0]["chosen_to_reference"]["value"] < 0
    assert tables["rewards"]["rows"][2]["chosen"]["value"] == pytest.approx(-0.05)  # beta 0.1 times -0.5
    told = {row["what"]: row for row in tables["logged_forgetting"]["rows"]}
    assert told["part_1/margin_change"]["value"]["value"] == pytest.approx(value["forgetting/part_1/margin_change"])


def test_every_metric_that_training_logs_is_shown_or_known_to_be_left_out(run):
    # made_run takes the names from the functions that training calls
    logged = {name.removesuffix("/stderr") for name in read_evidence(Run(run)).metrics["name"].unique()}
    shown = {name for _, units in LOGGED.values() for name in units} | set(CURVES)
    parts = {"weight", "cost", *FAMILIES}
    counted = {"kl_ref/samples", "kl_base/samples"}  # the n of others
    left_out = {"rewards/chosen", "rewards/rejected", "learning_rate", "logps/chosen", "logps/rejected", "num_tokens"}
    left_out |= {"mean_token_accuracy"}  # TRL's of one update's pairs; step_rewards has the rewards of all of them
    rest = {name for name in logged - shown - counted - left_out if name.partition("/")[0] not in parts}
    assert rest == set()
    assert shown <= logged


def test_a_contaminated_reference_is_an_alarm(own_run):
    assert "Contaminated reference?" not in said(own_run)
    path = own_run / "arms/sdpo/seed_0/step_2/metrics.parquet"
    alarm = pl.DataFrame([("sdpo", 0, 2, 0, "alarm/contaminated_reference", 1.0)], METRICS, orient="row")
    pl.concat([pl.read_parquet(path), alarm]).write_parquet(path)
    report = Report(own_run)
    scores = pl.read_parquet(own_run / "arms/sdpo/seed_0/step_2/reference_scores.parquet")
    gamma = write_number(scores.select((pl.col("chosen_logp") - pl.col("rejected_logp")).mean()).item())
    loud = [text for text in report.warnings if text.startswith("Contaminated reference?")]
    assert len(loud) == 1
    assert "The reference of sdpo step 2 (seed 0) looks as if it had been trained on" in loud[0]
    assert f"prefers by {gamma} nats" in loud[0]
    assert "take another reference" in loud[0]


def test_the_last_value_of_a_metric_counts():
    rows = [("a", 0, 1, 0, "weight/0.5-0.6", 1.0), ("a", 0, 1, 4, "weight/0.5-0.6", 0.25)]
    rows += [("a", 0, 1, 4, "x/stderr", 0.1), ("a", 0, 1, 4, "x", 2.0)]
    lasts = last_metrics(pl.DataFrame(rows, METRICS, orient="row"))
    assert lasts.select("name", "value", "stderr").rows() == [("weight/0.5-0.6", 0.25, None), ("x", 2.0, 0.1)]


def test_what_became_of_each_question_by_hand():
    def side(arm, *answers):
        row = {"arm": arm, "seed": 0, "step": 1, "model_key": arm, "protocol": "p@1", "task": "mmlu", "subject": "s"}
        rows = [
            row | {"item_id": f"q{n}", "correct": right, "score": 0.5, "gold_logp": gold, "choice_logps": [gold]}
            for n, (right, gold) in enumerate(answers)
        ]
        return Side(arm, arm, pl.DataFrame(rows, ITEMS))

    one = side("one", (1.0, -1.0), (0.0, -2.0), (1.0, -3.0), (0.0, -4.0), (None, -5.0), (1.0, None))
    two = side("two", (0.0, -3.0), (1.0, -2.5), (1.0, -2.0), (0.0, -4.25), (None, -7.0), (1.0, -1.0))
    documents = pl.DataFrame({"protocol": ["p@1"], "task": ["mmlu"], "item_id": ["q0"], "text": ["Why?"]})
    assert find_changes(one, two, documents).select("question", "outcome", "change").rows() == [
        ("Why?", "became right", 2.0), ("q1", "became wrong", 0.5), ("q2", "right in both", -1.0),
        ("q3", "wrong in both", 0.25), ("q4", "no one right answer", 2.0), ("q5", "right in both", None),
    ]  # fmt: skip


def test_contamination_is_told_or_its_command_named(own_run):
    tables = json.loads(Report(own_run).json())["tables"]["data"]
    assert [(row["task"], row["rule"], row["pairs"], row["items"]) for row in tables["contamination"]["rows"]] == [
        ("TruthfulQA", "8-gram", 1, 1), ("TruthfulQA", "question", 1, 1),
    ]  # fmt: skip
    (own_run / "contamination.parquet").unlink()
    commands = [missing["command"] for missing in json.loads(Report(own_run).json())["missing"]]
    assert f"python -m sdpo_data.decontaminate {own_run}" in commands


def test_model_index_is_what_the_hub_reads(run):
    from huggingface_hub.repocard_data import model_index_to_eval_results

    index = ruamel.yaml.YAML(typ="safe").load(Report(run).model_index())["model-index"]
    assert [entry["name"] for entry in index] == ["run sdpo seed 0 step 2", "run dpo seed 0 step 1"]
    found = {result.dataset_type: result for result in model_index_to_eval_results(index[:1])[1]}
    results = pl.read_parquet(run / "results.parquet").filter(arm="sdpo", step=2)
    value, stderr = results.filter(task="mmlu").select("value", "stderr").row(0)
    assert found["cais/mmlu"].metric_value == round(value, 2)
    assert found["cais/mmlu"].metric_args["stderr"] == round(stderr, 2)
    assert found["cais/mmlu"].metric_args["questions"] == 95
    assert "h4" in found
    empty = write_model_index(RESULTS.to_frame(), "none")
    assert empty == "model-index: []\n"


@pytest.mark.real
def test_two_runs_make_one_report_that_sets_the_first_against_the_second(own_run, tmp_path):
    other = make_run(tmp_path / "other", seed=1)
    (other / "config.yaml").write_text("model: embedded:smollm2-135m\npartition:\n  parts: 3\n")
    report = Report(own_run, other)
    told = json.loads(report.json())
    lead = next(prose["text"] for prose in told["prose"] if prose["lead"])
    assert lead.startswith("run: sdpo step 2 against other: sdpo step 2: ")
    scores = {row["model"]: row for row in told["tables"]["h4"]["scores"]["rows"]}
    models = ("sdpo step 1", "sdpo step 2", "dpo step 1")
    assert set(scores) == {"base", "guessing", *(f"{name}: {model}" for name in ("run", "other") for model in models)}
    for name, path in (("run", own_run), ("other", other)):
        h4 = pl.read_parquet(path / "results.parquet").filter(arm="sdpo", step=2, task="h4")["value"][0]
        assert scores[f"{name}: sdpo step 2"]["H4"]["value"] == h4
    assert told["tables"]["differences"]["settings"]["rows"] == [
        {"setting": "partition.parts", "run": "2", "other": "3"}
    ]
    data = told["tables"]["data"]
    assert data["dropped_1"]["rows"] == data["dropped_2"]["rows"]
    assert {"sources_1", "sources_2", "contamination_2"} <= set(data)
    assert {"difficulty_1", "difficulty_2", "parts_judged_1", "parts_judged_2"} <= set(told["tables"]["difficulty"])
    ids = re.findall(r' id="([^"]+)"', report.html())
    assert {"figure-difficulties_1", "figure-difficulties_2", "table-made_with_2"} <= set(ids)
    assert len(ids) == len(set(ids))
    assert report.save() == own_run / "comparison.html"
    assert is_current(Run(own_run), Run(other))
    pl.read_parquet(other / "results.parquet").head(3).write_parquet(other / "results.parquet")
    assert not is_current(Run(own_run), Run(other))


@pytest.mark.parametrize("core", [(0, 1), (1,)])
def test_of_several_runs_each_that_holds_the_four_arms_has_its_core_factorial(tmp_path, core, capsys):
    runs = [make_run(tmp_path / name, seed=seed, core=seed in core) for seed, name in enumerate(("one", "two"))]
    for path in (
        path for table in ("items", "held_out_scores") for path in runs[1].glob(f"{table}/*")
    ):  # other weights
        pl.read_parquet(path).with_columns(model_key=pl.format("two {}", "model_key")).write_parquet(path)
    report = Report(*runs)
    told = json.loads(report.json())
    tables, page = told["tables"]["h4"], report.html()
    compare.main([str(run) for run in runs])
    printed = capsys.readouterr().out
    for seed, run in enumerate(runs):
        own = json.loads(Report(run).json())
        sentence = [prose["text"] for prose in own["prose"] if prose["text"].startswith("The core factorial, ")]
        assert len(sentence) == (seed in core)
        if seed in core:
            assert tables[f"factorial_{seed + 1}"]["rows"] == own["tables"]["h4"]["factorial"]["rows"]
        assert (f'id="figure-factorial_{seed + 1}"' in page) == (seed in core)
        assert (f"{run.name}: Order and reference, each over both" in page) == (seed in core)
        of_run = [prose["text"] for prose in told["prose"] if prose["text"].startswith(f"{run.name}: the core f")]
        assert of_run == [text.replace("The core", f"{run.name}: the core") for text in sentence]
        assert (f"{run.name}: the core factorial" in printed) == (seed in core)
    assert sum("interaction is half of" in prose["text"] for prose in told["prose"]) == 1
    compare.main([*map(str, runs), "--a", "sdpo", "--b", "sdpo"])
    assert "core factorial" not in capsys.readouterr().out  # two models are meant


def test_data_that_two_runs_share_is_told_once(own_run, tmp_path):
    other = shutil.copytree(own_run, tmp_path / "other")
    report = Report(own_run, other)
    assert "The same pairs, parts and scores as run." in report.markdown()
    assert "difficulty_2" not in json.loads(report.json())["tables"]["difficulty"]


# --- what is not there ----------------------------------------------------------------------

LADDER = [
    (["results.parquet", "items"], "python -m sdpo_eval {run}", FIGURES - OF_ANSWERS),
    (["arms", "held_out_scores"], "python -m sdpo_train {run}", OF_PAIRS | {"findings"}),
    (["scores.parquet"], None, {"difficulties", "findings"}),
    (["partition.parquet"], "python -m sdpo_data.partition {run}", {"findings"}),
    (["pairs.parquet", "held_out.parquet", "dropped.parquet"], "python -m sdpo_data.pairs {run}", set()),
    (["config.yaml", "lineage.json"], "python -m sdpo_data.pairs {run}", set()),
]


@pytest.mark.real
def test_a_run_at_any_stage_has_a_report_that_names_the_next_command(own_run):
    for gone, command, figures in LADDER:
        for name in gone:
            shutil.rmtree(own_run / name) if (own_run / name).is_dir() else (own_run / name).unlink()
        report = Report(own_run)
        assert set(re.findall(r'<figure id="figure-(\w+)">', report.html())) == figures
        assert report.markdown()
        commands = [missing["command"] for missing in json.loads(report.json())["missing"]]
        assert command is None or command.format(run=own_run) in commands


@pytest.mark.real
@pytest.mark.parametrize(
    "gone", ["items", "arms/sdpo/seed_0/step_1/metrics.parquet", "pairs.parquet", "scores.parquet"]
)
def test_one_missing_piece_does_not_stop_the_report(own_run, gone):
    shutil.rmtree(own_run / gone) if (own_run / gone).is_dir() else (own_run / gone).unlink()
    assert Report(own_run).save().exists()


def test_only_a_base_model_evaluated(own_run):
    results = pl.read_parquet(own_run / "results.parquet").filter(arm="base")
    results.write_parquet(own_run / "results.parquet")
    report = Report(own_run)
    assert report.table("scores")["model"].to_list() == ["base", "guessing"]
    assert set(report.table("task_contrasts")["task"]) == {"held-out accuracy"}  # which every step has answered
    shutil.rmtree(own_run / "held_out_scores")
    assert Report(own_run).table("task_contrasts") is None


def test_models_named_by_hand_stand_beside_each_other(own_run):
    results = pl.read_parquet(own_run / "results.parquet").filter(step=0).with_columns(arm=pl.lit("my model"))
    results.write_parquet(own_run / "results.parquet")
    assert "my model" in Report(own_run).table("scores")["model"].to_list()


def test_no_run_folder(tmp_path):
    with pytest.raises(SdpoError, match=r"There is no run folder .*nowhere"):
        Report(tmp_path / "nowhere")


def test_a_table_that_is_not_parquet(own_run):
    (own_run / "scores.parquet").write_bytes(b"half a fi")
    with pytest.raises(SdpoError, match=r"scores\.parquet cannot be read as Parquet"):
        Report(own_run)


def test_settings_that_are_not_yaml(own_run):
    (own_run / "config.yaml").write_text("partition: [2\n")
    with pytest.raises(SdpoError, match=r"config\.yaml is not YAML"):
        Report(own_run)
    (own_run / "config.yaml").write_text("- 2\n")
    with pytest.raises(SdpoError, match=r"config\.yaml holds list, expected sections"):
        Report(own_run)


def test_reference_scores_that_are_not_parquet(own_run):
    (own_run / "arms/sdpo/seed_0/step_2/reference_scores.parquet").write_bytes(b"half a fi")
    with pytest.raises(SdpoError, match=r"step_2/reference_scores\.parquet cannot be read as Parquet"):
        Report(own_run)


def test_a_table_that_lacks_a_column(own_run):
    pl.read_parquet(own_run / "results.parquet").drop("stderr").write_parquet(own_run / "results.parquet")
    with pytest.raises(SdpoError, match=r"results\.parquet is missing column 'stderr'"):
        Report(own_run)


# --- the command ----------------------------------------------------------------------------


@pytest.mark.real
def test_the_command_says_up_to_date_until_something_changes(own_run, capsys):
    page, up_to_date = f"{own_run / 'report.html'}\n", f"up to date: {own_run / 'report.html'}\n"
    assert run_main(capsys, own_run).endswith(page)
    made = (own_run / "report.html").stat().st_mtime_ns
    assert run_main(capsys, own_run) == up_to_date
    assert (own_run / "report.html").stat().st_mtime_ns == made
    assert run_main(capsys, own_run, "--force").endswith(page)
    pl.read_parquet(own_run / "results.parquet").head(3).write_parquet(own_run / "results.parquet")
    assert not run_main(capsys, own_run).startswith("up to date")
    assert run_main(capsys, own_run) == up_to_date
    (own_run / "report.md").unlink()
    assert not run_main(capsys, own_run).startswith("up to date")
    (own_run / "report.json").write_text("{half")
    assert not run_main(capsys, own_run).startswith("up to date")


def test_the_command_prints_the_scores(own_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    printed = run_main(capsys, own_run)
    assert "TruthfulQA" in printed
    assert "Wiring run: it shows that the chain works; its H4 decides nothing." in printed
    value, stderr, n = (
        pl.read_parquet(own_run / "results.parquet").filter(task="h4").select("value", "stderr", "n").row(0)
    )
    assert f"{value:.1f} ± {stderr:.1f} (n = {n})" in printed


def test_report_and_plots_need_no_torch(run):
    code = "import sys, scipy.stats; "  # scipy looks for torch among the modules, and takes a None there for it
    code += "sys.modules.update(dict.fromkeys(['torch', 'lm_eval', 'trl', 'transformers'])); "
    code += "import sdpo_eval; sdpo_eval.Report(sys.argv[1]).markdown(); from sdpo_data.tables import METRICS; "
    code += "sdpo_eval.plots_chain.plot_loss(METRICS.to_frame()).to_dict()"
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)


def run_main(capsys, *args) -> str:
    main([str(arg) for arg in args])
    return capsys.readouterr().out


# --- numbers by hand ------------------------------------------------------------------------


@pytest.mark.parametrize(("definition", "known"), [("-prompt_tokens * 1.0", True), ("a | b", False), ("mine", False)])
def test_a_partition_by_an_expression_is_set_against_lengths_and_an_unknown_one_is_not(own_run, definition, known):
    table = pl.read_parquet(own_run / "partition.parquet").with_columns(definition=pl.lit(definition))
    table.write_parquet(own_run / "partition.parquet")
    said = "Rank correlation (Spearman) of -prompt_tokens" in Report(own_run).markdown().replace("\\", "")
    assert said == known


def test_margins_by_hand():
    # margins 3, 1, -1: mean 1, residues 2, 0, -2. a and b share a prompt: prompts' sums 2 and -2, squares 8,
    # times G / (G - 1) = 2: sqrt(16) / 3 = 4/3. (Three prompts of their own would give 2 / sqrt(3) = 1.15.)
    # right: a, b: 200/3 %; residues 100/3, 100/3, -200/3; prompts' sums +-200/3; sqrt(2 * 2) * 200/3 / 3 = 400/9.
    # per token: a -4/4 + 7/7 = 0, not above 0; b -5/5 + 6/2 = 2; c -9/9 + 8/2 = 3: right b, c.
    rows = [("a", "q1", -4.0, -7.0, 4, 7), ("b", "q1", -5.0, -6.0, 5, 2), ("c", "q2", -9.0, -8.0, 9, 2)]
    scores = pl.DataFrame(
        [(i, q, "s", "key", cl, rl, ct, rt, 5, False, "float32", *[None] * 5) for i, q, cl, rl, ct, rt in rows],
        SCORES,
        orient="row",
    ).with_columns(step=1)
    got = summarise_margins(scores, ["step"]).row(0, named=True)
    assert (got["mean"], got["stderr"], got["n"]) == (pytest.approx(1), pytest.approx(4 / 3), 3)
    assert (got["accuracy"], got["accuracy_stderr"]) == (pytest.approx(200 / 3), pytest.approx(400 / 9))
    assert got["per_token"] == pytest.approx(200 / 3)
    own = scores.with_columns(prompt_id="pair_id")  # each pair its own prompt
    unknown = summarise_margins(own, ["step"]).row(0, named=True)
    assert unknown["stderr"] == pytest.approx(2 / math.sqrt(3))
    one = summarise_margins(scores.head(2), ["step"]).row(0, named=True)  # one prompt: spread unknown
    assert one["stderr"] is None


def test_results_of_two_protocols_never_share_a_column():
    rows = [("base", 0, "p@1"), ("sdpo", 1, "p@1"), ("sdpo", 2, "p@2")]
    results = pl.DataFrame(
        [(arm, 0, step, "key", protocol, "mmlu", "acc", 25.0, 1.0, 99, 99, "all") for arm, step, protocol in rows],
        RESULTS, orient="row",
    )  # fmt: skip
    assert comparable_results(results).select("arm", "step").rows() == [("base", 0), ("sdpo", 1)]


def test_numbers_as_they_are_written():
    assert str(Estimate(57.31, 1.22, 1800)) == "57.3 ± 1.2 (n = 1,800)"
    assert str(Estimate(-0.256, None, 1, digits=2, signed=True)) == "−0.26 (n = 1)"
    assert Estimate(10.0, 1.0, 5, signed=True).interval_shown == "[+8.0, +12.0]"  # 10 -+ 1.96
    assert Estimate(10.0, None, 1).interval_shown == "unknown"
    written = {0.6931471: "0.6931", -12.345: "−12.3", 2.14e-05: "2.1 × 10⁻⁵", -3e-10: "−3.0 × 10⁻¹⁰", 0.0: "0.0000"}
    assert {value: write_number(value) for value in written} == written


def test_reading_gives_every_step_the_scores_of_its_own_reference(run):
    evidence = read_evidence(sdpo_eval.Report(run).run)
    keys = evidence.references.select("arm", "step", "model_key").unique().sort("arm", "step").rows()
    assert keys == [("dpo", 1, KEYS["base", 0]), ("sdpo", 1, KEYS["base", 0]), ("sdpo", 2, KEYS["sdpo", 1])]


# --- hostile data ---------------------------------------------------------------------------


def test_hidden_characters_are_made_visible_and_long_texts_cut():
    assert visible("a\u202eb\x00c\r\nd\te\u2028f") == "a⟨U+202E⟩b⟨U+0000⟩c\nd\te⟨U+2028⟩f"
    assert visible("نمی‌خواهم 👩‍💻 naïve") == "نمی‌خواهم 👩‍💻 naïve"
    assert visible("x" * 1_234_567, 567) == "x" * 567 + "… (1,234,000 more characters)"


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_a_hostile_pair_adds_no_element_to_the_page(page, hostile_page):
    tags = []
    for text in (page, hostile_page):
        parser = Elements()
        parser.feed(text)
        tags.append(
            [(tag, attrs) for tag, attrs in parser.tags if tag in ("script", "img", "iframe", "link", "a", "style")]
        )
    assert {tag for tag, _ in tags[1]} == {"script", "a", "style"}
    assert tags[1] == tags[0]
    assert "{{ 7*7 }}" in hostile_page
    assert f"({len(MEGABYTES) - LONGEST_ANSWER:,} more characters)" in hostile_page
    assert "⟨U+202E⟩" in hostile_page
    assert "⟨U+0000⟩" in hostile_page
    assert not re.search("[\x00-\x08\u202a-\u202e\u2028\u2066-\u2069\U000e0000-\U000e007f]", hostile_page)
    assert len(hostile_page) < 1.5e6  # Vega alone is 0.9e6


def test_a_hostile_pair_adds_nothing_to_markdown_or_json(hostile_run):
    report = Report(hostile_run)
    markdown = report.markdown()
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    parser = Elements()
    parser.feed(rendered)
    assert not {"script", "img", "a", "em", "b"} & {tag for tag, _ in parser.tags}
    cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", rendered)]
    assert any("{% raw %} | a ``` b _c_" in cell for cell in cells)  # whole: no pipe or star of it counted
    tables = [block for section in report.sections for block in section.blocks if block.kind == "table"]
    assert rendered.count("<table>") == len(tables)
    assert len(cells) == sum(len(table.rows) * len(table.columns) for table in tables)
    for text in (markdown, report.json()):
        assert not re.search("[\x00-\x08\u202a-\u202e\u2028\u2066-\u2069\U000e0000-\U000e007f]", text)
        assert len(text) < 5e5
    assert json.loads(report.json())["tables"]["data"]["dropped"]["rows"][0]["reason"].startswith("</script>")


def test_the_page_asks_for_nothing_outside_itself(page):
    policy = "default-src 'none'; script-src 'sha256-"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}' in page
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert len(re.findall("<script>", page)) == 1
    assert not re.search(r"https?://|@import|url\(|src=|<link", outside)
