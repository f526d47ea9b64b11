"""Plans by hand, and what holds in any plan: every completion reads its own ancestors, no token twice."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sdpo_data.tree import count_tokens, plan_bins, plan_rows, request_key

A_PAIR = [([5, 6, 7, 8, 1], 2), ([5, 6, 9, 2], 2)]  # prompt 5 6, answers 7 8 1 and 9 2


def test_a_row_by_hand():
    """Depth first, without the last tokens 1 and 2: 9 sits at depth 2 and sees 5 6 9."""
    [row] = plan_rows(A_PAIR, 100)
    assert row.tokens.tolist() == [5, 6, 7, 8, 9]
    assert row.depth.tolist() == [0, 1, 2, 3, 2]
    assert row.end.tolist() == [5, 5, 4, 4, 5]
    assert row.kept.tolist() == []
    # completions one after the other: 7 8 1, then 9 2; 6 predicts 7 and 9
    reads = sorted(zip(row.places.tolist(), row.readers.tolist(), row.targets.tolist(), strict=True))
    assert reads == [(0, 1, 7), (1, 2, 8), (2, 3, 1), (3, 1, 9), (4, 4, 2)]


def test_a_tree_cut_into_rows_by_hand():
    """Rows of two: 5 6 | 7 8 | 9. The second stands on 5 6; the third keeps these and not 7 8."""
    rows = plan_rows(A_PAIR, 2)
    assert [row.tokens.tolist() for row in rows] == [[5, 6], [7, 8], [9]]
    assert [row.columns.tolist() for row in rows] == [[0, 1], [0, 1, 2, 3], [0, 1, 4]]
    assert [row.kept.tolist() for row in rows] == [[], [0, 1], [0, 1]]  # places in the columns before
    reads = [dict(zip(row.places.tolist(), row.targets.tolist(), strict=True)) for row in rows]
    assert reads == [{0: 7, 3: 9}, {1: 8, 2: 1}, {4: 2}]  # 6, in the first row, predicts for both answers


def test_a_tree_of_three_levels_counts_each_token_once():
    """1 2 is shared by four, 3 by two of them; the last tokens (0) are no nodes: 1 2 6, 3 4, 5, 7 = 7 nodes."""
    requests = [([1, 2, 6, 0], 2), ([1, 2, 3, 4, 0], 2), ([1, 2, 3, 5, 0], 3), ([1, 2, 7, 0], 1)]
    assert count_tokens(requests) == 7
    for size in (1, 2, 5, 100):
        [bin_] = plan_bins(requests, size)
        assert bin_.tokens == 7
        assert sum(len(row.tokens) for row in plan_rows([requests[p] for p in bin_.sequences], size)) == 7


def test_choices_of_one_token_cost_nothing_but_their_question():
    """MMLU's A, B, C, D after one context: four requests, and the context's three tokens are all that is read."""
    assert count_tokens([([7, 8, 9, choice], 3) for choice in (1, 2, 3, 4)]) == 3


def test_bins_end_between_prompts_and_the_longest_comes_first():
    """Rows of 2 make bins of 64 tokens: four prompts of 40 tokens, two answers of 5 each: 48 nodes a prompt.

    A bin is full with two prompts (96 of 64) and ends before the third, which shares nothing; never inside one.
    """
    requests = [([prompt] * 40 + [answer] * 5, 40) for prompt in (1, 2, 3, 4) for answer in (7, 8)]
    requests.append(([9] * 60, 1))  # 59 nodes; the longest: with 4's 48, the last bin, and first to be computed
    bins = plan_bins(requests, 2)
    assert [sorted(bin_.sequences) for bin_ in bins] == [[8], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert [bin_.tokens for bin_ in bins] == [59, 96, 96]


def test_what_is_too_long_for_a_tree_comes_in_batches_of_like_length():
    requests = [([1, 2, 3], 1), ([1] * 9, 1), ([2] * 10, 1), ([3] * 4, 1)]
    bins = plan_bins(requests, 20, packed_length=4)
    assert [(bin_.sequences, bin_.packed, bin_.tokens) for bin_ in bins] == [((2, 1), False, 20), ((0, 3), True, 5)]


def test_a_request_is_known_by_its_tokens_and_its_start():
    keys = {request_key((ids, start)) for ids in ([1, 2, 3], [1, 2, 4], [1, 2, 3, 0]) for start in (1, 2)}
    assert len(keys) == 6
    assert request_key(([1, 2, 3], 1)) == request_key((np.array([1, 2, 3], dtype=np.int64), 1))


token = st.integers(0, 3)  # few tokens, so that much is shared
trees = st.lists(st.lists(token, min_size=2, max_size=12).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids) - 1))), min_size=1, max_size=12)  # fmt: skip


@given(trees, st.integers(1, 40), st.randoms(use_true_random=False))
def test_in_any_plan_every_completion_reads_its_own_ancestors(requests, row_tokens, random):
    bins = plan_bins(requests, row_tokens)
    assert sorted(place for bin_ in bins for place in bin_.sequences) == list(range(len(requests)))
    for bin_ in bins:
        own = [requests[place] for place in bin_.sequences]
        rows = plan_rows(own, row_tokens)
        assert sum(len(row.tokens) for row in rows) == bin_.tokens == count_tokens(own)  # no token twice
        answers = {}  # place in the completions -> (target, tokens and depths of what the reader sees)
        held, before = np.zeros(0, dtype=int), np.zeros(0, dtype=int)  # token of every column of the row before
        for row in rows:
            assert len(row.tokens) <= row_tokens
            assert (before[row.kept] == row.columns[: len(row.kept)]).all()  # the cache holds what the row counts on
            tokens = np.concatenate([held[row.kept], row.tokens])
            for reader, target, place in zip(row.readers, row.targets, row.places, strict=True):
                node = row.columns[len(row.kept) + reader]
                seen = tokens[(row.columns <= node) & (node < row.end)]
                assert len(seen) == row.depth[reader] + 1
                answers[place] = (target, seen.tolist())
            held, before = tokens, row.columns
        expected = [(ids[at], list(ids[:at])) for ids, start in own for at in range(start, len(ids))]
        assert [answers[place] for place in range(len(expected))] == expected
    shuffled = random.sample(requests, len(requests))
    again = [[shuffled[place] for place in bin_.sequences] for bin_ in plan_bins(shuffled, row_tokens)]
    assert again == [[requests[place] for place in bin_.sequences] for bin_ in bins]
