"""What changed underneath the scores: questions that flipped, and what was forgotten, by task and field."""

import polars as pl

from sdpo_eval.contrasts import QUESTION, Side, pair_questions, refuse_other_protocols
from sdpo_eval.stats import Differences, compare_checkpoints, judge

_FIELDS = {
    "STEM": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
FIELDS = {field: subjects.split() for field, subjects in _FIELDS.items()}
"""Field -> subjects of MMLU, as lm-eval groups them."""

FORGETTING = pl.Schema(
    {  # one row per task, or field of MMLU's
        "first": pl.String,
        "second": pl.String,
        "task": pl.String,
        "field": pl.String,  # of MMLU; null for a whole task
        "effect": pl.Float64,  # first - second, points
        "stderr": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "n": pl.Int64,
        "verdict": pl.String,  # by its own p-value: an alarm is to be heard, so nothing is adjusted
        "seen_if_over": pl.Float64,  # smallest true loss found with 80 % power, points
    }
)
CHANGES = pl.Schema(
    {  # one row per question that both models answered
        "task": pl.String,
        "item_id": pl.String,
        "subject": pl.String,
        "question": pl.String,  # its text; its id where that is not known
        "outcome": pl.String,  # one of TURNED, "right in both", "wrong in both", or "no one right answer"
        "change": pl.Float64,  # of the right answer's log-probability, first - second, nats; null where it is not known
    }
)
TURNED = ("became right", "became wrong")  # from the second model to the first


def find_forgetting(first: Side, second: Side) -> pl.DataFrame:
    """Compare two checkpoints on each task, and on MMLU in each field: is the first worse anywhere?

    Args:
        first: one model.
        second: what it is not to fall behind, normally the base model.

    Returns:
        FORGETTING frame; a row of verdict "worse" is an alarm. Verdicts are on these checkpoints and
        not adjusted, so about one in forty rows is an alarm where nothing was forgotten.

    Raises:
        SdpoError: the two were asked under different protocols.
    """
    refuse_other_protocols(first, second)
    rows = []
    for task, (asked, differences) in pair_questions([(first, second)]).items():
        subjects = asked["subject"].to_numpy()
        parts = {None: subjects == subjects} | {
            field: asked["subject"].is_in(own).to_numpy() for field, own in FIELDS.items() if task == "mmlu"
        }
        for field, chosen in parts.items():
            if chosen.any():
                part = Differences(differences.values[:, chosen], subjects[chosen], differences.clusters[chosen])
                effect = compare_checkpoints([part])
                verdict = judge(effect.value, effect.p)
                known = (effect.value, effect.stderr, effect.low, effect.high, effect.n, verdict, effect.detectable)
                rows.append((first.name, second.name, task, field, *known))
    return pl.DataFrame(rows, FORGETTING, orient="row")


def find_changes(first: Side, second: Side, documents: pl.DataFrame) -> pl.DataFrame:
    """List every question that both answered, with what became of it and how the right answer moved.

    Args:
        documents: DOCUMENTS with their texts, such as `run.questions`.

    Returns:
        CHANGES frame, by task and question.

    Raises:
        SdpoError: the two were asked under different protocols.
    """
    refuse_other_protocols(first, second)
    other = second.items.select(*QUESTION, was="correct", before="gold_logp")
    texts = documents.select(*QUESTION, "text").unique(QUESTION, keep="first")
    both = first.items.join(other, on=QUESTION).join(texts, on=QUESTION, how="left")
    right, was = pl.col("correct") == 1, pl.col("was") == 1
    outcome = (
        pl.when(pl.any_horizontal(pl.col("correct", "was").is_null())).then(pl.lit("no one right answer"))
        .when(right & was).then(pl.lit("right in both")).when(right).then(pl.lit("became right"))
        .when(was).then(pl.lit("became wrong")).otherwise(pl.lit("wrong in both"))
    )  # fmt: skip
    changes = both.with_columns(
        question=pl.coalesce("text", "item_id"), outcome=outcome, change=pl.col("gold_logp") - pl.col("before")
    )
    return changes.select(list(CHANGES)).sort("task", "item_id")


def find_flips(changes: pl.DataFrame) -> pl.DataFrame:
    """Keep of CHANGES the questions that one model alone gets right, the largest changes of each task first."""
    flips = changes.filter(pl.col("outcome").is_in(TURNED))
    return flips.sort("task", pl.col("change").abs(), "item_id", descending=[False, True, False], nulls_last=True)
