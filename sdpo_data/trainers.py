"""How other trainers keep the order of the steps and the chain of references: their configs, key by key.

Every option here was read in the release that `version` names; what a trainer cannot keep stands in its `promise`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdpo_data.training import StepSettings

Row = dict[str, Any]
Option = tuple[str, Any, str]  # key, value, why; an empty why says nothing
Files = dict[str, str]  # path in the export folder -> text


@dataclass(frozen=True)
class Job:
    """One step for one trainer: where it starts, which is also its reference, and what it writes."""

    step: int
    pairs: int
    as_messages: bool
    start: str
    """A folder or hub id, for step 1; from step 2 on what the step before wrote."""
    out: str
    """Folder of the whole model the step gives, adapters merged."""
    config: StepSettings
    device_pairs: int
    """Pairs per forward pass."""

    @property
    def data(self) -> str:
        return f"steps/step_{self.step}.parquet"

    @property
    def trained(self) -> str:
        """What the trainer itself writes: the model, or the adapter that is merged into it afterwards."""
        return f"{self.out}_adapter" if self.config.lora_rank else self.out


@dataclass(frozen=True)
class Trainer:
    """One trainer: which pairs it cannot read, its files for a step, and what it keeps."""

    version: str
    refuse: Callable[[Row], str | None]
    """Why the trainer would drop a pair, or show the model another text; None where it would not."""
    files: Callable[[Job], Files]
    run: Callable[[Job], list[str]]
    """Command lines of a step, started in the export folder."""
    shared: Files
    promise: str


def write_yaml(options: Sequence[Option]) -> str:
    """Write options as YAML that any reader of YAML reads alike, each with its reason behind it."""
    lines = [f"{key}: {_scalar(value)}" + (f"  # {why}" if why else "") for key, value, why in options]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if isinstance(value, float):  # PyYAML takes 5e-07 for a string
        mantissa, mark, exponent = repr(value).partition("e")
        return mantissa + (".0" if mark and "." not in mantissa else "") + mark + exponent
    return json.dumps(value, ensure_ascii=False)


# --- TRL


def _trl_yaml(job: Job) -> Files:
    config = job.config
    options: list[Option] = [
        ("model_name_or_path", job.start, "TRL loads it once more from here as the reference"),
        ("dtype", "float32", "weights; the forward pass is bfloat16 unless bf16: false"),
        ("datasets", [{"path": "parquet", "data_files": job.data, "split": "train"}], ""),
        ("train_sampling_strategy", "sequential", "the default shuffles"),
        ("output_dir", job.trained, ""),
        ("beta", config.beta, ""),
        ("learning_rate", config.learning_rate, ""),
        ("lr_scheduler_type", config.lr_scheduler_type, ""),
        ("warmup_steps", config.warmup, "below 1 it is a share of the step's updates"),
        ("num_train_epochs", config.epochs, ""),
        ("per_device_train_batch_size", job.device_pairs, ""),
        ("gradient_accumulation_steps", _accumulation(job), "on one device"),
        ("max_length", config.max_length, "longer answers are cut, prompts of this length dropped"),
        ("save_strategy", "no", "the end is saved all the same"),
        ("logging_steps", 1, ""),
        ("report_to", "none", ""),
    ]
    if config.lora_rank:
        options += [
            ("use_peft", True, "the reference is the start with the adapter off"),
            ("lora_r", config.lora_rank, ""),
            ("lora_alpha", config.lora_alpha or 2 * config.lora_rank, ""),
            ("lora_target_modules", ["all-linear"], ""),
        ]
    return {f"trl/step_{job.step}.yaml": write_yaml(options)}


def _trl_run(job: Job) -> list[str]:
    merge = [f"python trl/merge.py {job.trained} {job.out}"] if job.config.lora_rank else []
    return [f"trl dpo --config trl/step_{job.step}.yaml", *merge]


MERGE = '''"""Merge a LoRA adapter into its model, in float32: python trl/merge.py ADAPTER OUT."""

import sys

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

adapter, out = sys.argv[1:]
AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(adapter).save_pretrained(out)
'''

TRL = Trainer(
    "trl 1.16",
    lambda _: None,
    _trl_yaml,
    _trl_run,
    {"trl/merge.py": MERGE},
    """Kept: the order of the pairs, within a step and over its epochs; the tokens are those that were scored; each
step starts from, and refers to, the folder the step before wrote, adapters merged. Several processes: every
update sees the same pairs if per_device_train_batch_size x gradient_accumulation_steps x processes stays the
same, but the last batch is filled up with the first pairs of the step. Not kept: prompts of max_length tokens or
more are dropped without a word; none is, if max_length is the one the pairs were scored with.""",
)

# --- LLaMA-Factory


def llama_factory_row(row: Row) -> Row:
    """Write a pair as LLaMA-Factory's sharegpt form wants it: the answers as one message each, the system apart."""
    system = [message["content"] for message in row["prompt"] if message["role"] == "system"]
    return {
        "pair_id": row["pair_id"],
        "system": system[0] if system else "",
        "conversations": [message for message in row["prompt"] if message["role"] != "system"],
        "chosen": row["chosen"][0],
        "rejected": row["rejected"][0],
    }


def _llama_factory_refuses(row: Row) -> str | None:
    if isinstance(row["prompt"], str):
        return "plain text gets no EOS there"
    if row["tools"] is not None or any(set(message) - {"role", "content"} for message in _messages(row)):
        return "its tools would be written by LLaMA-Factory's own format, not by the model's template"
    roles = [message["role"] for message in row["prompt"]]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    if len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return "its prompt does not alternate between user and assistant and end with the user"
    if any([message["role"] for message in row[side]] != ["assistant"] for side in ("chosen", "rejected")):
        return "an answer is more than one message of the assistant"
    return None


def _llama_factory_files(job: Job) -> Files:
    config, name = job.config, f"llama_factory/step_{job.step}.yaml"
    options: list[Option] = [
        ("model_name_or_path", job.start, ""),
        ("stage", "dpo", ""),
        ("do_train", True, ""),
        *_llama_factory_method(job),
        ("pref_loss", "sigmoid", ""),
        ("pref_beta", config.beta, ""),
        ("dataset_dir", "llama_factory", ""),
        ("dataset", f"step_{job.step}", ""),
        ("disable_shuffling", True, "the default shuffles"),
        ("cutoff_len", config.max_length, "longer prompts and answers are cut, both in proportion"),
        ("output_dir", job.trained, ""),
        ("learning_rate", config.learning_rate, ""),
        ("lr_scheduler_type", config.lr_scheduler_type, ""),
        ("warmup_ratio", config.warmup, ""),
        ("num_train_epochs", float(config.epochs), ""),
        ("per_device_train_batch_size", job.device_pairs, ""),
        ("gradient_accumulation_steps", _accumulation(job), "on one device"),
        ("bf16", True, "the forward pass; trained weights are float32"),
        ("save_strategy", "no", "the end is saved all the same"),
        ("logging_steps", 1, ""),
        ("report_to", "none", ""),
    ]
    files = {name: write_yaml(options)}
    if config.lora_rank:
        merge: list[Option] = [
            ("model_name_or_path", job.start, ""),
            ("adapter_name_or_path", job.trained, ""),
            ("finetuning_type", "lora", ""),
            ("export_dir", job.out, ""),
            ("export_device", "cpu", ""),
            ("infer_dtype", "float32", "auto would round the merged weights to bfloat16"),
        ]
        files[f"llama_factory/merge_{job.step}.yaml"] = write_yaml(merge)
    return files


def _llama_factory_method(job: Job) -> list[Option]:
    rank = job.config.lora_rank
    if not rank:
        return [("finetuning_type", "full", ""), ("ref_model", job.start, "the model the step starts from")]
    return [
        ("finetuning_type", "lora", "its reference is the start with the adapter off"),
        ("lora_rank", rank, ""),
        ("lora_alpha", job.config.lora_alpha or 2 * rank, ""),
        ("lora_target", "all", ""),
        ("create_new_adapter", True, "a continued one would have the model before all steps as its reference"),
    ]


def _llama_factory_run(job: Job) -> list[str]:
    merge = [f"llamafactory-cli export llama_factory/merge_{job.step}.yaml"] if job.config.lora_rank else []
    return [f"llamafactory-cli train llama_factory/step_{job.step}.yaml", *merge]


def llama_factory_info(steps: Sequence[int]) -> str:
    """Write dataset_info.json: which columns and roles the steps' files have."""
    entry = {
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "system": "system"},
        "tags": {
            "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
            "system_tag": "system", "observation_tag": "tool", "function_tag": "function_call",
        },
    }  # fmt: skip
    return json.dumps({f"step_{step}": {"file_name": f"step_{step}.parquet", **entry} for step in steps}, indent=2)


LLAMA_FACTORY = Trainer(
    "llamafactory 0.9.5",
    _llama_factory_refuses,
    _llama_factory_files,
    _llama_factory_run,
    {},
    """Kept: the order of the pairs (disable_shuffling); each step starts from, and refers to, what the step before
wrote; adapters are new in each step and merged after it, in float32. Not kept: its own templates write the
tokens. Without `template` it takes the model's chat template apart; look at the printed training example, or
name the template yourself. Answers and prompts over cutoff_len are cut in proportion, so the score of a pair
that long is not the one that was measured.""",
)

# --- axolotl


def _axolotl_files(job: Job) -> Files:
    config = job.config
    options: list[Option] = [
        ("base_model", job.start, "loaded once more as the reference, or the reference with the adapter off"),
        ("plugins", ["sdpo_in_order.KeepOrder"], "curriculum_sampling does not reach the sampler of rl: dpo"),
        ("rl", "dpo", ""),
        ("rl_beta", config.beta, ""),
        ("datasets", [{"path": job.data, "split": "train", "type": "passthrough"}], "TRL reads the messages itself"),
        ("skip_prepare_dataset", True, "its own preparation would drop all but text"),
        ("shuffle_merged_datasets", False, "the default shuffles"),
        ("val_set_size", 0.0, ""),
        ("sequence_len", config.max_length, "longer answers are cut, prompts of this length dropped"),
        ("sample_packing", False, ""),
        ("output_dir", job.trained, ""),
        ("learning_rate", config.learning_rate, ""),
        ("lr_scheduler", config.lr_scheduler_type, ""),
        ("warmup_ratio", config.warmup, ""),
        ("num_epochs", float(config.epochs), ""),
        ("micro_batch_size", job.device_pairs, ""),
        ("gradient_accumulation_steps", _accumulation(job), "on one device"),
        ("optimizer", "adamw_torch", ""),
        ("bf16", False, "true loads the weights in bfloat16, where small updates vanish between the steps"),
        ("save_strategy", "no", "the end is saved all the same"),
        ("logging_steps", 1, ""),
    ]
    if config.lora_rank:
        options += [
            ("adapter", "lora", ""),
            ("lora_r", config.lora_rank, ""),
            ("lora_alpha", config.lora_alpha or 2 * config.lora_rank, ""),
            ("lora_target_linear", True, ""),
        ]
    return {f"axolotl/step_{job.step}.yaml": write_yaml(options)}


def _axolotl_run(job: Job) -> list[str]:
    lines = [f"PYTHONPATH=axolotl axolotl train axolotl/step_{job.step}.yaml"]
    if job.config.lora_rank:
        lines += [f"PYTHONPATH=axolotl axolotl merge-lora axolotl/step_{job.step}.yaml"]
        lines += [f"mv {job.trained}/merged {job.out}"]
    return lines


KEEP_ORDER = '''"""axolotl's plugin for the order of the pairs: PYTHONPATH=axolotl axolotl train axolotl/step_1.yaml."""

from axolotl.integrations.base import BasePlugin


class KeepOrder(BasePlugin):
    def get_training_args(self, cfg):
        return {"train_sampling_strategy": "sequential"}  # transformers' own setting, which no key of axolotl reaches
'''

AXOLOTL = Trainer(
    "axolotl 0.19.0 (trl 1.9.0, transformers 5.16.1)",
    lambda _: None,
    _axolotl_files,
    _axolotl_run,
    {"axolotl/sdpo_in_order.py": KEEP_ORDER},
    """Kept: the order of the pairs, by the plugin beside the configs: without it the trainer of rl: dpo draws at
random, whatever curriculum_sampling says. The messages reach TRL as they are (type: passthrough,
skip_prepare_dataset), so that the tokens are TRL's. Each step starts from, and refers to, what the step before
wrote. Not kept: as with TRL, the last batch of several processes, and prompts of sequence_len tokens or more.""",
)

# --- OpenRLHF


def _openrlhf_files(job: Job) -> Files:
    config = job.config
    options = [
        f"--model.model_name_or_path {_quoted(job.start)}",
        f"--ref.model_name_or_path {_quoted(job.start)}",
        f"--data.dataset {job.data}",
        "--data.prompt_key prompt --data.chosen_key chosen --data.rejected_key rejected",
        *(["--data.apply_chat_template"] if job.as_messages else []),
        f"--data.max_len {config.max_length}",
        f"--model.beta {config.beta}",
        f"--adam.lr {config.learning_rate}",
        f"--lr_scheduler {config.lr_scheduler_type}",
        f"--lr_warmup_ratio {config.warmup}",
        f"--train.max_epochs {config.epochs}",
        f"--train.batch_size {config.batch_pairs}",
        f"--train.micro_batch_size {job.device_pairs}",
        f"--ckpt.output_dir {job.trained}",
    ]
    if config.lora_rank:
        options.append(f"--ds.lora.rank {config.lora_rank} --ds.lora.alpha {config.lora_alpha or 2 * config.lora_rank}")
    command = " \\\n    ".join(["deepspeed openrlhf/in_order.py", *options])
    return {f"openrlhf/step_{job.step}.sh": f"#!/usr/bin/env bash\n# from the export folder\n{command}\n"}


def _openrlhf_run(job: Job) -> list[str]:
    merge = (
        f"python -m openrlhf.cli.lora_combiner --model_path {_quoted(job.start)} "
        f"--lora_path {job.trained} --output_path {job.out}"
    )
    return [f"bash openrlhf/step_{job.step}.sh", *([merge] if job.config.lora_rank else [])]


def _openrlhf_refuses(row: Row) -> str | None:
    if row["tools"] is not None:
        return "OpenRLHF does not show tools to the chat template"
    return None


IN_ORDER = '''"""OpenRLHF's DPO with its data in order: no option does that, its code asks for a shuffle."""

import runpy

from openrlhf.utils.deepspeed import DeepspeedStrategy

shuffling = DeepspeedStrategy.setup_dataloader


def in_order(self, replay_buffer, batch_size, pin_memory=False, shuffle=True, *args, **kwargs):
    return shuffling(self, replay_buffer, batch_size, pin_memory, False, *args, **kwargs)


DeepspeedStrategy.setup_dataloader = in_order
runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__")
'''

OPENRLHF = Trainer(
    "openrlhf 0.11.2",
    _openrlhf_refuses,
    _openrlhf_files,
    _openrlhf_run,
    {"openrlhf/in_order.py": IN_ORDER},
    """Kept, by openrlhf/in_order.py alone: the order of the pairs. OpenRLHF has no option for it: its command
always shuffles. Each step starts from, and refers to, what the step before wrote. Not kept: the pairs that fill
no whole batch at the end of a step are not trained on (see the table); weights are handed on in bfloat16, where
updates below about 0.4 % of a weight vanish; a blank stands before EOS where the template does not end with
EOS, and before the EOS of plain text; prompts within two tokens of max_len are dropped without a word.""",
)

TRAINERS = {"trl": TRL, "llama_factory": LLAMA_FACTORY, "axolotl": AXOLOTL, "openrlhf": OPENRLHF}


def _messages(row: Row) -> list[Row]:
    return [*row["prompt"], *row["chosen"], *row["rejected"]]


def _accumulation(job: Job) -> int:
    return job.config.batch_pairs // job.device_pairs


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
