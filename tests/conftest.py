"""Shared fixtures: a tiny random model with a real tokenizer, and where the real data lies."""

import os
import sys
from pathlib import Path

import polars as pl
import pytest

from sdpo_data.pairs import read_pairs
from sdpo_data.run import Run
from sdpo_data.tables import SCORES

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("SDPO_SHARED_DATA", ROOT.parent / "shared" / "data"))

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [
    ("What is the capital of France?", "Paris is the capital of France.", "I do not know."),
    ("Name a fruit.", "An apple.", "A stone, a tree, or a car, depending on the day."),
    ("How many legs has a spider?", "A spider has eight legs.", "Six."),
    ("Write a greeting.", "Hello, and welcome to our house!", "No."),
    ("What colour is the sky on a clear day?", "Blue.", "The sky is green on a clear day, as all know."),
    ("Translate 'chat' to English.", "Cat.", "Dog."),
    ("What is two and two?", "Four.", "Five, or so they say in the books."),
    ("Name a month.", "June is a month of the year.", "Monday."),
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a random two-layer Llama with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(question) for question in QUESTIONS], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def pair_file(tmp_path) -> Path:
    """Eight real-looking pairs of two sources, as JSON lines."""
    rows = [
        {"prompt": [{"role": "user", "content": q}], "chosen": [{"role": "assistant", "content": c}],
         "rejected": [{"role": "assistant", "content": r}], "source": "even" if i % 2 == 0 else "odd"}
        for i, (q, c, r) in enumerate(QUESTIONS)
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    pl.DataFrame(rows).write_ndjson(path)
    return path


@pytest.fixture
def pairs(pair_file) -> pl.DataFrame:
    return read_pairs(pair_file)


@pytest.fixture
def scores() -> pl.DataFrame:
    """Five scored pairs that every definition of difficulty ranks in its own way.

    margins, nats: a +1, b -3, c +1, d -9, e +4 (a and c tie)
    per token: a -10/4 + 11/2 = +3, b -12/4 + 9/3 = 0, c -8/2 + 9/3 = -1, d -24/12 + 15/5 = +1,
    e -5/1 + 9/4 = -2.75
    reward accuracy prefers chat (2/3) to math (1/2); the mean margin math (-1) to chat (-4/3).
    """
    given = (None,) * 5  # no ratings, no second model
    rows = [
        ("a", "q1", "math", "key", -10.0, -11.0, 4, 2, 7, False, "float32", *given),
        ("b", "q2", "math", "key", -12.0, -9.0, 4, 3, 8, False, "float32", *given),
        ("c", "q3", "chat", "key", -8.0, -9.0, 2, 3, 9, False, "float32", *given),
        ("d", "q4", "chat", "key", -24.0, -15.0, 12, 5, 10, True, "float32", *given),
        ("e", "q5", "chat", "key", -5.0, -9.0, 1, 4, 11, False, "float32", *given),
    ]
    return pl.DataFrame(rows, SCORES, orient="row")


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run a command in this process: run_command("sdpo_data.partition", ...) -> (exit code, stdout, stderr)."""
    import importlib

    from sdpo_data.console import command

    def run(module: str, *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module, *map(str, args)])
        main = getattr(importlib.import_module(module), "main", None)  # none in a package: it has __main__
        try:
            command(main or importlib.import_module(f"{module}.__main__").main)
        except SystemExit as exit_:
            code = exit_.code
        else:
            code = 0
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return run


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED} (set SDPO_SHARED_DATA)")
    return SHARED


def ready_to_train(path: Path, pairs: pl.DataFrame, model: Path, parts: int) -> Run:
    """Make a run folder that a step can be trained in: pairs, scores, and a partition in so many parts."""
    from sdpo_data import PartitionConfig, partition_pairs, score_pairs

    path.mkdir()
    scores = score_pairs(pairs, model)
    partition = partition_pairs(scores, PartitionConfig(parts=parts))
    for name, frame in (("pairs", pairs), ("scores", scores), ("partition", partition)):
        frame.write_parquet(path / f"{name}.parquet")
    return Run(path)
