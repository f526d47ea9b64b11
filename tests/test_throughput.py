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
    """Answers 3 4 and 5 after 1 2, without their last tokens: 1 2 3 = 3 nodes; 7 tokens alone, 3 for the head."""
    monkeypatch.setattr(throughput, "measure_flops", lambda _: 1e6)
    work = Work()
    work.add_plan([([1, 2, 3, 4], 2), ([1, 2, 5], 2)], tokens=3, known=8)
    assert (work.tokens, work.floor, work.alone, work.reads, work.known, work.computed) == (3, 3, 7, 3, 8, 2)
    assert work.describe_plan() == "score (1.00 of the floor, 4 tokens saved)"
    assert work.describe_rate(100.0) == ""  # nothing measured yet
    with work.timed(model, 3):
        time.sleep(0.01)
    assert (work.backbone, work.head, work.own_tokens) == (1280, 80, 3)
    assert work.flops_per_token == 2 * (1280 + 80)  # as many reads as tokens
    assert work.describe_rate(100.0) == ", 27% of matmul"  # 272,000 of 1,000,000
    work.seconds, work.known = 1.5, 0
    # the conftest's five pairs in one padded batch: prompt + longer answer 11, 12, 12, 22, 15, each pair 2 x 22
    first, second = work.describe(scores)
    assert first == "scored 5 pairs: 0 answers from the store, 2 computed"
    assert second == (
        "2 tokens/s over 1.5 s, 1% of the 0 GFLOP/s measured in a plain matrix product; 3 tokens computed, 1.00 of the "
        "floor (3; 7 without sharing, 220 in padded batches of 8 pairs in data order)"
    )


def test_what_was_known_says_nothing_of_speed(scores):
    work = Work()
    work.add_plan([], tokens=0, known=10)
    assert list(work.describe(scores)) == ["scored 5 pairs: 10 answers from the store, 0 computed"]


def test_the_device_is_measured(model):
    assert measure_flops(model) > 1e8
    with torch.inference_mode():
        assert measure_flops(model.to(torch.bfloat16)) > 1e7
