"""What stands under the verdict: likelihoods, flipped questions, what was forgotten, and held-out pairs by step."""

from collections.abc import Iterator
from typing import Any

import polars as pl

from sdpo_eval.blocks import Block, Estimate, Prose, Table
from sdpo_eval.changes import find_flips, find_forgetting
from sdpo_eval.contrasts import METRICS, Side, contrast_models, pair_seeds
from sdpo_eval.evidence import UNIT, Evidence, pair_sides, summarise_margins
from sdpo_eval.held_out import find_best_steps
from sdpo_eval.verdict import TITLES, as_difference, name_command, name_contrast

SHOWN_FLIPS = 5  # questions shown of each pair of models


def tell_changes(evidence: Evidence) -> Iterator[Block]:
    """Show what changed in each pair of models beneath the scores: forgetting, likelihoods, flips."""
    sides = pair_sides(evidence)
    if not sides:
        return
    models = [pair for one, two in sides for pair in pair_seeds(one, two)]
    yield from _forgetting([(one, two) for one, two in models if two.arm == "base"])
    likelihoods = contrast_models(sides, evidence.compare, [metric for metric in METRICS if metric != "score"])
    rows: dict[tuple, dict[str, Any]] = {}
    for row in likelihoods.iter_rows(named=True):
        key = (name_contrast(row), row["verdict_on"], TITLES.get(row["task"], row["task"]))
        cells = rows.setdefault(key, dict(zip(("contrast", "verdict_on", "task"), key, strict=True)))
        cells[row["metric"]] = as_difference(row)
    title = (
        "How the right answer's log-probability changed, and its lead over the best wrong one in the choices' "
        "shares of probability"
    )
    if rows:
        yield Table("likelihoods", title, list(rows.values()), {"gold_logp": "nats", "choice_margin": "points"})
    yield from _flips(evidence, models)


def _forgetting(models: list[tuple[Side, Side]]) -> Iterator[Block]:
    if not models:
        return
    table = pl.concat([find_forgetting(one, two) for one, two in models])
    rows = []
    for row in table.iter_rows(named=True):
        difference = as_difference(row)
        part = " ".join(filter(None, (TITLES.get(row["task"], row["task"]), row["field"])))
        if row["verdict"] == "worse":
            said = f"{part} {difference.number} {difference.interval_shown}"
            yield Prose(f"Forgetting: {name_contrast(row)}, {said}, over {row['n']:,} questions.", loud=True)
        rows.append(
            {"contrast": name_contrast(row), "part": part, "difference": difference}
            | {
                "95_%_interval": difference.interval_shown,
                "forgotten": (row["verdict"] == "worse" and "yes") or "not seen",
            }
            | {"found_with_80_%": None if row["seen_if_over"] is None else f"{row['seen_if_over']:.2f}"}
        )
    yield Table("forgetting", "Forgetting: points against the base model, each by its own interval, unadjusted", rows)


def _flips(evidence: Evidence, models: list[tuple[Side, Side]]) -> Iterator[Block]:
    counts, shown = [], []
    for one, two in models:
        flips = find_flips(one, two, evidence.documents)
        contrast = name_contrast({"first": one.name, "second": two.name})
        for (task,), own in flips.group_by("task", maintain_order=True):
            up = own.filter(right=one.name).height
            counts.append(
                {
                    "contrast": contrast,
                    "task": TITLES.get(str(task), task),
                    "only_first": up,
                    "only_second": own.height - up,
                }
            )
        largest = flips.sort(pl.col("gold_logp_change").abs(), descending=True, maintain_order=True).head(SHOWN_FLIPS)
        shown += [
            {"contrast": contrast, "right": row["right"], "task": TITLES.get(row["task"], row["task"])}
            | {"question": row["text"] or row["item_id"], "gold_logp_change": row["gold_logp_change"]}
            for row in largest.iter_rows(named=True)
        ]
    if counts:
        yield Table("flips", "Questions that one model alone gets right", counts)
        title = "Of these, where the right answer's log-probability changed most"
        yield Table("flipped_questions", title, shown, {"gold_logp_change": "nats"})


def tell_held_out(evidence: Evidence) -> Iterator[Block]:
    """Show what every step thinks of the held-out pairs, which step is best, and whether the last one is as good."""
    if evidence.held_out.is_empty() or evidence.steps.is_empty():
        return
    if evidence.held_out_scores.is_empty():
        yield name_command(
            evidence, "Which step is best, judged on the pairs held out, is not known yet", "sdpo_eval.held_out"
        )
        return
    for row in find_best_steps(evidence.held_out_scores).iter_rows(named=True):
        best = f"step {row['best']}" if row["best"] else "the base model"
        text = f"{row['arm']}, seed {row['seed']}: {best} is best on the {row['n']:,} pairs held out"
        if row["best"] != row["last"]:
            difference = as_difference(row)
            text += f", by {difference.number} points of reward accuracy over the last one: {row['verdict']}"
        yield Prose(f"{text}. H4 was not asked.")
    measured = summarise_margins(evidence.held_out_scores, UNIT)
    rows = [
        {name: row[name] for name in UNIT}
        | {"reward_accuracy": Estimate(row["accuracy"], row["accuracy_stderr"], row["n"])}
        | {"mean_margin": Estimate(row["mean"], row["stderr"], row["n"], digits=2)}
        for row in measured.iter_rows(named=True)
    ]
    units = {"reward_accuracy": "%", "mean_margin": "nats"}
    yield Table("held_out", "Held-out pairs under each model; standard errors cluster pairs by prompt", rows, units)
