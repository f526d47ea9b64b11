"""Steps for other trainers: the pairs in order, the chain of references, and what each trainer does with them."""

import json
import tempfile
from pathlib import Path

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_data.encode import encode_pairs
from sdpo_data.export import ExportConfig, export_steps
from sdpo_data.formats import read_row
from sdpo_data.models import load_tokenizer
from sdpo_data.pairs import read_pairs
from sdpo_data.run import Run
from sdpo_data.tables import PAIRS, PARTITION, SdpoError
from sdpo_data.trainers import TRAINERS, write_yaml
from sdpo_data.training import TrainerSettings

ALL = ExportConfig(to=["trl", "llama_factory", "axolotl", "openrlhf", "datasets"], device_pairs=1)
SMALL = TrainerSettings(batch_pairs=2)
LORA = SMALL.model_copy(update={"lora_rank": 4})
MODEL = "org/model"


def cut(pairs: pl.DataFrame, steps: list[list[int]]) -> pl.DataFrame:
    """PARTITION that trains on the pairs of these rows, in this order."""
    rows = [(row, step) for step, of_step in enumerate(steps, 1) for row in of_step]
    return pl.DataFrame(
        [(pairs["pair_id"][row], pairs["source"][row], step, rank, 0.5, "d") for rank, (row, step) in enumerate(rows)],
        PARTITION,
        orient="row",
    )


@pytest.fixture
def partition(pairs) -> pl.DataFrame:
    return cut(pairs, [[5, 1, 7, 2], [0, 6, 3, 4]])


@pytest.fixture
def export(pairs, partition, tmp_path):
    def export(config: ExportConfig = ALL, training: TrainerSettings = SMALL) -> Path:
        export_steps(pairs, partition, MODEL, tmp_path / "export", config, training)
        return tmp_path / "export"

    return export


def exported_ids(folder: Path, step: int) -> list[str]:
    return pl.read_parquet(folder / f"steps/step_{step}.parquet")["pair_id"].to_list()


# --- the pairs


def test_a_step_holds_its_pairs_in_training_order(export, pairs):
    folder = export()
    for step, rows in ((1, [5, 1, 7, 2]), (2, [0, 6, 3, 4])):
        table = pl.read_parquet(folder / f"steps/step_{step}.parquet")
        assert table["pair_id"].to_list() == pairs["pair_id"][rows].to_list()
        assert table["rank"].to_list() == [4 * (step - 1) + place for place in range(4)]
        assert table["prompt"].to_list() == [json.loads(prompt) for prompt in pairs["prompt"][rows]]


def test_the_folder_of_datasets_is_the_same(export):
    import datasets

    folder = export()
    for step in (1, 2):
        assert datasets.load_from_disk(folder / f"steps/step_{step}")["pair_id"][:] == exported_ids(folder, step)


def test_a_pair_may_stand_in_several_steps(pairs, tmp_path):
    steps = [[3, 1], [1, 0, 3, 2]]  # cumulative
    export_steps(pairs, cut(pairs, steps), MODEL, tmp_path)
    for step, rows in enumerate(steps, 1):
        assert exported_ids(tmp_path, step) == pairs["pair_id"][rows].to_list()


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
TURNS = st.lists(TEXTS, min_size=1, max_size=3)


@st.composite
def raw_rows(draw) -> dict:
    if draw(st.booleans()):
        turn = draw(st.sampled_from(["{}", "\n\nHuman: {}\n\nAssistant:"]))
        sides = draw(st.lists(TEXTS, min_size=2, max_size=2, unique=True))
        return {"prompt": turn.format(draw(TEXTS)), "chosen": sides[0], "rejected": sides[1], "source": "texts"}
    system = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    prompt = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(draw(TURNS))]
    chosen, rejected = ([{"role": "assistant", "content": draw(TEXTS)}] for _ in range(2))
    return {"prompt": system + prompt, "chosen": chosen, "rejected": rejected, "source": "messages"}


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(raw_rows(), min_size=1, max_size=6), prompt_format=st.sampled_from(["auto", "text", "messages"]))
def test_what_is_exported_reads_back_as_the_same_pairs_in_order(rows, prompt_format):
    """Also plain text with turns, that was asked to stay text; a step holds one kind."""
    made = [pair for row in rows for pair in read_row(row, prompt_format)[1] if not isinstance(pair, str)]
    frame = pl.DataFrame([{**pair, "source": "s"} for pair in made], PAIRS).unique("pair_id", maintain_order=True)
    for _, of_kind in frame.group_by("format", maintain_order=True):
        steps = [list(range(of_kind.height))[::-1]]
        with tempfile.TemporaryDirectory() as folder:
            export_steps(of_kind, cut(of_kind, steps), MODEL, folder, ExportConfig(to=["datasets"]))
            for name in ("step_1.parquet", "step_1"):
                again = read_pairs(f"{folder}/steps/{name}")
                both = pl.concat([of_kind, again])
                same_two = [pl.min_horizontal("chosen", "rejected"), pl.max_horizontal("chosen", "rejected")]
                both = both.filter(pl.col("chosen").n_unique().over("prompt_id", *same_two) == 1)  # contradictions
                kept = of_kind.filter(pl.col("pair_id").is_in(both["pair_id"].implode()))
                assert again["pair_id"].to_list() == kept["pair_id"].to_list()[::-1]


def test_what_cannot_be_exported(pairs, partition, tmp_path):
    with pytest.raises(SdpoError, match=r"1 pair\(s\) of step 2 are not in pairs, e.g. '.*'. Make the partition anew"):
        export_steps(pairs[1:], partition, MODEL, tmp_path / "out")
    with pytest.raises(SdpoError, match="There is no step to export"):
        export_steps(pairs, partition[:0], MODEL, tmp_path / "out")
    mixed = pairs.with_columns(
        format=pl.when(pl.col("pair_id") == pairs["pair_id"][1]).then(pl.lit("text")).otherwise("format")
    )
    with pytest.raises(SdpoError, match="Step 1 holds 1 pairs of plain text and 3 of messages; trainers read one kind"):
        export_steps(mixed, partition, MODEL, tmp_path / "out")
    with pytest.raises(SdpoError, match=r"the 4 pairs of step 1 fill no batch of train.batch_pairs 32"):
        export_steps(pairs, partition, MODEL, tmp_path / "out", ExportConfig(to=["openrlhf"]))
    odd = TrainerSettings(batch_pairs=3)
    with pytest.raises(SdpoError, match=r"train.batch_pairs 3 is not a multiple of export.device_pairs 2"):
        export_steps(pairs, partition, MODEL, tmp_path / "out", training=odd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "prompt, chosen, message",
    [
        ("text", "answer", "plain text gets no EOS there"),
        ([("user", "a"), ("user", "b")], [("assistant", "c")], "its prompt does not alternate"),
        ([("user", "a"), ("assistant", "b")], [("assistant", "c")], "its prompt does not alternate"),
        (
            [("user", "a")],
            [("assistant", "b"), ("user", "c"), ("assistant", "d")],
            "an answer is more than one message",
        ),
    ],
)
def test_pairs_that_llama_factory_would_drop(tmp_path, prompt, chosen, message):
    def side(content: object) -> object:
        return content if isinstance(content, str) else [{"role": role, "content": text} for role, text in content]

    row = {
        "prompt": side(prompt),
        "chosen": side(chosen),
        "rejected": side("r" if chosen == "answer" else [("assistant", "r")]),
    }
    rows = [pair for pair in read_row(row)[1] if isinstance(pair, dict)]
    pairs = pl.DataFrame([{**rows[0], "source": "s"}], PAIRS)
    with pytest.raises(SdpoError, match=f"export.to llama_factory: 1 of 1 pairs of step 1 cannot go there.*{message}"):
        export_steps(pairs, cut(pairs, [[0]]), MODEL, tmp_path, ExportConfig(to=["llama_factory"]))


# --- the chain


def model_and_reference(folder: Path, name: str, step: int) -> tuple[str, str | None]:
    """What a step's config starts from, and the reference it names; None where the trainer takes the start."""
    if name == "openrlhf":
        words = (folder / f"openrlhf/step_{step}.sh").read_text().replace("'", "").split()
        return tuple(words[words.index(f"--{role}.model_name_or_path") + 1] for role in ("model", "ref"))
    config = yaml.safe_load((folder / f"{name}/step_{step}.yaml").read_text())
    return config["base_model" if name == "axolotl" else "model_name_or_path"], config.get("ref_model")


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("training", [SMALL, LORA], ids=["full", "lora"])
def test_each_step_starts_from_and_refers_to_what_the_step_before_wrote(export, name, training):
    folder = export(training=training)
    for step, before in ((1, MODEL), (2, f"models/{name}/step_1")):
        start, reference = model_and_reference(folder, name, step)
        assert start == before
        assert reference in (None, before)
    said = (folder / f"{name}/run.sh").read_text()
    merged_into = f"models/{name}/step_1"
    assert said.index("step_1") < said.index("step_2")
    if training.lora_rank:  # the whole model, and not its adapter, is what the next step gets
        merge = {"llama_factory": "export llama_factory/merge_1.yaml"}.get(name, f"{merged_into}_adapter")
        assert merge in said
    assert (folder / "README.md").read_text().count("\n## ") == len(TRAINERS)


def test_every_script_is_a_program(export):
    import ast
    import subprocess

    folder = export(training=LORA)
    for script in folder.rglob("*.py"):
        ast.parse(script.read_text())
    for script in folder.rglob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)


def test_numbers_stay_numbers_for_every_reader_of_yaml():
    """PyYAML reads YAML 1.1, where 5e-07 is a word."""
    options = {"a": 5e-07, "b": 1e22, "c": 0.1, "d": True, "e": ["x: #"], "f": "no", "g": 3, "h": 2.5e-05}
    assert yaml.safe_load(write_yaml([(key, value, "why") for key, value in options.items()])) == options


def test_the_settings_are_those_of_the_train_section():
    from sdpo_train import TrainConfig

    assert issubclass(TrainConfig, TrainerSettings)


def test_a_list_gives_each_step_its_own_value(export, pairs):
    """And `left out` counts by the step's own batch: 4 pairs in batches of 3 leave 1, in batches of 4 none."""
    lists = TrainerSettings(batch_pairs=[3, 4], learning_rate=[1e-6, 2e-6], lora_rank=4, lora_alpha=6)
    folder = export(training=lists)
    configs = [yaml.safe_load((folder / f"trl/step_{step}.yaml").read_text()) for step in (1, 2)]
    assert [(one["learning_rate"], one["gradient_accumulation_steps"]) for one in configs] == [(1e-6, 3), (2e-6, 4)]
    assert {one["lora_alpha"] for one in configs} == {6}
    assert "| 1 | 4 | 1 |\n| 2 | 4 | 0 |" in (folder / "README.md").read_text()
    with pytest.raises(SdpoError, match=r"train.beta has 3 values, but the partition has 2 step\(s\)"):
        export(training=TrainerSettings(batch_pairs=2, beta=[0.1, 0.2, 0.3]))


# --- the command


@pytest.fixture
def run(tmp_path, pairs, partition) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    pairs.write_parquet(run / "pairs.parquet")
    partition.write_parquet(run / "partition.parquet")
    (run / "config.yaml").write_text("model: org/model\ntrain: {beta: 0.01, arms: [dpo], batch_pairs: 4}\n")
    return run


def test_the_command_takes_the_settings_of_the_run(run, run_command):
    code, out, err = run_command("sdpo_data.export", run, "--to", "trl", "openrlhf")
    assert (code, err) == (0, "")
    assert "left out by openrlhf" in out
    config = yaml.safe_load((run / "export/trl/step_2.yaml").read_text())
    assert (config["beta"], config["gradient_accumulation_steps"]) == (0.01, 2)
    assert "export" in Run(run).lineage
    assert run_command("sdpo_data.export", run)[1] == f"up to date: {run / 'export'}\n"


def test_what_the_configs_cannot_say_is_said(run, run_command):
    (run / "config.yaml").write_text(
        "model: org/model\ntrain: {loss: [ipo], trl: {weight_decay: 0.1}, seeds: [0, 1]}\n"
    )
    code, out, _ = run_command("sdpo_data.export", run)
    assert code == 0
    assert "not handed on: train.loss: ['ipo']\nnot handed on: train.trl: {'weight_decay': 0.1}\n" in out
    assert "seeds" not in out
    assert "to be set by hand where the trainer has it: train.loss: ['ipo']" in (run / "export/README.md").read_text()


def test_what_a_trainer_wrote_outlives_a_new_export(run, run_command):
    run_command("sdpo_data.export", run)
    model = run / "export/models/trl/step_1/model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_text("weights")
    code, _, err = run_command("sdpo_data.export", run, "--to", "datasets")
    assert (code, "made with to = ['trl', 'datasets'], now it is ['datasets']" in err) == (2, True)
    assert run_command("sdpo_data.export", run, "--to", "datasets", "--force")[0] == 0
    assert model.read_text() == "weights"


@pytest.mark.parametrize(
    "flags, train, message",
    [
        (["--to", "verl"], "{}", "invalid choice 'verl' for argument '--to'"),
        ([], "{beta: much}", "config.yaml: train.beta is 'much': Input should be a valid number."),
        ([], "{batch_pairs: 3}", "train.batch_pairs 3 is not a multiple of export.device_pairs 2."),
    ],
)
def test_bad_input(run, run_command, flags, train, message):
    (run / "config.yaml").write_text(f"model: org/model\ntrain: {train}\n")
    code, out, err = run_command("sdpo_data.export", run, *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert not (run / "export").exists()


def test_a_run_without_a_partition(tmp_path, run_command):
    code, _, err = run_command("sdpo_data.export", tmp_path / "run")
    assert code == 2
    assert "Make it with: python -m sdpo_data.partition" in err


# --- TRL itself


def trl_pieces(folder: Path, step: int) -> tuple:
    """Read a step's config as `trl dpo --config` does."""
    from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, TrlParser

    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig))
    args = ["--config", str(folder / f"trl/step_{step}.yaml"), "--bf16", "false", "--use_cpu", "true"]
    return parser.parse_args_and_config(args)


@pytest.mark.real
@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
def test_trl_trains_the_chain_in_our_order(pairs, partition, tiny_model, tmp_path, monkeypatch, lora_rank):
    """Two steps by TRL's own script: the tokens reached are ours, in our order; the reference is the step before."""
    import runpy
    import sys

    import torch
    import trl
    from trl.scripts.dpo import main as trl_dpo

    training = TrainerSettings(batch_pairs=2, lora_rank=lora_rank, learning_rate=1e-2, epochs=2)
    export_steps(pairs, partition, str(tiny_model), tmp_path, ExportConfig(to=["trl"]), training)
    monkeypatch.chdir(tmp_path)
    reached, losses = [], []
    original = trl.DPOTrainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        rows = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
        reached.append(rows[: len(rows) // 2])  # the chosen halves stand first
        loss = original(self, model, inputs, *args, **kwargs)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(trl.DPOTrainer, "training_step", spy)
    encoded = encode_pairs(pairs, load_tokenizer(tiny_model), 1024, "drop")
    ours = {row["pair_id"]: row["prompt_ids"] + row["chosen_ids"] for row in encoded.iter_rows(named=True)}
    for step in (1, 2):
        reached.clear()
        losses.clear()
        trl_dpo(*trl_pieces(tmp_path, step))
        wanted = [ours[pair_id] for pair_id in exported_ids(tmp_path, step)]
        assert [tokens for batch in reached for tokens in batch] == 2 * wanted  # two epochs
        assert losses[0] == pytest.approx(0.6931472, abs=1e-5)  # log 2: start and reference are one model
        assert losses[-1] < 0.69
        if lora_rank:
            monkeypatch.setattr(sys, "argv", ["merge.py", f"models/trl/step_{step}_adapter", f"models/trl/step_{step}"])
            runpy.run_path("trl/merge.py")
    from safetensors.torch import load_file

    before, one, two = (
        load_file(f"{folder}/model.safetensors") for folder in (tiny_model, "models/trl/step_1", "models/trl/step_2")
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert one[name].dtype == torch.float32
    assert not torch.equal(before[name], one[name])
    assert not torch.equal(one[name], two[name])
