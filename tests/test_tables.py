import polars as pl
import pytest

from sdpo_data.tables import (
    CONTAMINATION,
    DOCUMENTS,
    DROPPED,
    ITEMS,
    LOGP_MARGIN,
    MARGIN_PER_TOKEN,
    METRICS,
    NULLABLE,
    PAIRS,
    PARTITION,
    RESULTS,
    REWARD_ACCURACY,
    SCORES,
    STEPS,
    TOKEN_DIFFERENCE,
    SdpoError,
    check,
)

SCHEMAS = {
    "PAIRS": PAIRS, "DROPPED": DROPPED, "SCORES": SCORES, "PARTITION": PARTITION,
    "STEPS": STEPS, "METRICS": METRICS, "ITEMS": ITEMS, "RESULTS": RESULTS,
    "DOCUMENTS": DOCUMENTS, "CONTAMINATION": CONTAMINATION,
}  # fmt: skip

# margins: -10 + 12 = 2, -9 + 4 = -5, -7 + 7 = 0
# per token: -10/5 + 12/4 = -2 + 3 = 1; -9/3 + 4/8 = -3 + 0.5 = -2.5; -7/7 + 7/2 = -1 + 3.5 = 2.5
# token differences: 5 - 4 = 1, 3 - 8 = -5, 7 - 2 = 5
THREE = pl.DataFrame(
    {
        "chosen_logp": [-10.0, -9.0, -7.0],
        "rejected_logp": [-12.0, -4.0, -7.0],
        "chosen_tokens": [5, 3, 7],
        "rejected_tokens": [4, 8, 2],
    }
)


@pytest.fixture
def partition() -> pl.DataFrame:
    return pl.DataFrame(
        [("a", "s", 1, 0, 0.5, "logp_margin"), ("b", "s", 2, 1, 1.5, "logp_margin")], PARTITION, orient="row"
    )


def test_derived_quantities_by_hand():
    got = THREE.select(sum=LOGP_MARGIN, token=MARGIN_PER_TOKEN, length=TOKEN_DIFFERENCE)
    assert got.rows() == [(2.0, 1.0, 1), (-5.0, -2.5, -5), (0.0, 2.5, 5)]


def test_reward_accuracy_counts_a_tie_as_wrong():
    assert THREE.select(REWARD_ACCURACY).item() == 1 / 3  # margins 2, -5, 0: only the first is above 0


def test_check_gives_the_schema_s_columns_in_its_order(partition):
    shuffled = partition.select(pl.lit(7).alias("extra"), *reversed(partition.columns))
    assert check(shuffled, PARTITION, "partition").equals(partition)


def test_check_names_the_missing_column(partition):
    with pytest.raises(
        SdpoError, match=r"partition is missing column 'step'\. It has .*'rank'.*; it needs \['pair_id'"
    ):
        check(partition.drop("step"), PARTITION, "partition")


def test_check_names_the_wrong_type(partition):
    with pytest.raises(SdpoError, match=r"partition\.step is Float64, expected Int64\."):
        check(partition.cast({"step": pl.Float64}), PARTITION, "partition")


def test_check_counts_nulls_and_names_the_first_row(partition):
    three = pl.concat([partition, partition.with_columns(pair_id=pl.lit("c") + pl.col("pair_id"))])
    holed = three.with_columns(rank=pl.Series([0, 1, None, None], dtype=pl.Int64))
    with pytest.raises(SdpoError, match=r"partition\.rank has 2 null value\(s\), first at row 2\. Drop those rows"):
        check(holed, PARTITION, "partition")


@pytest.mark.parametrize("schema", ["PAIRS", "SCORES", "PARTITION"])
def test_check_refuses_a_repeated_pair_where_the_pair_is_the_key(schema, pairs, scores, partition):
    frame = {"PAIRS": pairs, "SCORES": scores, "PARTITION": partition}[schema]
    repeated = frame["pair_id"][-1]
    twice = pl.concat([frame, frame.tail(1)])
    with pytest.raises(
        SdpoError, match=rf"it has 1 repeated pair_id\(s\), e\.g\. '{repeated}'( in step 2)?\. Was the frame conc"
    ):
        check(twice, SCHEMAS[schema], "it")


def test_check_lets_dropped_rows_repeat_and_be_without_a_pair():
    rows = [("pairs", "s", 3, None, "tie", "{}"), ("score", "s", None, "a", "too long", "{}")]
    dropped = pl.DataFrame(rows + rows, DROPPED, orient="row")
    assert check(dropped, DROPPED, "dropped").height == 4


def test_check_refuses_a_pair_without_its_id(partition):
    with pytest.raises(SdpoError, match=r"partition\.pair_id has 1 null value"):
        check(partition.with_columns(pair_id=pl.Series(["a", None])), PARTITION, "partition")


@pytest.mark.parametrize("schema", SCHEMAS)
def test_nulls_are_allowed_exactly_where_the_schema_says(schema):
    for column in SCHEMAS[schema]:
        filled = {name: _value(dtype) for name, dtype in SCHEMAS[schema].items()}
        frame = pl.DataFrame([filled | {column: None}], SCHEMAS[schema])
        allowed = column in NULLABLE and (column != "pair_id" or schema == "DROPPED")
        if allowed:
            check(frame, SCHEMAS[schema], "frame")
        else:
            with pytest.raises(SdpoError, match=f"frame.{column} has 1 null"):
                check(frame, SCHEMAS[schema], "frame")


def test_every_nullable_name_is_a_column():
    assert {column for schema in SCHEMAS.values() for column in schema} >= NULLABLE


def _value(dtype: pl.DataType) -> object:
    if isinstance(dtype, pl.List):
        return [0.5]
    return {pl.String: "x", pl.Boolean: True}.get(type(dtype), 1)
