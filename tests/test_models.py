import json
import math
import shutil
from pathlib import Path

import pytest

from sdpo_data.models import load_model, load_tokenizer, model_key, save_model
from sdpo_data.tables import SdpoError

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rewrite(folder: Path, change) -> Path:
    """Change the weights of a folder: change(name -> tensor)."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- loading


def test_a_model_loads_in_eval_mode_with_its_weights_and_tokenizer(tiny_model):
    import torch
    from safetensors.torch import load_file

    model, tokenizer = load_model(tiny_model)
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(model.state_dict()[LAYER].cpu(), load_file(tiny_model / "model.safetensors")[LAYER])
    assert tokenizer.eos_token == load_tokenizer(tiny_model).eos_token == "<|im_end|>"
    assert load_model(tiny_model, "bfloat16")[0].dtype == torch.bfloat16


def test_a_saved_model_is_the_same_model(tiny_model, tmp_path):
    import torch

    model, tokenizer = load_model(tiny_model)
    save_model(model, tokenizer, tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not list((tmp_path / "saved").glob("*.bin"))


def damage(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if what == "no weights":
        weights.unlink()
    elif what == "pickled weights only":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "half a file":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "not safetensors":
        weights.write_bytes(b"hello")
    elif what == "an empty file":
        weights.write_bytes(b"")
    elif what == "a weight is missing":
        rewrite(folder, lambda tensors: tensors.pop(LAYER))
    elif what == "a weight has another shape":
        rewrite(folder, lambda tensors: tensors.update({LAYER: tensors[LAYER][:3].clone()}))
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "broken config":
        (folder / "config.json").write_text("{")
    elif what == "unknown architecture":
        (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    elif what == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif what == "code of its own":
        own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
        (folder / "config.json").write_text(json.dumps(config | own))
        (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


@pytest.mark.parametrize(
    "what, message",
    [
        ("no weights", r"is a model folder without weights"),
        ("pickled weights only", r"without weights.* pytorch_model\.bin.* can run code"),
        ("half a file", r"cannot be loaded from .*: Error while deserializing header"),
        ("not safetensors", r"cannot be loaded from .*: Error while deserializing header"),
        ("an empty file", r"cannot be loaded from .*: Error while deserializing header"),
        ("a weight is missing", rf"lacks 1 of the weights of a LlamaForCausalLM, e\.g\. {LAYER}\. Is .* complete, and"),
        ("a weight has another shape", r"cannot be loaded from "),
        ("no config", r"holds weights but no config\.json\. Save the model with save_pretrained\."),
        ("broken config", r"cannot be loaded from .*not a valid JSON file"),
        ("unknown architecture", r"cannot be loaded from .*model type `nonesuch`"),
        ("no tokenizer", r"cannot be loaded from .*tokenizer"),
        ("code of its own", r"cannot be loaded from .*contains custom code"),
    ],
)
def test_a_folder_that_is_no_model_is_named(folder, what, message):
    damage(folder, what)
    with pytest.raises(SdpoError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("what", ["no weights", "not safetensors", "an empty file", "broken config"])
def test_a_folder_that_is_no_model_has_no_key(folder, what):
    damage(folder, what)
    with pytest.raises(SdpoError, match=str(folder)):
        model_key(folder)


def test_a_name_that_is_nothing_is_refused():
    with pytest.raises(
        SdpoError, match=r"'no/such/model' is not a folder that exists, not a hub id .* not an embedded"
    ):
        load_model("no/such/model")
    with pytest.raises(
        SdpoError, match=r"There is no embedded model 'embedded:smollm3'\. There is: embedded:smollm2-135m"
    ):
        model_key("embedded:smollm3")


class GivenUp(Exception):
    """Raised where from_pretrained would load."""


@pytest.mark.parametrize(
    "free, processes, device_map",
    # 1.1 x 4 bytes of each of the weights that are in the file is what fits
    [(1.0, "1", None), (0.999, "1", "auto"), (0.999, "2", None)],
    ids=["fits", "too large", "too large, but each process has its own"],
)
def test_what_is_larger_than_a_gpu_is_spread(free, processes, device_map, tiny_model, monkeypatch):
    import torch
    import transformers
    from safetensors.torch import load_file

    numbers = sum(tensor.numel() for tensor in load_file(tiny_model / "model.safetensors").values())
    asked = []

    def note(*_, device_map, **__):
        asked.append(device_map)
        raise GivenUp

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (math.ceil(free * 4.4 * numbers), 10**12))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", note)
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(GivenUp):
        load_model(tiny_model)
    assert asked == [device_map]


# --- keys


def test_a_folder_and_the_model_loaded_from_it_have_one_key(tiny_model):
    model, _ = load_model(tiny_model)
    assert model_key(tiny_model) == model_key(str(tiny_model)) == model_key(model)


def test_how_a_model_is_saved_does_not_change_its_key(tiny_model, tmp_path):
    model, tokenizer = load_model(tiny_model)
    key = model_key(tiny_model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert model_key(tmp_path / "sharded") == key
    model.config.pad_token_id = 3  # as a trainer does
    save_model(model, tokenizer, tmp_path / "other" / "place")
    assert model_key(tmp_path / "other" / "place") == model_key(model) == key


def test_a_tied_head_counts_once_whether_or_not_it_is_in_the_file(folder, tiny_model):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert model_key(folder) == model_key(tiny_model)


def change_one_bit(tensors: dict) -> None:
    import torch

    tensors[LAYER].view(torch.int32)[0, 0] ^= 1


def swap_two_tensors(tensors: dict) -> None:
    other = LAYER.replace("layers.1", "layers.0")
    tensors[LAYER], tensors[other] = tensors[other], tensors[LAYER]


def widen(tensors: dict) -> None:
    tensors[LAYER] = tensors[LAYER].double()


def add(tensors: dict) -> None:
    tensors["model.extra"] = tensors[LAYER][:1].clone() + 1


@pytest.mark.parametrize("change", [change_one_bit, swap_two_tensors, widen, add])
def test_other_weights_have_another_key(folder, tiny_model, change):
    assert model_key(rewrite(folder, change)) != model_key(tiny_model)


def test_norms_of_equal_content_are_not_taken_for_tied_weights(tiny_model, tmp_path):
    # with two norms of layer 0 at 2 and the other three at 1, or with one at 2: every content and the last
    # name that has it stay the same
    keys = []
    for names in (["input", "post_attention"], ["post_attention"]):
        folder = Path(shutil.copytree(tiny_model, tmp_path / f"norms_{len(names)}"))
        rewrite(
            folder,
            lambda tensors, names=names: [tensors[f"model.layers.0.{n}_layernorm.weight"].mul_(2) for n in names],
        )
        keys.append(model_key(folder))
    assert keys[0] != keys[1]


def test_another_config_has_another_key(folder, tiny_model):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert model_key(folder) != model_key(tiny_model)
    unimportant = {"use_cache": False, "_name_or_path": "x", "transformers_version": "0", "architectures": ["X"]}
    (folder / "config.json").write_text(json.dumps(config | unimportant))
    assert model_key(folder) == model_key(tiny_model)


def test_a_live_model_in_another_dtype_has_another_key(tiny_model):
    assert model_key(load_model(tiny_model, "bfloat16")[0]) != model_key(tiny_model)


def test_a_remembered_key_is_not_that_of_changed_weights(folder):
    before = model_key(folder)
    assert model_key(folder) == before  # from the memo
    assert model_key(rewrite(folder, change_one_bit)) != before
