"""Reads every step of an export with another trainer's own code: python trainer_probes.py TRAINER CODE MODEL.

Prints what was found as JSON, a list of steps. CODE is the trainer's unpacked wheel. What it imports and does not need
here (deepspeed, PIL, ...) is stood in for by mocks; what reads configs and pairs is its own code. Run in a process of
its own, with the export folder as cwd.
"""

import enum
import importlib
import importlib.abc
import importlib.machinery
import json
import runpy
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: str):
        self.names = set(names.split())

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__, module.__version__ = [], spec, spec.name, "99"
        return module

    def exec_module(self, module):
        pass


def openrlhf(model: str, steps: list[int]) -> list[dict]:
    """Start its command as step_T.sh does, up to the trainer: the texts it loads, by our script and without."""
    sys.meta_path.append(StandIns("pylatexenc deepspeed torchdata flash_attn ray loralib wandb jsonlines"))
    stateful = importlib.import_module("torchdata.stateful_dataloader")
    stateful.StatefulDataLoader = torch.utils.data.DataLoader  # what it is made of
    import openrlhf.cli.train_dpo as cli
    import openrlhf.models
    import openrlhf.trainer.dpo_trainer
    import openrlhf.utils
    from openrlhf.utils.deepspeed import DeepspeedStrategy

    tokenizer, caught = AutoTokenizer.from_pretrained(model), {}

    def strategy(args):
        made = object.__new__(DeepspeedStrategy)
        made.args, made.seed = args, 0
        made.setup_distributed = made.print = made.get_ds_train_config = made.get_ds_eval_config = MagicMock()
        made.is_rank_0 = lambda: False
        made.prepare = lambda *_: ((MagicMock(),) * 3, MagicMock())
        return made

    def trainer(**kwargs):
        caught.update(loader=kwargs["train_dataloader"], beta=kwargs["beta"], epochs=kwargs["max_epochs"])
        raise SystemExit

    openrlhf.models.Actor = lambda name, **_: caught.setdefault("models", []).append(name) or MagicMock()
    openrlhf.utils.get_strategy, openrlhf.utils.get_tokenizer = strategy, lambda *_, **__: tokenizer
    openrlhf.trainer.dpo_trainer.DPOTrainer = trainer
    cli.RewardDataset.__init__.__defaults__ = (None, False, None)  # in this process, not in eight
    found = []
    for run, name in ((runpy.run_module, "openrlhf.cli.train_dpo"), (runpy.run_path, "openrlhf/in_order.py")):
        read = []
        for step in steps:  # without our script first: it changes openrlhf for the whole process
            sys.argv = shlex.split(Path(f"openrlhf/step_{step}.sh").read_text().replace("\\\n", " "), comments=True)[1:]
            read.append(_read(run, name, caught, tokenizer))
        found.append(read)
    return [own | {"without": without} for without, own in zip(*found, strict=True)]


def _read(run: Callable, name: str, caught: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    caught.clear()
    try:
        run(name, run_name="__main__")
    except SystemExit as exit_:
        if exit_.code:
            raise RuntimeError("its parser refused the options") from exit_
    texts = []
    for chosen, mask, *_ in caught["loader"]:
        both = zip(chosen.squeeze(1), mask.squeeze(1), strict=True)
        texts += [tokenizer.decode(ids[seen.bool()]) for ids, seen in both]
    sampler = type(caught["loader"].sampler).__name__
    return {"texts": texts, "sampler": sampler, **{name: caught[name] for name in ("models", "beta", "epochs")}}


def llama_factory(model: str, steps: list[int]) -> list[dict]:
    """Parse its configs, load and tokenise their data: the texts, in order."""
    sys.meta_path.append(StandIns("omegaconf torchaudio av gradio"))
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments, TrainingArguments
    from transformers import HfArgumentParser

    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, FinetuningArguments))
    tokenizer, found = AutoTokenizer.from_pretrained(model), []
    for step in steps:
        config = yaml.safe_load(Path(f"llama_factory/step_{step}.yaml").read_text()) | {"bf16": False}
        config["warmup_steps"] = config.pop("warmup_ratio")  # its transformers (up to 5.6) has this, ours that
        model_args, data_args, training_args, method = parser.parse_dict(config)  # refuses what it does not know
        template = get_template_and_fix_tokenizer(tokenizer, data_args)
        training_args.log_level = "error"
        data = get_dataset(template, model_args, data_args, training_args, stage="rm", tokenizer=tokenizer)
        rows = data["train_dataset"]
        texts = [tokenizer.decode(ids) for ids in rows["chosen_input_ids"]]
        answers = [tokenizer.decode([token for token in labels if token >= 0]) for labels in rows["rejected_labels"]]
        told = {"disable_shuffling": method.disable_shuffling, "ref_model": method.ref_model, "beta": method.pref_beta}
        told |= {"new": method.create_new_adapter, "rank": method.lora_rank, "model": model_args.model_name_or_path}
        found.append({"texts": texts, "rejected": answers, **told})
    return found


def axolotl(model: str, steps: list[int]) -> list[dict]:
    """Validate its configs, load their data and plugin: the ids of the pairs, in order, and the sampling asked for."""
    sys.meta_path.append(StandIns("PIL posthog numba triton wandb"))
    importlib.import_module("PIL.Image").Resampling = enum.Enum("Resampling", "NEAREST BILINEAR")
    addict = types.ModuleType("addict")
    addict.Dict = _AttributeDict
    sys.modules["addict"] = addict
    prm = types.ModuleType("trl.experimental.prm")  # of its trl 1.9, gone since; nothing here is of it
    prm.PRMConfig = DPOConfig
    sys.modules[prm.__name__] = prm
    sys.path.insert(0, "axolotl")
    from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.data import rl
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    rl.load_tokenizer = lambda _: AutoTokenizer.from_pretrained(model)
    known, plugins = set(AxolotlInputConfig.model_fields), PluginManager.get_instance()
    found = []
    for step in steps:
        config = yaml.safe_load(Path(f"axolotl/step_{step}.yaml").read_text())
        valid = AxolotlInputConfig(**config).model_dump(exclude_none=True)
        for plugin in config["plugins"]:
            plugins.register(plugin)
        cfg = DictDefault(valid)
        rows = rl._load_split(cfg, split="train")
        args = AxolotlDPOConfig(output_dir="out", bf16=False, use_cpu=True, **plugins.get_training_args(cfg))
        told = {"unknown": sorted(set(config) - known), "sampling": args.train_sampling_strategy}
        told |= {"beta": valid["rl_beta"], "model": valid["base_model"]}
        found.append({"ids": rows["pair_id"][:], "first": rows[0], **told})
    return found


class _AttributeDict(dict):
    """As much of addict.Dict as axolotl's DictDefault needs."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        for key, value in dict(*args, **kwargs).items():
            self[key] = self._inside(value)

    def _inside(self, value):
        if isinstance(value, list):
            return [self._inside(one) for one in value]
        return type(self)(value) if isinstance(value, dict) else value

    def __getattr__(self, key):
        return self[key] if key in self else self.__missing__(key)

    def __setattr__(self, key, value):
        self[key] = value


if __name__ == "__main__":
    name, code, model = sys.argv[1:4]
    sys.path.insert(0, code)
    sys.path = [place for place in sys.path if place not in ("", str(Path(__file__).parent))]
    steps = list(range(1, 1 + len(list(Path("steps").glob("step_*.parquet")))))
    found = {"openrlhf": openrlhf, "llama_factory": llama_factory, "axolotl": axolotl}[name](model, steps)
    print("FOUND " + json.dumps(found, default=str))  # noqa: T201
