"""What stands under the scores: likelihoods, flipped questions, what was forgotten, and held-out pairs by step."""

from collections.abc import Iterator
from typing import Any

import polars as pl

from sdpo_data.tables import UNIT
from sdpo_eval import plots, plots_chain
from sdpo_eval.arms import describe_arms
from sdpo_eval.blocks import Block, Drawing, Estimate, Heading, Prose, Table
from sdpo_eval.changes import find_changes, find_flips, find_forgetting
from sdpo_eval.contrasts import CHECKPOINTS, METHODS, METRICS, TITLES, Side, contrast_models, pair_seeds
from sdpo_eval.evidence import Evidence, pair_sides, pair_steps
from sdpo_eval.held_out import find_best_steps
from sdpo_eval.margins import HELD_OUT, measure_displacement, summarise_margins
from sdpo_eval.verdict import as_difference, best_verdicts, contrast_row, name_command, name_contrast, primary_task

SHOWN_FLIPS = 5  # questions shown of each pair of models
SIZES_ALIKE = 1.05  # times the smallest: up to it arms differ by what rounding to whole updates brings
MOST_COUNTS = 24  # rows of a table that is not folded


def tell_arms(evidence: Evidence) -> Iterator[Block]:
    """Show what each arm of the run did, in what it differs from the first, and where their sizes are not equal."""
    rows = describe_arms(evidence.steps, evidence.orders, evidence.partition, evidence.recipe)
    if not rows:
        return
    sized = ("steps", "seeds", "pairs", "tokens", "updates", "rank_with_difficulty")
    made = [{name: cell for name, cell in row.items() if name not in sized} for row in rows]
    yield Table("arms", "What each arm did, read off what it trained on and the weights it started from", made)
    cells = []
    for row in rows:
        rho = row.get("rank_with_difficulty")
        known = {name: cell for name, cell in row.items() if name in ("arm", *sized)}
        cells.append(known if rho is None else known | {"rank_with_difficulty": Estimate(rho, digits=2, signed=True)})
    yield Table("arm_sizes", "How much each arm trained, a seed; tokens are of all epochs", cells)
    sizes = {name: [row[name] for row in rows] for name in ("pairs", "tokens", "updates")}
    unequal = [f"{name} ({min(found):,} to {max(found):,})" for name, found in sizes.items() if min(found) < max(found)]
    if unequal:
        text = f"The arms are not equal in {' and '.join(unequal)}: a difference between them may be one of size."
        yield Prose(text, loud=any(max(found) > SIZES_ALIKE * min(found) for found in sizes.values()))
    elif rows[1:]:
        yield Prose("The arms are equal in pairs, tokens and updates.")
    if any("rank_with_difficulty" in row for row in rows):
        yield Prose(
            "S is the base model. Rank with difficulty is Spearman's rho of the training order with the partition's "
            "difficulty: above 0 from easy to hard, near 0 in no such order."
        )


def tell_factorial(evidence: Evidence) -> Iterator[Block]:
    """Show the effects of the core factorial: those on what decides as a figure, all of them as a table."""
    effects = evidence.factorial
    if effects.is_empty():
        return
    yield Heading("Order and reference, each over both values of the other")
    shown = best_verdicts(effects)
    task = primary_task(effects, evidence.compare)
    named = shown.filter(task=task).with_columns(contrast=pl.format("{}: {} − {}", "effect_of", "first", "second"))
    title = TITLES.get(task, task)
    yield Drawing("factorial", lambda: plots.plot_factorial(named, title))
    deciding = named.select("effect_of", "first", "verdict_on").rows()
    hidden = {"verdict_on", "seeds"} if METHODS not in effects["verdict_on"] else set()
    rows = []
    for row in effects.iter_rows(named=True):
        decides = row["task"] == task and (row["effect_of"], row["first"], row["verdict_on"]) in deciding
        cells = contrast_row(row) | {"contrast": f"{row['effect_of']}: {name_contrast(row)}"}
        rows.append((decides, {name: cell for name, cell in cells.items() if name not in hidden}))
    on = f" on {CHECKPOINTS}," if hidden else ""
    about = f"Effects of the core factorial, points with 95 % intervals; verdicts{on} adjusted among these effects"
    for name, which in (("factorial", True), ("other_factorial", False)):
        own = [row for is_shown, row in rows if is_shown == which]
        if own:
            yield Table(name, about if which else f"{about}: all others", own, folded=not which)
    yield Prose(
        "The core factorial is {easy to hard, random order} × {moving, fixed reference}: sdpo, sdpo_fixed, random, "
        "random_fixed. Each side of an effect is the mean of two arms over the same questions and seeds; the "
        "interaction is half of (sdpo − sdpo_fixed) − (random − random_fixed), what order and moving reference add "
        "together beyond each alone. These effects are a family of their own: the contrasts of single arms are "
        "adjusted apart from them."
    )


def tell_changes(evidence: Evidence) -> Iterator[Block]:
    """Show what changed in each pair of models beneath the scores: the right answers' likelihoods, and flips."""
    sides, steps = pair_sides(evidence), pair_steps(evidence)
    if not sides and not steps:
        return
    yield Heading("What changed, question by question")
    models = [pair for one, two in sides for pair in pair_seeds(one, two)]
    if models:
        yield from _likelihoods(evidence, sides, models[0])
    yield from _flips(evidence, [*models, *steps])


def _likelihoods(evidence: Evidence, sides: list[tuple[Side, Side]], shown: tuple[Side, Side]) -> Iterator[Block]:
    one, two = shown
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
