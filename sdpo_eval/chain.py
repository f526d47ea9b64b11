"""What the report says of the chain of steps: hand-off, loss, references, held-out pairs, drift, forgetting."""

from collections.abc import Iterator
from typing import Any

import polars as pl

from sdpo_data.tables import UNIT
from sdpo_eval import plots_chain
from sdpo_eval.blocks import Block, Drawing, Estimate, Heading, Prose, Table, write_number
from sdpo_eval.detail import tell_forgetting, tell_held_out
from sdpo_eval.evidence import Evidence, last_metrics, measure_drift, measure_references
from sdpo_eval.hardness import JUDGED, judgement
from sdpo_eval.plots_chain import LOG_2
from sdpo_eval.published import GAMMA_REF
from sdpo_eval.verdict import name_command

MEASURES = {
    "margin_base": "nats", "margin_ref_before": "nats", "margin_ref_after": "nats", "reward_accuracy_base": "share",
    "reward_accuracy_before": "share", "reward_accuracy_after": "share", "displacement/chosen": "nats",
    "displacement/rejected": "nats", "displacement/chosen_fell": "share", "kl/base": "nats", "kl/ref": "nats",
}  # fmt: skip
"""METRICS that a step logs of all its pairs, and their units."""
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


def _training(evidence: Evidence) -> Iterator[Block]:
    steps, metrics = evidence.steps, evidence.metrics
    for _, chain in steps.group_by("arm", "seed", maintain_order=True):
        yield Prose(_hand_off(chain))
    if "loss" in metrics["name"]:
        yield Drawing("loss", lambda: plots_chain.plot_loss(metrics))
    if "rewards/margins" in metrics["name"]:
        yield Drawing("reward_margins", lambda: plots_chain.plot_reward_margins(metrics))
    sigmoid = (evidence.settings.get("train") or {}).get("loss", ["sigmoid"]) == ["sigmoid"]
    rows = [
        {name: row[name] for name in UNIT}
        | {"starts_from": _weights(steps, row, "start_key"), "held_to": _weights(steps, row, "reference_key")}
        | {name: row[name] for name in ("max_start_gap", "first_loss")}
        | ({"off_log_2": row["first_loss"] - LOG_2} if sigmoid else {})
        | {"last_loss": row["last_loss"]}
        for row in steps.iter_rows(named=True)
    ]
    units = dict.fromkeys(["max_start_gap", "first_loss", "off_log_2", "last_loss"], "nats")
    yield Table("hand_off", "The hand-off from step to step; weights by place and hash", rows, units)


def _hand_off(chain: pl.DataFrame) -> str:
    """Say of one arm and seed whether its chain of weights is unbroken, going by their hashes."""
    rows, written = list(chain.iter_rows(named=True)), dict(chain.select("step", "model_key").rows())
    own = all(row["start_key"] == row["reference_key"] for row in rows)
    linked = own and all(row["start_key"] == written.get(row["step"] - 1) for row in rows[1:])
    if not linked:
        text = "not a chain in which each step starts from, and is held to, the step before; see the table"
    elif rows[1:]:
        text = "each step started from, and was held to, the very weights that the step before wrote"
    else:
        text = f"one step, started from and held to {_weights(chain, rows[0], 'start_key')}"
    gaps = [row["max_start_gap"] for row in rows if row["max_start_gap"] is not None]
    if gaps:
        text += (
            f". Before the first updates, answers checked differed from their reference by {write_number(max(gaps))} "
        )
        text += "nats of log-probability at most"
    return f"{rows[0]['arm']}, seed {rows[0]['seed']}: {text}."


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
    known = logged.filter(pl.col("name").is_in(list(MEASURES)))
    families = logged.filter(pl.col("name").str.extract(r"^(\w+)/").is_in(list(FAMILIES)))
    if not (moved.height or weights.height or known.height or families.height):
        return
    yield Heading("What moved underneath")
    if moved.height:
        title = "Each step's pairs under its own reference, against the base model: order (Spearman) and turned margins"
        yield Table("drift", title, moved.to_dicts())
    if known.height:
        order = [name for name in MEASURES if name in known["name"]]
        cells = {tuple(row[:4]): _logged(*row[4:]) for row in known.rows()}
        units = known.select(UNIT).unique(maintain_order=True).rows()
        rows = [
            dict(zip(UNIT, unit, strict=True)) | {name: cells.get((*unit, name)) for name in order} for unit in units
        ]
        yield Table(
            "diagnostics", "Each step's pairs before and after training on them ± standard error", rows, MEASURES
        )
    if weights.height:
        shares = weights.with_columns(
            weight=pl.col("name").str.strip_prefix("weight/"),
            share=100 * pl.col("value") / pl.col("value").sum().over(UNIT),
        )
        yield Drawing("weights", lambda: plots_chain.plot_weights(shares.drop("name", "value", "stderr")))
    for family, title in FAMILIES.items():
        own = families.filter(pl.col("name").str.starts_with(f"{family}/"))
        if own.height:
            rows = [
                {name: row[name] for name in UNIT}
                | {"what": row["name"].partition("/")[2], "value": _logged(row["value"], row["stderr"])}
                for row in own.iter_rows(named=True)
            ]
            yield Table(f"logged_{family}", f"{title}, as training logged it", rows, folded=len(rows) > 12)


def _logged(value: float, stderr: float | None) -> Estimate:
    return Estimate(value, stderr, digits=3 if abs(value) < 10 else 1)
