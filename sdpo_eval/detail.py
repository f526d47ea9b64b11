"""What stands under the scores: likelihoods, flipped questions, what was forgotten, and held-out pairs by step."""

from collections.abc import Iterator
from typing import Any

import polars as pl

from sdpo_data.tables import UNIT
from sdpo_eval import plots, plots_chain
from sdpo_eval.blocks import Block, Drawing, Estimate, Heading, Prose, Table
from sdpo_eval.changes import find_changes, find_flips, find_forgetting
from sdpo_eval.contrasts import METRICS, TITLES, Side, contrast_models, pair_seeds
from sdpo_eval.evidence import Evidence, pair_sides
from sdpo_eval.held_out import find_best_steps
from sdpo_eval.margins import HELD_OUT, measure_displacement, summarise_margins
from sdpo_eval.verdict import as_difference, name_command, name_contrast

SHOWN_FLIPS = 5  # questions shown of each pair of models
MOST_COUNTS = 24  # rows of a table that is not folded


def tell_changes(evidence: Evidence) -> Iterator[Block]:
    """Show what changed in each pair of models beneath the scores: the right answers' likelihoods, and flips."""
    sides = pair_sides(evidence)
    if not sides:
        return
    yield Heading("What changed, question by question")
    models = [pair for one, two in sides for pair in pair_seeds(one, two)]
    one, two = models[0]
    changes = find_changes(one, two, evidence.documents).drop_nulls("change")
    if changes["change"].n_unique() > 1:
        changes = changes.with_columns(pl.col("task").replace(TITLES))
        yield Drawing("items", lambda: plots.plot_items(changes, (one.name, two.name)))
    likelihoods = contrast_models(sides, evidence.compare, [metric for metric in METRICS if metric != "score"])
    rows: dict[tuple, dict[str, Any]] = {}
    for row in likelihoods.iter_rows(named=True):
        key = (name_contrast(row), row["verdict_on"], TITLES.get(row["task"], row["task"]))
        cells = rows.setdefault(key, dict(zip(("contrast", "verdict_on", "task"), key, strict=True)))
        cells[row["metric"]] = as_difference(row)
    title = (
        "How the right answer's log-probability changed, and its lead over the best wrong one, in log-probability and "
        "in shares of the choices' probability"
    )
    if rows:
        units = {"gold_logp": "nats", "logp_margin": "nats", "choice_margin": "points"}
        yield Table("likelihoods", title, list(rows.values()), units, folded=True)
    yield from _flips(evidence, models)


def tell_forgetting(evidence: Evidence) -> Iterator[Block]:
    """Show where each arm's last model fell behind the base model: by task, and by MMLU's fields."""
    sides = [(one, two) for one, two in pair_sides(evidence) if two.arm.endswith("base")]
    models = [pair for one, two in sides for pair in pair_seeds(one, two)]
    if not models:
        return
    table = pl.concat([find_forgetting(one, two) for one, two in models]).filter(pl.col("task") != HELD_OUT)
    rows = []
    for row in table.iter_rows(named=True):
        difference = as_difference(row)
        part = " ".join(filter(None, (TITLES.get(row["task"], row["task"]), row["field"])))
        if row["verdict"] == "worse":
            said = f"{part} {difference.number}"
            yield Prose(f"Forgetting: {name_contrast(row)}, {said}, over {row['n']:,} questions.", loud=True)
        rows.append(
            {"contrast": name_contrast(row), "part": part, "difference": difference}
            | {"forgotten": (row["verdict"] == "worse" and "yes") or "not seen"}
            | {"found_with_80_%": row["seen_if_over"] and Estimate(row["seen_if_over"], digits=2)}
        )
    title = "Points against the base model, each by its own 95 % interval, unadjusted; and the loss that would be seen"
    yield Table("forgetting", title, rows, folded=len(rows) > 10)


def _flips(evidence: Evidence, models: list[tuple[Side, Side]]) -> Iterator[Block]:
    counts, shown = [], []
    for one, two in models:
        flips = find_flips(find_changes(one, two, evidence.documents))
        contrast = {"contrast": name_contrast({"first": one.name, "second": two.name})}
        for (task,), own in flips.group_by("task", maintain_order=True):
            up = own.filter(outcome="became right").height
            counts.append(
                contrast | {"task": TITLES.get(str(task), task), "only_first": up, "only_second": own.height - up}
            )
        largest = flips.sort(pl.col("change").abs(), descending=True, nulls_last=True, maintain_order=True)
        shown += [
            contrast
            | {"right": one.name if row["outcome"] == "became right" else two.name}
            | {"task": TITLES.get(row["task"], row["task"]), "question": row["question"]}
            | {"gold_logp_change": row["change"]}
            for row in largest.head(SHOWN_FLIPS).iter_rows(named=True)
        ]
    if counts:
        yield Table("flips", "Questions that one model alone gets right", counts, folded=len(counts) > MOST_COUNTS)
        title = "Of these, where the right answer's log-probability changed most"
        yield Table("flipped_questions", title, shown, {"gold_logp_change": "nats"}, folded=True)


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
    moved = measure_displacement(evidence.held_out_scores)
    changes = {tuple(row[:4]): Estimate(*row[4:], digits=2, signed=True) for row in moved.rows()}
    yield Drawing("held_out", lambda: plots_chain.plot_held_out(measured))
    rows = [
        {name: row[name] for name in UNIT}
        | {"reward_accuracy": Estimate(row["accuracy"], row["accuracy_stderr"], row["n"])}
        | {"mean_margin": Estimate(row["mean"], row["stderr"], row["n"], digits=2)}
        | {f"{side}_logp_change": changes.get((*(row[name] for name in UNIT), side)) for side in ("chosen", "rejected")}
        for row in measured.iter_rows(named=True)
    ]
    units = {"reward_accuracy": "%", "mean_margin": "nats"}
    units |= {"chosen_logp_change": "nats", "rejected_logp_change": "nats"}
    yield Table("held_out", "Held-out pairs under each model; standard errors cluster pairs by prompt", rows, units)
    if moved.height:
        yield Drawing("displacement", lambda: plots_chain.plot_displacement(moved))
