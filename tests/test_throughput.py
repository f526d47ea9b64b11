"""The account of the work, by hand."""

import time

import pytest
import torch
import transformers

from sdpo_data import throughput
from sdpo_data.throughput import Work, measure_flops


@pytest.fixture
def model():
    """Per token 2 layers x (4 x 8 x 8 attention + 3 x 8 x 16 MLP) = 1,280 weights, 8 x 10 in the head, tied."""
    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_an_account_by_hand(model, scores, monkeypatch):
    """Answers 3 4 and 5 after 1 2, without their last tokens: 1 2 3 = 3 nodes; 7 tokens alone, 3 for the head.

    In one padded batch 2 x 4 tokens. The eight answers that the store knew are no part of it.
    """
    monkeypatch.setattr(throughput, "measure_flops", lambda _: 1e6)
    work = Work()
    work.add_plan([([1, 2, 3, 4], 2), ([1, 2, 5], 2)], tokens=3, known=8)
    assert (work.tokens, work.floor, work.alone, work.reads, work.known, work.computed) == (3, 3, 7, 3, 8, 2)
    assert work.describe_plan() == "score (1.00 of the floor, 4 tokens saved, 1 of padding avoided)"
    assert work.describe_rate(100.0) == ""  # nothing measured yet
    with work.timed(model, 3):
        time.sleep(0.01)
    assert (work.backbone, work.head, work.own_tokens) == (1280, 80, 3)
    assert work.flops_per_token == 2 * (1280 + 80)  # as many reads as tokens
    assert work.describe_rate(100.0) == ", 27% of matmul"  # 272,000 of 1,000,000
    work.seconds = 1.5
    first, second = work.describe(scores)
    assert first == "scored 5 pairs: 8 answers from the store, 2 computed"
    assert second == (
        "2 tokens/s over 1.5 s, 1% of the 0 GFLOP/s measured in a plain matrix product; 3 tokens computed, 1.00 of the "
        "floor (3; 7 without sharing, 8 in padded batches of 16)"
    )


def test_padding_is_counted_batch_by_batch_as_asked():
    """16 answers of 3 tokens but one of 5, then one of 4: 16 x 5 and 1 x 4; alone 15 x 3 + 5 + 4."""
    work = Work()
    lengths = [3] * 15 + [5, 4]
    work.add_plan([(list(range(length)), 1) for length in lengths], tokens=4, known=0)
    assert (work.padded, work.alone) == (84, 54)


def test_what_was_known_says_nothing_of_speed(scores):
    work = Work()
    work.add_plan([], tokens=0, known=10)
    assert list(work.describe(scores)) == ["scored 5 pairs: 10 answers from the store, 0 computed"]


def test_the_device_is_measured(model):
    assert measure_flops(model) > 1e8
    with torch.inference_mode():
        assert measure_flops(model.to(torch.bfloat16)) > 1e7
