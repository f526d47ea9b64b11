"""What the report says of the chain of steps: hand-off, loss, references, held-out pairs, drift, forgetting."""

from collections.abc import Iterator
from typing import Any

import polars as pl

from sdpo_data.tables import UNIT
from sdpo_eval import plots_chain
from sdpo_eval.arms import find_place
from sdpo_eval.blocks import Block, Drawing, Estimate, Heading, Prose, Table, write_number
from sdpo_eval.detail import tell_forgetting, tell_held_out
from sdpo_eval.evidence import Evidence, last_metrics, measure_drift, measure_references
from sdpo_eval.hardness import JUDGED, judgement
from sdpo_eval.plots_chain import LOG_2
from sdpo_eval.published import GAMMA_REF
from sdpo_eval.verdict import name_command

LOGGED = {
    "diagnostics": (
        "Gamma of each step's pairs under the base model, the step's reference, and the model it gave",
        {name: (name, "nats") for name in ("margin_base", "margin_ref_before", "margin_ref_after", "margin_change")},
    ),
    "divergence": (
        "KL divergence of each step's model from its reference and from the base model",
        {f"kl_{of}/{k}": (f"from_{name}_{k}", "nats") for of, name in (("ref", "reference"), ("base", "base"))
         for k in ("k1", "k3")},
    ),
    "accuracies": (
        "Share of each step's pairs with gamma above 0, under the same three models",
        {"reward_accuracy_base": ("base_model", "share"), "reward_accuracy_before": ("reference", "share"),
         "reward_accuracy_after": ("model", "share")},
    ),
    "rewards": (
        "TRL's rewards at the end of each step, over all its pairs",
        {f"step_rewards/{side}": (side, "beta × nats") for side in ("chosen", "rejected", "margins")}
        | {"step_rewards/accuracies": ("accuracies", "share")},
    ),
    "displaced": (
        "How far each step moved the log-probabilities of its pairs' answers, from where it started",
        {"displacement/chosen": ("chosen", "nats"), "displacement/rejected": ("rejected", "nats"),
         "displacement/chosen_fell": ("chosen_fell", "share")},
    ),
    "log_ratios": (
        "Log ratios of the pairs' own answers, each step's model to its reference and to the base model",
        {f"log_ratio_{of}/{side}": (f"{side}_to_{name}", "nats per token")
         for of, name in (("ref", "reference"), ("base", "base")) for side in ("chosen", "rejected")},
    ),
}  # fmt: skip
"""Table -> its title, and the METRICS in it with head and unit: what a step logs once, of all its pairs."""
OPEN = ("diagnostics", "divergence")  # of these tables; the others are shown folded
CURVES = {
    "loss": "loss", "grad_norm": "gradient_norms", "rewards/margins": "reward_margins",
    "rewards/accuracies": "reward_accuracies",
}  # fmt: skip
"""METRICS that are logged at every update, and the figure that draws each."""
ALARM = "alarm/contaminated_reference"
FAMILIES = {
    "drift": "How difficulty moved", "flipped": "Pairs whose margin changed sign", "held_out": "Held-out pairs",
    "forgetting": "Held-out pairs of earlier parts",
}  # fmt: skip
"""METRICS that stand for several: what is before their slash -> what they say."""


def tell_chain(evidence: Evidence) -> Iterator[Block]:
    """Show that the chain of weights holds, how training went, and what it did to pairs old and new."""
    if evidence.steps.is_empty():
        yield name_command(evidence, "No step has been trained yet", "sdpo_train")
    else:
        yield from _alarms(evidence)
        yield from _training(evidence)
        yield from _references(evidence)
        yield from _drift(evidence)
    held_out = list(tell_held_out(evidence))
    if held_out:
        yield Heading("Pairs that nobody trained on")
        yield from held_out
    forgotten = list(tell_forgetting(evidence))
    if forgotten:
        yield Heading("Forgetting")
        yield from forgotten


def _alarms(evidence: Evidence) -> Iterator[Block]:
    """Say loudly of which steps training found that their reference looks trained on the pairs it is to judge."""
    found = evidence.metrics.filter(name=ALARM).sort(UNIT)
    judged = measure_references(evidence).filter(reference="own reference")
    for (arm, step), own in found.group_by("arm", "step", maintain_order=True):
        means = judged.filter(pl.col("seed").is_in(own["seed"].to_list()), arm=arm, step=step)["mean"].to_list()
        likes = f", whose chosen answers it prefers by {write_number(sum(means) / len(means))} nats" if means else ""
        yield Prose(
            f"Contaminated reference? The reference of {arm} step {step} ({_seeds(own)}) looks as if it had been "
            f"trained on the step's pairs or on their like{likes}: training raised this alarm before the step. Such a "
            "reference sets a margin that no policy can learn beyond, so the step has little to teach. Look whether "
            "these pairs, or copies of them, were in an earlier step or in what the base model was tuned on; if they "
            "were, take them out or take another reference. Strong training on pairs of the same kind looks the same: "
            "it is a reason to look, no proof.",
            loud=True,
        )


def _training(evidence: Evidence) -> Iterator[Block]:
    steps, metrics, sigmoid = evidence.steps, evidence.metrics, _is_sigmoid(evidence)
    told: dict[tuple[str, str, bool], list[pl.DataFrame]] = {}
    for (arm,), own in steps.group_by("arm", maintain_order=True):
        for _, chain in own.group_by("seed", maintain_order=True):
            told.setdefault((str(arm), *_hand_off(evidence, chain)), []).append(chain)
    for (arm, text, holds), chains in told.items():
        own = pl.concat(chains)
        gap: Any = own["max_start_gap"].max()
        checked = (
            ""
            if gap is None
            else f". Before the first updates, answers checked differed from their reference by {write_number(gap)} "
            "nats of log-probability at most"
        )
        yield Prose(f"{arm}, {_seeds(own)}: {text}{checked}.", loud=not holds)
    draw = {
        "loss": lambda: plots_chain.plot_loss(metrics, sigmoid=sigmoid),
        "grad_norm": lambda: plots_chain.plot_gradient_norms(metrics),
        "rewards/margins": lambda: plots_chain.plot_reward_margins(metrics),
        "rewards/accuracies": lambda: plots_chain.plot_reward_accuracies(metrics),
    }
    for name, figure in CURVES.items():
        if name in metrics["name"]:
            yield Drawing(figure, draw[name])
    if "rewards/accuracies" in metrics["name"]:
        yield Prose(
            "A step that starts from its own reference starts with every reward margin at 0 and, under the sigmoid "
            "loss, at log 2. rewards/accuracies counts margins strictly above 0, so its first value is anything from "
            "0 to about 0.5 by rounding alone, and no sign of a wrong reference; the loss and the gap in "
            "log-probabilities are the proof of the hand-off."
        )
    rows = [
        {name: row[name] for name in UNIT}
        | {"starts_from": _weights(steps, row, "start_key"), "held_to": _weights(steps, row, "reference_key")}
        | {name: row[name] for name in ("max_start_gap", "first_loss")}
        | (
            {"off_log_2": row["first_loss"] - LOG_2 if row["start_key"] == row["reference_key"] else None}
            if sigmoid
            else {}
        )
        | {"last_loss": row["last_loss"]}
        for row in steps.iter_rows(named=True)
    ]
    units = dict.fromkeys(["max_start_gap", "first_loss", "off_log_2", "last_loss"], "nats")
    yield Table("hand_off", "The hand-off from step to step; weights by place and hash", rows, units)


def _is_sigmoid(evidence: Evidence) -> bool:
    """Whether every step was trained with the sigmoid loss alone, by its lineage, else by the settings."""
    recipes = [evidence.recipe(*unit) for unit in evidence.steps.select(UNIT).rows()]
    losses = [recipe["loss"] for recipe in recipes if "loss" in recipe]
    losses = losses or [(evidence.settings.get("train") or {}).get("loss", ["sigmoid"])]
    return all(loss == ["sigmoid"] for loss in losses)


def _seeds(rows: pl.DataFrame) -> str:
    seeds = rows["seed"].unique().sort().to_list()
    return f"seed{'s' if seeds[1:] else ''} {', '.join(map(str, seeds))}"


def _hand_off(evidence: Evidence, chain: pl.DataFrame) -> tuple[str, bool]:
    """Say of one arm and seed where its steps start and what they are held to, by the weights' hashes.

    An arm may start each step from S, or hold it to S. What it declares stands in the lineage, as the keys that
    the step's start and reference must have.

    Returns:
        A sentence without its end; whether start and reference of every step are what they must be.
    """
    rows = list(chain.iter_rows(named=True))
    for row in rows:
        declared = evidence.recipe(row["arm"], row["seed"], row["step"])
        for role, key in (("start", "start_key"), ("reference", "reference_key")):
            if declared.get(role, row[key]) != row[key]:
                return f"the {role} of step {row['step']} does not have the weights that its arm declares", False
    if not rows[1:] and rows[0]["start_key"] == rows[0]["reference_key"]:
        return f"one step, started from and held to {_weights(chain, rows[0], 'start_key')}", True
    starts, references = (find_place(chain, key) for key in ("start_key", "reference_key"))
    if (starts, references) == ("the step before", "the step before"):
        return "each step started from, and was held to, the very weights that the step before wrote", True
    if starts is None or references is None:
        return (
            "not a chain: a step starts from, or is held to, weights that its chain did not write; see the table",
            False,
        )
    told = f"each step started from {starts} and was held to {references}"
    return f"{told}: after the first one they differ, so a step need not start at a zero margin", True


def _weights(steps: pl.DataFrame, row: dict[str, Any], key: str) -> str:
    """Name weights by where the row's own chain wrote them, and by their hash."""
    chain = steps.filter(arm=row["arm"], seed=row["seed"])
    written = {k: f"step {step}" for step, k in chain.select("step", "model_key").rows()}
    return f"{({chain['start_key'][0]: 'base'} | written).get(row[key], 'other weights')} {row[key][:8]}"


def _references(evidence: Evidence) -> Iterator[Block]:
    if evidence.references.is_empty():
        return
    yield Heading("What the references think of the pairs")
    measured = measure_references(evidence)
    yield Drawing("reference_margins", lambda: plots_chain.plot_reference_margins(measured))
    rows = [
        {name: row[name] for name in UNIT} | {"judged_by": row["reference"]} | judgement(row)
        for row in measured.iter_rows(named=True)
    ]
    title = "Each step's pairs, judged by the base model and by the step's own reference"
    yield Table("references", title, rows, JUDGED)
    printed = ", ".join(f"{value:+.2f} under {name}".replace("-", "−") for name, value in GAMMA_REF.items())
    yield Prose(
        "Reward accuracy is the share of pairs whose chosen answer the judge finds likelier than the rejected one: the "
        "whole answers, or per token, which leans less on their lengths. Standard errors cluster pairs by prompt. The "
        f"paper's own mean gamma on UltraFeedback (Figure 2) was {printed} nats; M2 had been trained on that set."
    )


def _drift(evidence: Evidence) -> Iterator[Block]:
    """Show what moved underneath: difficulty under each reference, and whatever diagnostics the steps logged."""
    moved, logged = measure_drift(evidence), last_metrics(evidence.metrics)
    weights = logged.filter(pl.col("name").str.starts_with("weight/"))
    told = [*_logged_tables(evidence, logged), *_logged_families(logged)]
    if not (moved.height or weights.height or told):
        return
    yield Heading("What moved underneath")
    if moved.height:
        title = "Each step's pairs under its own reference, against the base model: order (Spearman) and turned margins"
        yield Table("drift", title, moved.to_dicts())
    if weights.height:
        shares = weights.with_columns(
            weight=pl.col("name").str.strip_prefix("weight/"),
            share=100 * pl.col("value") / pl.col("value").sum().over(UNIT),
        )
        yield Drawing("weights", lambda: plots_chain.plot_weights(shares.drop("name", "value", "stderr")))
    yield from told


def _logged_tables(evidence: Evidence, logged: pl.DataFrame) -> Iterator[Block]:
    """Lay out what the steps logged once each, a row per step: standard errors cluster pairs by prompt."""
    pairs = {row[:3]: row[3] for row in evidence.steps.select(*UNIT, "pairs").rows()}
    samples = {
        (*row[:3], str(row[3]).removesuffix("/samples")): int(row[4])
        for row in logged.filter(pl.col("name").str.ends_with("/samples")).rows()
    }
    for table, (title, columns) in LOGGED.items():
        known = logged.filter(pl.col("name").is_in(list(columns)))
        if known.is_empty():
            continue
        rows: dict[tuple[str, int, int], dict[str, Any]] = {}
        for row in known.iter_rows(named=True):
            unit = row["arm"], row["seed"], row["step"]
            n = samples.get((*unit, row["name"].partition("/")[0]))
            cells = rows.setdefault(unit, dict(zip(UNIT, unit, strict=True)) | {"pairs": pairs.get(unit)})
            cells[columns[row["name"]][0]] = _logged(row["value"], row["stderr"], n)
        heads = [*UNIT, "pairs", *(head for name, (head, _) in columns.items() if name in known["name"])]
        ordered = [{head: row.get(head) for head in heads} for row in rows.values()]
        folded = table not in OPEN or len(ordered) > 12
        yield Table(table, f"{title} ± standard error", ordered, dict(columns.values()), folded=folded)
        if table == "divergence":
            yield Prose(
                "KL divergences are of whole answers that the step's model itself wrote, cut where they grow long, n "
                "of them: k1 is unbiased and may be negative, k3 is never negative and steadier where the models are "
                "near. The log ratios below are of the pairs' own answers and are no KL divergence."
            )


def _logged_families(logged: pl.DataFrame) -> Iterator[Block]:
    for family, title in FAMILIES.items():
        own = logged.filter(pl.col("name").str.starts_with(f"{family}/"))
        if own.height:
            rows = [
                {name: row[name] for name in UNIT}
                | {"what": row["name"].partition("/")[2], "value": _logged(row["value"], row["stderr"])}
                for row in own.iter_rows(named=True)
            ]
            yield Table(f"logged_{family}", f"{title}, as training logged it", rows, folded=len(rows) > 12)


def _logged(value: float, stderr: float | None, n: int | None = None) -> Estimate:
    return Estimate(value, stderr, n, digits=3 if abs(value) < 10 else 1)
