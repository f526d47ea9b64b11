"""What nobody would write: rows, tables and settings drawn at random are used, or refused in one sentence."""

import io
import json
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import ruamel.yaml
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from sdpo_data import decontaminate, pairs, partition, score
from sdpo_data.config import read_command
from sdpo_data.decontaminate import DecontaminateConfig, decontaminate_pairs
from sdpo_data.doctor import check_pairs
from sdpo_data.encode import encode_pairs
from sdpo_data.export import ExportConfig, export_steps
from sdpo_data.formats import read_row
from sdpo_data.models import load_model, load_tokenizer
from sdpo_data.pairs import PairsConfig
from sdpo_data.partition import PartitionConfig, partition_pairs
from sdpo_data.repair import fix_pairs
from sdpo_data.run import Run
from sdpo_data.score import ScoreConfig, score_and_drop
from sdpo_data.tables import DOCUMENTS, DROPPED, PAIRS, PARTITION, SCORES, SdpoError, check

SLOWLY = settings(deadline=None, suppress_health_check=list(HealthCheck))
ODD = st.sampled_from(
    ["\ud800", "", " ", "messages", "text", "[]", "null", "{}", "{", "\n\nHuman: a\n\nAssistant:", "x" * 5000, 10**400]
)
LEAF = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4) | ODD
CALLS = LEAF | st.lists(LEAF | st.dictionaries(st.sampled_from(["function", "type"]), LEAF, max_size=2), max_size=2)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", None, 3]), "content": LEAF},
    optional={"tool_calls": CALLS, "name": LEAF},
) | st.fixed_dictionaries(
    {
        "from": st.sampled_from(["human", "gpt", "system", "function_call", "observation", "x", None, 3]),
        "value": LEAF | st.sampled_from(['{"name": "f", "arguments": {}}', "[1]"]),
    }
)
CELL = st.recursive(
    LEAF | MESSAGE | st.lists(MESSAGE, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "function", "response", "rating", "Rating"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
SIDES = ("prompt", "chosen", "rejected")
OTHERS = (
    *(
        "system",
        "history",
        "messages",
        "conversations",
        "rejected_response",
        "rejected_messages",
        "instruction",
        "tools",
    ),
    *("input", "output", "question", "pair_id", "format", "completions", "ratings", "ranks", "source", "output_1"),
    *("output_2", "preference", "goal", "sol1", "sol2", "label", "rating_chosen", "score_chosen", "chosen_response"),
)
ROW = st.dictionaries(st.sampled_from([*SIDES, *OTHERS]), CELL, max_size=8) | st.fixed_dictionaries(
    dict.fromkeys(SIDES, CELL), optional=dict.fromkeys(OTHERS, CELL)
)


def refusal(call: Callable[[], object]) -> str | None:
    """What a call says when it refuses, which must be one sentence; None where it does not."""
    try:
        call()
    except SdpoError as error:
        said = str(error)
    else:
        return None
    assert said
    assert "\n" not in said
    assert len(said) < 1000
    return said


@SLOWLY
@given(ROW, st.sampled_from(["auto", "messages", "text"]), st.sampled_from(["best_worst", "best_random", "all"]))
def test_any_row_is_a_pair_that_fits_the_table_or_has_a_reason(row, prompt_format, choose):
    _, found = read_row(row, prompt_format, choose)
    assert found or choose == "all"
    pairs = [{**pair, "source": "s"} for pair in found if not isinstance(pair, str)]
    assert all(reason and "\n" not in reason for reason in found if isinstance(reason, str))
    frame = check(pl.DataFrame(pairs, PAIRS).unique("pair_id"), PAIRS, "pairs")
    if frame.height:
        check_pairs(frame)  # what was read can be looked at


# --- rows in are rows out and rows dropped, through every stage

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6) | st.sampled_from(
    [" ", "a", "a ", "<|im_end|>", "word " * 300, "eight words that stand in the one document"]
)


@st.composite
def readable(draw) -> dict:
    chat = draw(st.booleans())
    sides = {side: draw(TEXT) for side in SIDES}
    row = sides if not chat else {
        side: [{"role": "user" if side == "prompt" else "assistant", "content": text}] for side, text in sides.items()
    }  # fmt: skip
    if chat and draw(st.booleans()):
        row["tools"] = [{"type": "function", "function": {"name": draw(st.sampled_from("fg"))}}]
    return row


def content_is_whole(dropped: pl.DataFrame, pairs: pl.DataFrame) -> bool:
    """Whether each dropped pair can be had back from its row in dropped.parquet."""
    kept = [pl.Series([text]).str.json_decode(pl.Struct(PAIRS)).struct.unnest().row(0) for text in dropped["content"]]
    return set(kept) <= set(pairs.rows()) and dropped["reason"].null_count() == 0


@settings(SLOWLY, max_examples=25)
@given(st.lists(readable(), min_size=1, max_size=6))
def test_no_stage_loses_a_pair(tiny_model, tmp_path_factory, rows):
    found = [pair for row in rows for pair in read_row(row)[1] if not isinstance(pair, str)]
    pairs = pl.DataFrame([{**pair, "source": "s"} for pair in found], PAIRS).unique("pair_id", maintain_order=True)
    tokenizer = load_tokenizer(tiny_model)
    documents = pl.DataFrame([("p", "t", "1", "eight words that stand in the one document")], DOCUMENTS, orient="row")
    fixed = fix_pairs(pairs, tokenizer)
    assert fixed.pairs.height + fixed.dropped.height == pairs.height
    clean = decontaminate_pairs(fixed.pairs, documents, DecontaminateConfig(action="drop"))
    assert sorted([*clean.pairs["pair_id"], *clean.dropped["pair_id"]]) == sorted(fixed.pairs["pair_id"])
    assert content_is_whole(clean.dropped, fixed.pairs)
    if clean.pairs.is_empty():
        return
    config = ScoreConfig(max_length=60, store=str(tmp_path_factory.getbasetemp() / "store"))
    usable = encode_pairs(clean.pairs, tokenizer, 60, "drop")["problem"].null_count()
    made = []
    if refusal(lambda: made.extend(score_and_drop(clean.pairs, (_model(str(tiny_model)), tokenizer), config))):
        assert usable == 0
        return
    scores, dropped = made
    assert sorted([*scores["pair_id"], *dropped["pair_id"]]) == sorted(clean.pairs["pair_id"])
    assert scores.height == usable
    assert content_is_whole(dropped, clean.pairs)
    assert dropped.schema == DROPPED


def _model(folder: str, made: dict = {}):  # noqa: B006 - one model for all examples
    if folder not in made:
        made[folder] = load_model(folder, "float32")[0]
    return made[folder]


# --- tables that were made by hand

PAIRS_MADE = pl.DataFrame(
    [
        {
            **read_row({"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": f"c{i}", "rejected": "r"})[1][0],
            "source": "s",
        }
        for i in range(4)
    ],
    PAIRS,
)
IDS = PAIRS_MADE["pair_id"]
SCORES_MADE = pl.DataFrame(
    [(i, "q", "s", "k", -1.0 - at, -2.0, 3, 4, 5, False, "float32", *[None] * 5) for at, i in enumerate(IDS)],
    SCORES,
    orient="row",
)
PARTITION_MADE = pl.DataFrame(
    [(i, "s", 1 + at // 2, at, 0.1 * at, "d") for at, i in enumerate(IDS)], PARTITION, orient="row"
)
DOCUMENTS_MADE = pl.DataFrame([("h4", "t", "1", "what is asked here of this or that")], DOCUMENTS, orient="row")
SECOND = pl.int_range(pl.len()) == 1
HARMS = {  # in one column: what its second row, or every row, holds instead
    "a null": lambda name, _: pl.when(SECOND).then(None).otherwise(name),
    "a NaN": lambda name, _: pl.when(SECOND).then(pl.lit(float("nan"))).otherwise(pl.col(name)),
    "an infinity": lambda name, _: pl.when(SECOND).then(pl.lit(float("-inf"))).otherwise(pl.col(name)),
    "numbers": lambda *_: pl.lit(1),
    "text": lambda name, _: pl.col(name).cast(pl.String),
    "broken JSON": lambda _, dtype: pl.lit("{not").cast(dtype),
    "other JSON": lambda _, dtype: pl.lit('[{"role": 3}]').cast(dtype),
    "a huge string": lambda _, dtype: pl.lit("x" * 10**6).cast(dtype),
    "lists": lambda name, _: pl.concat_list(name),
    "no column": None,
    "every row twice": None,
    "no row": None,
}


def harmed(table: pl.DataFrame, name: str, harm: str) -> pl.DataFrame:
    if made := HARMS[harm]:
        return table.with_columns(made(name, table.schema[name]).alias(name))
    return {"no column": table.drop(name), "every row twice": pl.concat([table, table])}.get(harm, table.clear())


def repaired(frame: pl.DataFrame, _: Path) -> int:
    got = fix_pairs(frame)
    return got.pairs.height + got.dropped.height


TO = ExportConfig(to=["trl", "llama_factory", "datasets"])
USES = {  # what is done with a table: the table, and how many of its rows that accounts for
    "partition": (SCORES_MADE, lambda frame, _: partition_pairs(frame, PartitionConfig(parts=2)).height),
    "fix": (PAIRS_MADE, repaired),
    "decontaminate": (PAIRS_MADE, lambda frame, _: decontaminate_pairs(frame, DOCUMENTS_MADE).pairs.height),
    "documents": (DOCUMENTS_MADE, lambda frame, _: decontaminate_pairs(PAIRS_MADE, frame) and frame.height),
    "doctor": (PAIRS_MADE, lambda frame, _: check_pairs(frame) is not None and frame.height),
    "export pairs": (PAIRS_MADE, lambda frame, out: export_steps(frame, PARTITION_MADE, "o/m", out, TO)["pairs"].sum()),
    "export steps": (PARTITION_MADE, lambda frame, out: export_steps(PAIRS_MADE, frame, "o/m", out, TO)["pairs"].sum()),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("use", USES)
def test_a_table_made_by_hand_is_used_whole_or_refused(tmp_path, use, harm):
    table, done = USES[use]
    for name in table.columns:
        try:
            frame = harmed(table, name, harm)
        except pl.exceptions.PolarsError:
            continue  # polars itself makes no such table
        out = tmp_path / name
        accounted: list[int] = []
        if refusal(lambda: accounted.append(done(frame, out))):  # noqa: B023 - called at once
            assert not out.exists()
        else:
            assert accounted == [frame.height]


# --- settings

YAML = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3) | st.integers() | st.none(), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def all_settings() -> dict:
    from sdpo_eval import CompareConfig, EvalConfig
    from sdpo_train import TrainConfig

    models = {"pairs": PairsConfig, "decontaminate": DecontaminateConfig, "score": ScoreConfig, "export": ExportConfig}
    return models | {"partition": PartitionConfig, "train": TrainConfig, "eval": EvalConfig, "compare": CompareConfig}


@settings(SLOWLY, max_examples=60)
@given(st.data())
def test_any_value_of_any_setting_is_taken_or_refused_in_one_sentence(tmp_path_factory, data):
    models, run = all_settings(), tmp_path_factory.mktemp("run")
    section = data.draw(st.sampled_from(sorted(models)))
    name = data.draw(st.sampled_from(sorted(models[section].model_fields)))
    text = io.StringIO()
    ruamel.yaml.YAML(typ="safe", pure=True).dump({section: {name: data.draw(YAML)}}, text)
    (run / "config.yaml").write_bytes(text.getvalue().encode(errors="replace"))
    word = data.draw(st.text(max_size=6) | st.sampled_from(["nan", "inf", "-1", "1e400", "--", ",", "٣"]))
    flags = [] if data.draw(st.booleans()) else [f"--{name.replace('_', '-')}", word]
    refusal(lambda: read_command("command", "", section, {section: models[section]}, [str(run), *flags]))


TEXT = st.text("ab é", min_size=1, max_size=5).map(str.strip) | st.sampled_from(["the river is long", "x" * 90, ""])
ROW = st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}) | st.fixed_dictionaries(
    {"prompt": LEAF, "chosen": LEAF, "rejected": LEAF}
)


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROW, min_size=4, max_size=24))
def test_every_row_is_in_the_partition_held_out_or_dropped(rows, tiny_model, tmp_path_factory):
    """Over a whole run, every stage that drops: rows in = pairs of the partition + held out + dropped."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{**row, "source": "s"} for row in rows] + [
        {"prompt": f"what is {n}", "chosen": f"it is {n}", "rejected": "no", "source": "s"} for n in range(6)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    (folder / "known.txt").write_text("what is 3\nthe river is long\n")
    run, model = folder / "run", ["--model", str(tiny_model)]
    calls: list[tuple[Callable[[], None], list[str]]] = [
        (pairs.main, [*model, "--source", str(folder / "rows.jsonl"), "--limit", "20", "--hold-out", "0.2", "--fix"]),
        (decontaminate.main, ["--documents", str(folder / "known.txt"), "--action", "drop"]),
        (score.main, ["--max-length", "64", "--store", str(folder / "store")]),
        (partition.main, ["--parts", "2", "--drop-hardest", "0.2", "--hold-out", "0.1"]),
    ]
    for main, flags in calls:
        with unittest.mock.patch("sys.argv", ["command", str(run), *flags]):
            try:
                main()
            except SdpoError:  # too few are left for two parts, or none
                reject()
    made = Run(run)
    kept = made.partition["pair_id"].n_unique()
    assert kept + made.held_out.height + held_out_parts(run) + made.dropped.height == len(rows)
    assert set(made.dropped["stage"]) <= {"pairs", "fix", "decontaminate", "score", "partition"}
    assert made.dropped["reason"].str.len_chars().min() > 0


def held_out_parts(run: Path) -> int:
    path = run / "held_out_parts.parquet"
    return pl.read_parquet(path)["pair_id"].n_unique() if path.exists() else 0
