import re

import polars as pl
import pytest

from sdpo_data.cards import Cards, describe_partition
from sdpo_data.intervals import Z_95
from sdpo_data.orders import accumulate, rearrange
from sdpo_data.partition import PartitionConfig, partition_pairs
from sdpo_data.tables import PAIRS, SCORES, TEXT, SdpoError


@pytest.fixture
def partition(scores) -> pl.DataFrame:
    """Margin per token: a -3, d -1, b 0 in step 1; c 1, e 2.75 in step 2."""
    return partition_pairs(scores, PartitionConfig())


@pytest.fixture
def texts() -> pl.DataFrame:
    rows = [
        (
            pair,
            f"q{pair}",
            "s",
            f"<b>prompt {pair}</b>",
            f"chosen & {pair}\n\nmore",
            f"rejected {pair}",
            TEXT,
            *[None] * 4,
        )
        for pair in "abcde"
    ]
    return pl.DataFrame(rows, PAIRS, orient="row")


def wilson(k: int, n: int) -> tuple[float, float]:
    p, z = k / n, Z_95
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def test_the_figures_of_a_part_by_hand(partition, scores):
    first, second = describe_partition(partition, scores).parts.rows(named=True)
    # step 1: a d b; 2 * (7 + 10 + 8) prompt tokens, chosen 4 12 4, rejected 2 5 3; margins 1 -9 -3
    assert (first["pairs"], first["prompts"], first["tokens"], first["sources"]) == (3, 3, 80, "math 2, chat 1")
    assert (first["easiest"], first["median"], first["hardest"]) == (-3, -1, 0)
    # sorted -9 -3 1, places 0 to 2: 5 % at 0.1, 25 % at 0.5, 75 % at 1.5, 95 % at 1.9
    margins = [first[f"margin_q{q:02}"] for q in (5, 25, 50, 75, 95)]
    assert margins == pytest.approx([-8.4, -6, -3, -1, 0.6])
    assert (first["prompt_tokens"], first["chosen_tokens"], first["rejected_tokens"]) == (8, 4, 3)
    assert (first["longer_chosen"], second["longer_chosen"]) == (1, 0)
    assert first["reward_accuracy"] == pytest.approx(1 / 3)
    # three prompts: SE^2 = sum of squared residues (4 + 1 + 1) / 9 / 9 * 3 / 2 = 1 / 9, so p (1 - p) / SE^2 = 2 pairs
    p, n, z = 1 / 3, 2, Z_95
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert first["reward_accuracy_low"] == pytest.approx((middle - half) / (1 + z * z / n))
    assert first["reward_accuracy_high"] == pytest.approx((middle + half) / (1 + z * z / n))
    assert (second["reward_accuracy_low"], second["reward_accuracy_high"]) == pytest.approx(wilson(2, 2))


def test_examples_stand_near_the_edges_and_at_the_median():
    # 20 pairs: places 0 to 4, 7 to 11 ((20 - 5) // 2 = 7), 15 to 19
    rows = [
        (f"p{i:02}", f"q{i}", "s", "key", -1.0 - i, -1.0, 1, 1, 3, False, "float32", *[None] * 5) for i in range(20)
    ]
    scores = pl.DataFrame(rows, SCORES, orient="row").reverse()
    cards = describe_partition(partition_pairs(scores, PartitionConfig(parts=1)), scores)
    got = {place: rows["pair_id"].to_list() for (place,), rows in cards.examples.group_by("place", maintain_order=True)}
    assert got == {
        "easiest": [f"p{i:02}" for i in range(5)],
        "median": [f"p{i:02}" for i in range(7, 12)],
        "hardest": [f"p{i:02}" for i in range(15, 20)],
    }
    # of few pairs each shows once
    few = describe_partition(partition_pairs(scores.head(7), PartitionConfig(parts=1)), scores).examples
    assert few["pair_id"].to_list() == [f"p{i:02}" for i in range(13, 20)]


def test_a_notebook_shows_cards_with_every_text_escaped(partition, scores, texts):
    cards = describe_partition(partition, scores, texts)
    shown = cards._repr_html_()
    assert "&lt;b&gt;prompt a&lt;/b&gt;" in shown
    assert "chosen &amp; a" in shown
    assert "<b>prompt" not in shown
    assert shown.count("<b>step ") == 2
    assert "0.333 [" in shown
    tags = re.findall(r"<(/?)(\w+)", shown)
    for tag in {name for _, name in tags}:
        assert sum(name == tag and not end for end, name in tags) == sum(
            name == tag and bool(end) for end, name in tags
        )
    hostile = partition.with_columns(definition=pl.lit("<script>alert(1)</script>"))
    assert "<script>" not in describe_partition(hostile, scores, texts)._repr_html_()


def test_cards_are_printed(partition, scores, texts, capsys):
    describe_partition(partition, scores, texts).print("my.parquet")
    out = capsys.readouterr().out
    for said in (
        "my.parquet, by margin_per_token",
        "pairs (prompts)",
        "3 (3)",
        "chosen & a more",
        "rejected e",
        "hardest",
    ):
        assert said in out
    assert "how firm the edges are was not measured: scored in float32" in out


def test_edges_are_as_firm_as_noise_leaves_them(partition, scores):
    # as in test_partition: half a nat moves the 95 % by 0.45; b 0 and c 1 are 0.5 from the edge; a whole nat: within
    def cards(nats: float, cut: pl.DataFrame = partition) -> Cards:
        return describe_partition(cut, scores, rescored=scores.with_columns(pl.col("chosen_logp") + nats))

    assert cards(-0.5).edges.rows() == [("1 | 2", 0.5, 0, 0.0, 0, 0.0)]
    assert cards(-1.0).edges.rows() == [("1 | 2", 0.5, 1, 0.2, 1, 0.2)]
    assert "2 of 5 pairs could be on the other side of an edge" in cards(-1.0).noise
    for other in (rearrange(partition, "hard_to_easy"), accumulate(partition)):
        assert cards(-1.0, other).edges.is_empty()
        assert "difficulty does not rise from part to part" in cards(-1.0, other).noise


def test_coarse_scores_without_noise_are_named(partition, scores):
    coarse = scores.with_columns(dtype=pl.lit("bfloat16"))
    assert "5 scores are not in float32, and none were scored again" in describe_partition(partition, coarse).noise


def test_a_card_of_pairs_without_scores_is_refused(partition, scores):
    with pytest.raises(SdpoError, match=r"2 pair\(s\) of the partition have no scores, e\.g\. 'd'"):
        describe_partition(partition, scores.head(3))


def test_cumulative_parts_have_cards_too(partition, scores, texts):
    cards = describe_partition(accumulate(partition), scores, texts)
    assert cards.parts["pairs"].to_list() == [3, 5]
    assert cards._repr_html_().count("<b>step ") == 2
