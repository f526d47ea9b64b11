"""The prefix engine: trees by hand, and every model gives in a row what it gives alone."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sdpo_data import prefix
from sdpo_data.prefix import count_tokens, plan_rows, score_completions

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, sliding_window=16, final_logit_softcapping=5.0),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=16),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "bloom": lambda: transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4),
}
PACKS = {"llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt2"}


def build(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()


def alone(model, ids, start):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logps = logits.log_softmax(-1)
    expected = [logps[place - 1, ids[place]].item() for place in range(start, len(ids))]
    return expected, all(logits[place - 1].argmax() == ids[place] for place in range(start, len(ids)))


def scored(model, sequences, budget):
    found = [None] * len(sequences)
    for places, completions in score_completions(model, sequences, budget):
        for place, completion in zip(places, completions, strict=True):
            assert found[place] is None  # scored once
            found[place] = completion
    return found


def test_a_row_by_hand():
    """Prompt 5 6, answers 7 8 1 and 9 2: depth first, without 1 and 2; 9 sits at depth 2 and sees 5 6 9."""
    [row] = plan_rows([([5, 6, 7, 8, 1], 2), ([5, 6, 9, 2], 2)], [0, 1], 100)
    assert row.tokens.tolist() == [5, 6, 7, 8, 9]
    assert row.depth.tolist() == [0, 1, 2, 3, 2]
    assert row.end.tolist() == [5, 5, 4, 4, 5]
    seen = [[j for j in range(i + 1) if i < row.end[j]] for i in range(5)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]]
    assert {place: nodes.tolist() for place, nodes in row.predictors.items()} == {0: [1, 2, 3], 1: [1, 4]}
    assert {place: ids.tolist() for place, ids in row.targets.items()} == {0: [7, 8, 1], 1: [9, 2]}


def test_a_tree_of_three_levels_counts_each_token_once():
    """1 2 is shared by four, 3 by two of them; the last tokens (0) are in no row: 1 2 6, 3 4, 5, 7 = 7 nodes."""
    sequences = [([1, 2, 6, 0], 2), ([1, 2, 3, 4, 0], 2), ([1, 2, 3, 5, 0], 3), ([1, 2, 7, 0], 1)]
    assert count_tokens(sequences) == 7
    assert sum(len(row.tokens) for row in plan_rows(sequences, range(4), 5)) > 7  # two rows pay for 1 2 twice


def test_choices_of_one_token_cost_nothing_but_their_question():
    """MMLU's A, B, C, D after one context: four requests, and the context's three tokens are all that is read."""
    assert count_tokens([([7, 8, 9, choice], 3) for choice in (1, 2, 3, 4)]) == 3


def test_long_rows_are_only_for_those_who_share():
    """Two strangers of 400 tokens get a row each; two answers after 400 shared tokens get one."""
    strangers = [([1] * 401, 200), ([2] * 401, 200)]
    assert [len(row.tokens) for row in plan_rows(strangers, range(2), 4096)] == [400, 400]
    siblings = [([1] * 400 + [2] * 101, 400), ([1] * 400 + [3] * 101, 400)]
    assert [len(row.tokens) for row in plan_rows(siblings, range(2), 4096)] == [600]
    assert [len(row.tokens) for row in plan_rows(siblings, range(2), 550)] == [500, 500]


token = st.integers(0, 3)  # few tokens, so that much is shared
trees = st.lists(st.lists(token, min_size=2, max_size=12).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids) - 1))), min_size=1, max_size=12)  # fmt: skip


@given(trees, st.integers(1, 40), st.randoms(use_true_random=False))
def test_in_any_plan_every_completion_reads_its_own_ancestors(sequences, budget, random):
    rows = plan_rows(sequences, range(len(sequences)), budget)
    assert sorted(place for row in rows for place in row.predictors) == list(range(len(sequences)))
    for row in rows:
        assert len(row.tokens) <= budget or len(row.predictors) == 1
        for place, nodes in row.predictors.items():
            ids, start = sequences[place]
            last = nodes[-1]
            ancestors = [j for j in range(last + 1) if last < row.end[j]]
            assert row.tokens[ancestors].tolist() == ids[:-1]
            assert row.depth[ancestors].tolist() == list(range(len(ids) - 1))
            assert nodes.tolist() == ancestors[start - 1 :]
            assert row.targets[place].tolist() == ids[start:]
    shuffled = random.sample(sequences, len(sequences))
    again = plan_rows(shuffled, range(len(sequences)), budget)
    assert [row.tokens.tolist() for row in again] == [row.tokens.tolist() for row in rows]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gives_what_a_plain_forward_gives(name):
    model = build(name)
    random = np.random.default_rng(1)
    stem = random.integers(0, 60, 10).tolist()
    sequences = [(stem + random.integers(0, 60, n).tolist(), 10) for n in (1, 3, 6)]  # within the windows of 16
    sequences += [
        (stem[:4] + random.integers(0, 60, n).tolist(), s) for n, s in ((2, 5), (40, 4), (20, 9))
    ]  # past them
    for budget in (1, 24, 500):
        for sequence, completion in zip(sequences, scored(model, sequences, budget), strict=True):
            logps, greedy = alone(model, *sequence)
            assert completion.logps == pytest.approx(logps, abs=1e-4)
            assert completion.greedy == greedy
    assert prefix._packs[model] == (name in PACKS)


def test_greedy_is_seen():
    model = build("llama")
    ids = [5, 6, 7]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 60]
    assert [completion.greedy for completion in scored(model, [(ids, 3), (other, 3)], 100)] == [True, False]


def test_the_order_of_the_sequences_does_not_change_a_bit():
    model = build("llama")
    random = np.random.default_rng(2)
    sequences = [(random.integers(0, 3, 12).tolist(), 4) for _ in range(20)]
    forward = scored(model, sequences, 40)
    backward = scored(model, sequences[::-1], 40)[::-1]
    for one, other in zip(forward, backward, strict=True):
        assert one.logps.tobytes() == other.logps.tobytes()


def test_a_sequence_without_a_completion_is_never_scored_zero():
    with pytest.raises(ValueError, match="Sequence 1 has no completion token"):
        scored(build("llama"), [([0, 1], 1), ([0, 1], 2)], 8)


def test_uniform_model_by_hand():
    """A head of zeros gives every token 1/60: three completion tokens are -3 ln 60."""
    model = build("gpt2")
    model.transformer.ln_f.weight.data.zero_()
    [completion] = scored(model, [([1, 2, 3, 4, 5], 2)], 10)
    assert completion.logps.sum() == pytest.approx(-3 * math.log(60), abs=1e-4)
