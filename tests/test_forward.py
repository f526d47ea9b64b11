"""Shared prefixes under TRL's loss: gradients, whole updates, and 21 updates beside TRL's own trainer."""

import json
import logging
import math
import os
import subprocess
import sys

import datasets
import numpy as np
import polars as pl
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from sdpo_data import probe
from sdpo_data.encode import encode_pairs
from sdpo_data.models import load_model
from sdpo_data.probe import Reading
from sdpo_data.tree import count_tokens
from sdpo_train import forward
from sdpo_train.config import StepConfig
from sdpo_train.dpo import train_step
from sdpo_train.forward import Sharing, plan_passes, read_requests, share_prefixes
from tests.conftest import ROOT
from tests.test_dpo import work  # noqa: F401 (a fixture)

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0,
        "eos_token_id": 0, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}  # fmt: skip
MODELS = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
}
PAIRS = [  # prompt, chosen, rejected; the first two have their prompt in common, and half an answer
    ([1, 2, 3, 4], [5, 6, 7], [5, 8]),
    ([1, 2, 3, 4], [9], [5, 6, 11, 12]),
    ([20, 21], [22, 23, 24], [25]),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test measures its models anew, and leaves no trace of random ones."""
    monkeypatch.setattr(probe, "_readings", {})
    monkeypatch.setattr(probe, "cache_folder", lambda: tmp_path)


def build(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def batch(pairs=PAIRS):
    """What TRL's collator makes of pairs, and TRL's call of the model."""
    rows = [prompt + answer for side in (1, 2) for prompt, answer in ((pair[0], pair[side]) for pair in pairs)]
    starts = [len(pair[0]) for pair in pairs] * 2
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill((mask == 0) | (torch.arange(length) < torch.tensor(starts)[:, None]), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True, "use_cache": False}


def gradients(model, outputs, inputs):
    """Of a sum in which every token counts differently."""
    weights = torch.arange(outputs.log_probs.numel(), dtype=torch.float64).sin().view(outputs.log_probs.shape)
    model.zero_grad()
    (outputs.log_probs * weights * (inputs["labels"][:, 1:] != -100)).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def plain(model, inputs):
    """Each row by itself, without padding, in the model's own forward."""
    log_probs = torch.zeros(inputs["labels"][:, 1:].shape, dtype=torch.float64)
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        own = ids[: mask.sum()]
        logps = model(input_ids=own[None]).logits[0].log_softmax(-1)
        log_probs[row, : len(own) - 1] = logps[:-1].gather(1, own[1:, None])[:, 0]
    return type("Outputs", (), {"log_probs": log_probs * (inputs["labels"][:, 1:] != -100)})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_plain_forwards(name, checkpointing, monkeypatch):
    """In float64; but rotary angles are float32 in Llama and Qwen. In blocks of three rows through the head."""
    monkeypatch.setattr("sdpo_data.head.HEAD_BYTES", {"cpu": 720, "cuda": 720})
    model, inputs = build(name).double().train(), batch()
    expected = plain(model, inputs)
    separate = gradients(model, expected, inputs)
    if checkpointing:
        model.activation_checkpointing_enable()
    assert share_prefixes(model, 9).packed_length >= 9
    assert model.training
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    outputs = model(**inputs)
    assert seen == [11]  # by hand: 1 2 3 4 5 6 11 and 20 21 22 23; last tokens are only predicted
    assert (outputs.log_probs - expected.log_probs).abs().max() < 1e-6
    shared = gradients(model, outputs, inputs)
    tolerance = 1e-8 if name == "gpt2" else 1e-6
    assert max((shared[weight] - separate[weight]).abs().max() for weight in separate) < tolerance
    assert max(gradient.abs().max() for gradient in separate.values()) > 1e-2  # so that the tolerance says something


def test_what_trl_reads_is_what_its_own_forward_gives():
    model, inputs = build("llama"), batch()
    own = model(**inputs)
    share_prefixes(model, 9)
    ours = model(**inputs)
    read = inputs["labels"][:, 1:] != -100
    assert ours.log_probs.shape == own.log_probs.shape
    torch.testing.assert_close(ours.log_probs, own.log_probs, atol=1e-5, rtol=0)
    assert not ours.log_probs[~read].any()
    assert (ours.is_top1 == own.is_top1).all()
    assert ours.entropy.isnan().all()  # never a wrong number
    assert ours.mean_logits.isnan().all()
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(input_ids=ids).logits, build("llama")(input_ids=ids).logits)  # untouched


def test_bfloat16_autocast():
    model, inputs = build("llama"), batch()
    share_prefixes(model, 9)
    expected = model(**inputs).log_probs
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    outputs.log_probs.sum().backward()
    assert outputs.log_probs.dtype == torch.float32
    torch.testing.assert_close(outputs.log_probs, expected, atol=0.05, rtol=0)
    assert model.lm_head.weight.grad.isfinite().all()


def test_what_cannot_be_read_as_a_tree_is_left_to_trl(caplog):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(**SIZES, sliding_window=16))
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    caplog.set_level(logging.INFO)
    sharing = share_prefixes(model, 30)
    assert sharing.packed_length == 16
    assert "padded batches of like length where pairs have more than 16 tokens" in caplog.text
    assert model(**batch()).entropy.isnan().all()  # within the window
    beyond = batch([(list(range(1, 15)), [1, 2, 3, 4], [5]), PAIRS[0]])
    assert model(**beyond).entropy.isfinite().all()
    assert share_prefixes(build("llama"), 9, unless="of a test") == Sharing(256, 0)
    assert "more than 0 tokens: of a test" in caplog.text


def test_rows_are_taken_apart():
    """First pair by hand: rows 1 2 3 4 | 5 6 7 and 1 2 3 4 | 5 8."""
    inputs = batch(PAIRS[:1])
    requests = read_requests(inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100)
    assert [(ids.tolist(), start) for ids, start in requests] == [([1, 2, 3, 4, 5, 6, 7], 4), ([1, 2, 3, 4, 5, 8], 4)]


@pytest.mark.parametrize("completion", [[0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
def test_a_row_that_is_not_prompt_and_completion_is_refused(completion):
    ids = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="row"):
        read_requests(ids, torch.ones_like(ids), torch.tensor([completion]))


token_lists = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(st.tuples(token_lists, token_lists, token_lists), min_size=1, max_size=8, unique_by=str),
       st.integers(1, 20), st.sampled_from([0, 6, 100]), st.randoms(use_true_random=False))  # fmt: skip
def test_passes_by_their_rules(pairs, budget, packed_length, random):
    def requests(pairs):
        return [(np.array(prompt + pair[side]), len(prompt)) for side in (0, 1) for prompt, *pair in pairs]

    sharing, asked = Sharing(budget, packed_length), requests(pairs)
    passes = plan_passes(asked, sharing)
    assert sorted(pair for group in passes for pair in group) == list(range(len(pairs)))  # each once
    sizes = []
    for group in passes:
        own = [asked[pair + side] for pair in group for side in (0, len(pairs))]
        longest = max(len(ids) for ids, _ in own)
        packed = [max(len(asked[p][0]), len(asked[p + len(pairs)][0])) <= packed_length for p in group]
        assert all(packed) or not any(packed)
        sizes.append(count_tokens(own) if all(packed) else longest * len(own))
        assert sizes[-1] <= budget or len(group) == 1
    assert sizes == sorted(sizes, reverse=True)
    shuffled = random.sample(pairs, len(pairs))
    again = plan_passes(requests(shuffled), sharing)
    content = sorted(sorted(str(pairs[pair]) for pair in group) for group in passes)
    if packed_length in (0, 100):
        assert packed_length == 0 or content == sorted(sorted(str(shuffled[p]) for p in group) for group in again)


def test_a_common_prompt_is_computed_once():
    """Prompt 1 2 3 4 of two pairs is apart in the data; they make 7 nodes, and the third pair 4: over 9."""
    requests = [(np.array(prompt + answer), len(prompt)) for side in (1, 2)
                for prompt, answer in ((pair[0], pair[side]) for pair in (PAIRS[0], PAIRS[2], PAIRS[1]))]  # fmt: skip
    assert plan_passes(requests, Sharing(9, 100)) == [[0, 2], [1]]


SETTINGS = StepConfig(learning_rate=1e-3, batch_pairs=3, epochs=7, beta=0.5, diagnose=False, kl_samples=0)


def trl_alone(work, tiny_model, folder):  # noqa: F811
    """TRL's own trainer: the reference in memory, an update's pairs in one padded batch. Losses by update, the rest."""
    model, tokenizer = load_model(tiny_model)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    rows = encode_pairs(work.pairs, tokenizer, 1024, "cut").select(columns)

    class Tokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    args = DPOConfig(
        output_dir=str(folder), beta=SETTINGS.beta, learning_rate=SETTINGS.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=SETTINGS.warmup, num_train_epochs=SETTINGS.epochs, per_device_train_batch_size=3, bf16=False,
        train_sampling_strategy="sequential", max_length=None, logging_steps=1, save_strategy="no", report_to="none",
        seed=work.seed, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Tokens(
        model=model, args=args, train_dataset=datasets.Dataset(rows.to_arrow()), processing_class=tokenizer
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.model, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.real
@pytest.mark.parametrize("way", ["trees", "small trees", "padded"])
def test_21_updates_beside_trl(way, work, tiny_model, tmp_path, monkeypatch):  # noqa: F811
    """Eight pairs in updates of 3, 3 and 2, seven times; TRL computes each update in one padded batch."""
    config = SETTINGS
    if way == "small trees":
        config = config.model_copy(update={"token_budget": 110})  # two pairs and one: a mean of unequal parts
    if way == "padded":
        monkeypatch.setattr(forward, "read_model", lambda *_: Reading(0, 100, split_head=True))
        config = config.model_copy(update={"token_budget": 150})
    row = train_step(work(), config)
    trained, history = trl_alone(work(), tiny_model, tmp_path / "trl")
    metrics = pl.read_parquet(work().out / "metrics.parquet").filter(~pl.col("name").str.starts_with("cost/"))
    metrics = metrics.pivot("name", index="update", values="value")
    assert metrics["update"].to_list() == list(range(1, 22))
    assert metrics["loss"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["loss"].min() < 0.2  # it learned, and far
    for name in ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "num_tokens", "logps/chosen",
                 "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):  # fmt: skip
        first = int(name == "rewards/accuracies")  # before the first update rewards are 0, and what is larger is noise
        expected = [entry[name] for entry in history]
        assert metrics[name][first:].to_list() == pytest.approx(expected[first:], rel=1e-3, abs=2e-4), name
    assert not set(forward.NOT_COMPUTED) & set(metrics.columns)
    ours, _ = load_model(row["model"])
    for (name, weight), other in zip(ours.named_parameters(), trained.parameters(), strict=True):
        assert (weight - other).abs().max() < 1e-3, name  # what Adam may move them by in one of the 21 updates


STEP = """
import json, sys
from pathlib import Path
import polars as pl
from sdpo_data import workers
from sdpo_data.models import model_key
from sdpo_train.dpo import train_step
from sdpo_train.config import StepConfig
from sdpo_train.work import StepWork
pairs, model, out = sys.argv[1:]
key = model_key(model)
work = StepWork("sdpo", 0, 1, pl.read_parquet(pairs), model, key, model, key, None, Path(out))
row = train_step(work, StepConfig(learning_rate=1e-3, batch_pairs=3, epochs=2, beta=0.5, lora_rank=RANK))
Path(f"{out}.{workers.count()}.{workers.rank()}").write_text(json.dumps(row))
"""


@pytest.mark.real
def test_two_processes_train_as_one(pairs, tiny_model, tmp_path):
    """Updates of 3, 3 and 2 pairs, twice: one process has more of an update than the other. Float32 noise is left."""
    pairs.write_parquet(tmp_path / "pairs.parquet")
    (tmp_path / "step.py").write_text(STEP.replace("RANK", "0"))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node"]  # accelerate launch --cpu starts one process only
    for processes in (1, 2):
        port = ["--master-port", str(29600 + os.getpid() % 300)]
        own = [str(processes), *port, tmp_path / "step.py", tmp_path / "pairs.parquet", tiny_model]
        command = [sys.executable, *launcher, *own, tmp_path / str(processes)]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
                 "ACCELERATE_USE_CPU": "1", "SDPO_CACHE": str(tmp_path / f"cache{processes}")}  # fmt: skip
        done = subprocess.run(list(map(str, command)), env=quiet, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = [json.loads((tmp_path / f"{processes}.{processes}.{rank}").read_text()) for rank in range(processes)]
        assert len({json.dumps({**row, "seconds": 0}) for row in rows}) == 1  # every process returns the same
    cost = pl.col("name").str.starts_with("cost/")
    metrics = [pl.read_parquet(tmp_path / str(count) / "metrics.parquet").filter(~cost) for count in (1, 2)]
    both = metrics[0].join(metrics[1], on=["update", "name"], how="full", coalesce=True)
    assert both.height == metrics[0].height == metrics[1].height
    apart = (pl.col("value") - pl.col("value_right")).abs() > 1e-5 + 1e-4 * pl.col("value").abs()
    assert both.filter(apart.fill_null(value=True)).is_empty()
    one, two = (load_model(tmp_path / str(count))[0] for count in (1, 2))
    for weight, other in zip(one.parameters(), two.parameters(), strict=True):
        assert (weight - other).abs().max() < 1e-5
