"""Estimates by hand, against torch's own count of a model, and advice that helps."""

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpo_data.models import load_model
from sdpo_data.tables import SdpoError
from sdpo_train import cost
from sdpo_train.cost import Shape, Unit, advise, estimate_duration, estimate_memory, read_shape

SHAPE = Shape(parameters=1000, matrices=((10, 20), (30, 10)), layers=2, hidden=8, inner=16)
UNIT = Unit(row_tokens=1, longest=5)


def test_the_shape_of_a_model_is_read_without_its_weights(tiny_model):
    shape = read_shape(tiny_model)
    model, _ = load_model(tiny_model)
    assert shape.parameters == sum(tensor.numel() for tensor in model.parameters())
    assert (shape.layers, shape.hidden, shape.inner) == (2, 32, 64)
    linear = [tuple(part.weight.shape) for name, part in model.named_modules() if name.endswith("_proj")]
    assert sorted(shape.matrices) == sorted(linear)


def test_a_tied_head_that_is_in_the_file_counts_once(tiny_model, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert read_shape(folder) == read_shape(tiny_model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert read_shape(folder).parameters == read_shape(tiny_model).parameters + weights["lm_head.weight"].size


@pytest.mark.parametrize("file, content", [("config.json", "{"), ("config.json", "{}"), ("model.safetensors", "no")])
def test_a_broken_model_is_refused(tiny_model, tmp_path, file, content):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / file).write_text(content)
    with pytest.raises(SdpoError, match=r"What model .* costs cannot be read"):
        read_shape(folder)


def test_memory_of_a_full_fine_tune_by_hand():
    got = estimate_memory(SHAPE, UNIT)
    assert (got.weights, got.gradients, got.optimizer, got.reference) == (4000, 4000, 8000, 4000)
    # a token of a layer: 10 vectors of 8 and 4 of 16 numbers, and a mask of the row's 5; 2 rows of 5, 2 layers
    assert got.activations - cost.TILE == 2 * 5 * 2 * 4 * (80 + 64 + 5)
    counted = 4000 + 4000 + 8000 + got.activations + cost.PROCESS["cpu"]
    assert (got.spare, got.total) == (round(cost.SPARE * counted), counted + round(cost.SPARE * counted))


def test_what_a_layer_keeps_is_what_torch_keeps():
    """The oracle: PyTorch's hooks see every tensor that is saved for the backward pass."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rows, length, found = 2, 64, []
    for layers in (2, 3):
        config = LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=2,
        )  # fmt: skip
        model, kept = LlamaForCausalLM(config).train(), {}
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def keep(tensor, kept=kept, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        mask = torch.ones(rows, length, dtype=torch.long)
        mask[1, 40:] = 0  # padding, else no mask is made
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(input_ids=torch.ones_like(mask), attention_mask=mask)
        found.append(sum(storage.nbytes() for storage in kept.values()))
    shape = Shape(parameters=0, matrices=(), layers=1, hidden=128, inner=256)
    expected = estimate_memory(shape, Unit(row_tokens=rows * length, longest=length)).activations - cost.TILE
    assert found[1] - found[0] == pytest.approx(expected, rel=0.01)


def test_memory_of_lora_by_hand():
    got = estimate_memory(SHAPE, replace(UNIT, lora_rank=2))
    adapters = 2 * (10 + 20 + 30 + 10)
    assert (got.weights, got.gradients, got.optimizer) == (4000 + 4 * adapters, 4 * adapters, 8 * adapters)
    assert got.spare / (got.total - got.spare) == pytest.approx(cost.SPARE_LORA)
    assert got.reference == 0  # the base with the adapters off is the reference


def test_memory_in_bfloat16_and_with_checkpointing_by_hand():
    half = estimate_memory(SHAPE, replace(UNIT, dtype="bfloat16"))
    assert half.cast == 2 * (200 + 300)
    assert (half.weights, half.optimizer) == (4000, 8000)  # masters stay float32
    assert half.activations - cost.TILE == 2 * 5 * 2 * (34 * 8 + 2 * 64 + 2 * 5)
    again = estimate_memory(SHAPE, replace(UNIT, gradient_checkpointing=True))
    assert again.activations - cost.TILE == 2 * 5 * (2 * 8 * 4 + 4 * (80 + 64 + 5))  # a row per layer, one layer whole


@pytest.mark.parametrize(
    "pairs, lora_rank, measured",
    [(1, 0, 3739), (2, 0, 5094), (2, 16, 4642)],
)
def test_the_estimate_holds_where_it_was_measured(pairs, lora_rank, measured):
    """Peak of the process in MiB, SmolLM2 in float32 on CPU, rows of 256 tokens: LOG.md, 2026-11-24."""
    matrices = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)) * 30
    smollm2 = Shape(134_515_008, matrices, 30, 576, 1536)
    got = estimate_memory(smollm2, Unit(512 * pairs, longest=256, lora_rank=lora_rank)).total / 2**20
    assert measured <= got <= 1.2 * measured


def test_saving_counts_where_it_is_the_peak():
    big = replace(SHAPE, parameters=10**9)
    got = estimate_memory(big, replace(UNIT, lora_rank=2))
    assert got.total == got.process + got.weights + got.optimizer + 4 * 10**9 + got.spare
    assert estimate_memory(big, replace(UNIT, lora_rank=2, device="cuda")).saving == 0


units = st.builds(
    Unit,
    row_tokens=st.integers(1, 2**15),
    longest=st.integers(2, 4096),
    lora_rank=st.sampled_from([0, 16]),
    gradient_checkpointing=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    device=st.sampled_from(["cpu", "cuda"]),
)
MODEL_7B = Shape(7_241_732_096, ((4096, 4096),) * 64 + ((14336, 4096),) * 96, 32, 4096, 14336)


@given(units, st.integers(0, 2**38))
def test_advice_helps_or_says_that_nothing_does(unit, available):
    needed = estimate_memory(MODEL_7B, unit).total
    said = advise(MODEL_7B, unit, available)
    assert (said is None) == (needed <= available)
    if said is None or "does not fit" in said or "Set " not in said:
        return
    changes = {
        f"token_budget: {2 * unit.longest} ": 2 * unit.longest,
        "gradient_checkpointing: true": True,
        "lora_rank: 16": 16,
    }
    changed = {name.split(":")[0]: value for name, value in changes.items() if f"train.{name}" in said}
    if "token_budget" in changed:
        changed["row_tokens"] = changed.pop("token_budget")
    if f"train.max_length: {unit.longest // 2} " in said:
        changed["longest"] = unit.longest // 2
    assert changed
    assert estimate_memory(MODEL_7B, replace(unit, **changed)).total <= available


def test_advice_names_the_cheapest_setting_first():
    unit = Unit(row_tokens=16384, longest=1024)
    one = estimate_memory(MODEL_7B, replace(unit, row_tokens=2048)).total
    said = advise(MODEL_7B, unit, one)
    assert said is not None
    assert said.endswith(f"Set train.token_budget: 2048 ({one / 2**30:,.1f} GiB).")
    said = advise(MODEL_7B, unit, one - 1)
    assert said is not None
    assert "Set train.token_budget: 2048 (" in said
    assert "then train.gradient_checkpointing: true" in said
    said = advise(MODEL_7B, unit, 2**30)
    assert said is not None
    assert said.endswith("it does not fit: take a smaller model, or a device with more memory.")


def test_time_by_hand():
    # 1,000 tokens were scored in 10 s: 100 a second. 500 tokens take 5 s forward
    got = estimate_duration(500, scored=(1000, 10.0))
    assert got is not None
    assert (got.low, got.high) == (5.0 * cost.TIMES_FORWARD, 5.0 * cost.AT_MOST)
    assert "100 tokens/s; too low if those scores came from the store" in got.basis
    # 200 of them once more, forward: 2 s
    got = estimate_duration(500, scored_again=200, scored=(1000, 10.0))
    assert got is not None
    assert (got.low, got.high) == (5.0 * cost.TIMES_FORWARD + 2.0, 5.0 * cost.AT_MOST + 2.0)
    # finished steps tell more: 50 a second, of a forward pass three times that: 150 take 1 s more
    got = estimate_duration(500, scored_again=150, trained=(100, 2.0))
    assert got is not None
    assert (got.low, got.high) == (0.75 * 11.0, 1.5 * 11.0)
    got = estimate_duration(500, scored=(1000, 10.0), trained=(100, 2.0))
    assert got is not None
    assert (got.low, got.high) == (7.5, 15.0)
    assert estimate_duration(500) is estimate_duration(500, scored=(0, 0.0)) is None


def test_tokens_and_the_longest_row_of_scores(scores):
    # prompts 7 to 11 are 45, chosen 4 4 2 12 1, rejected 2 3 3 5 4; the longest is 10 + 12
    assert (cost.count_tokens(scores), cost.longest_row(scores)) == (45 + 23 + 17, 22)


def test_a_unit_is_planned_as_a_row_that_json_can_hold(scores):
    unit = Unit(row_tokens=1, longest=512)
    row = cost.plan_unit(SHAPE, scores, unit, epochs=2, batch_pairs=2, available=2**40, scored=(850, 10.0))
    assert (row["pairs"], row["tokens"], row["updates"], row["longest"]) == (5, 170, 6, 22)
    assert row["memory"] == estimate_memory(SHAPE, replace(unit, longest=22)).total
    assert row["seconds"] == [2.0 * cost.TIMES_FORWARD, 2.0 * cost.AT_MOST]  # 170 tokens at 85 a second
    assert row["advice"] is None
    assert json.loads(json.dumps(row)) == row
    cut = cost.plan_unit(SHAPE, scores, replace(unit, longest=20), epochs=1, batch_pairs=2, available=1)
    assert (cut["longest"], cut["seconds"], cut["basis"]) == (20, None, None)
    assert "does not fit" in cut["advice"]


def test_this_machine_has_memory():
    assert cost.available_memory() > 2**27
