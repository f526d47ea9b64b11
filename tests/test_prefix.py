"""The prefix engine: every model gives in a tree what it gives alone, and what cannot is found out."""

import json
import math

import numpy as np
import pytest
import torch
import transformers

from sdpo_data import prefix, probe
from sdpo_data.prefix import plan_work, read_tree, row_tokens, score_bin, score_completions
from sdpo_data.probe import read_model
from sdpo_data.tables import SdpoError

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}  # fmt: skip
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, sliding_window=16, final_logit_softcapping=5.0),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=16),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=128, **IDS),
    "bloom": lambda: transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4),
    "mamba": lambda: transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4, **IDS),
}
LENGTHS = {"bloom": 0, "mamba": 0, "gemma2": 16, "mistral": 16}  # up to which trees are right; the others: as probed


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test measures its models anew, and leaves no trace of random ones."""
    monkeypatch.setattr(probe, "_readings", {})
    monkeypatch.setattr(probe, "cache_folder", lambda: tmp_path)
    return tmp_path


def build(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()


def alone(model, ids, start):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logps = logits.log_softmax(-1)
    expected = [logps[place - 1, ids[place]].item() for place in range(start, len(ids))]
    return expected, all(logits[place - 1].argmax() == ids[place] for place in range(start, len(ids)))


def scored(model, requests, budget=None):
    found = [None] * len(requests)
    for places, completions in score_completions(model, requests, budget):
        for place, completion in zip(places, completions, strict=True):
            assert found[place] is None  # scored once
            found[place] = completion
    return found


def some_requests():
    random = np.random.default_rng(1)
    stem = random.integers(0, 60, 10).tolist()
    requests = [(stem + random.integers(0, 60, n).tolist(), 10) for n in (1, 3, 6)]  # within the windows of 16
    lengths = ((2, 5), (40, 4), (20, 9))  # past them
    return requests + [(stem[:4] + random.integers(0, 60, n).tolist(), start) for n, start in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gives_what_a_plain_forward_gives(name):
    model = build(name)
    requests = some_requests()
    for budget in (1, 7, 24, 500):  # rows that cut sequences anywhere, with the cache under them; one row for all
        for request, completion in zip(requests, scored(model, requests, budget), strict=True):
            logps, greedy = alone(model, *request)
            assert completion.logps == pytest.approx(logps, abs=1e-5)
            assert completion.greedy == greedy
    reading = read_model(model, 44)
    assert reading.packed_length == LENGTHS.get(name, 44)


def test_a_window_is_found_without_the_config_naming_it(monkeypatch):
    """Halving from 44: 22 is past the window of 16, 11 is within."""
    monkeypatch.setattr(probe, "window_length", lambda _: 2**31)
    assert read_model(build("mistral"), 44).packed_length == 11


def test_nothing_is_read_in_a_tree_past_a_window_that_the_config_names():
    """In bfloat16 the probe alone would not see it: what random weights do past the window is below the tolerance."""
    mistral = build("mistral").to(torch.bfloat16)
    reading = read_model(mistral, 44)
    assert (reading.packed_length, reading.probed) == (16, 44)
    assert read_model(mistral, 60).probed == 44  # a deeper probe would tell nothing new


@pytest.mark.parametrize("config, window", [
    (transformers.Qwen2Config(**SIZES, sliding_window=16), 2**31),  # named, and not used
    (transformers.Qwen2Config(**SIZES, sliding_window=16, use_sliding_window=True, max_window_layers=1), 16),
    (transformers.Qwen2Config(**SIZES, sliding_window=16, use_sliding_window=True, max_window_layers=2), 2**31),
    (transformers.Gemma2Config(**SIZES, sliding_window=16, layer_types=["full_attention"] * 2), 2**31),
    (transformers.Llama4TextConfig(**SIZES, attention_chunk_size=32), 32),
])  # fmt: skip
def test_only_a_window_that_some_layer_uses_counts(config, window):
    model = type("Model", (), {"config": config})
    assert probe.window_length(model) == window


def test_other_weights_of_one_config_are_measured_by_themselves(monkeypatch, own_cache):
    """Weights a thousandth of the usual ones hide a window of 16 that is not named; the usual ones show it."""
    monkeypatch.setattr(probe, "window_length", lambda _: 2**31)
    flat, usual = build("mistral"), build("mistral")
    for weight in flat.parameters():
        weight.data *= 1e-3
    assert read_model(flat, 44).packed_length == 44
    assert read_model(usual, 44).packed_length == 11
    assert len(list((own_cache / "readings").iterdir())) == 2
    monkeypatch.setattr(probe, "_readings", {})
    monkeypatch.setattr(probe, "_probe", None)  # from here on a probe would fail
    assert [read_model(model, 44).packed_length for model in (flat, usual)] == [44, 11]


def test_rounding_is_no_reason_against_a_tree_and_a_wrong_tree_is_not_rounding(monkeypatch, own_cache):
    """With next to no tolerance, what a plain forward in two pieces rounds away still lets the right tree through."""
    monkeypatch.setitem(probe.TOLERANCE, "float32", 1.5e-7)
    assert read_model(build("llama"), 200).packed_length == 200
    monkeypatch.setattr(probe, "window_length", lambda _: 2**31)  # a window of 16 that a tree's mask does not know
    monkeypatch.setattr(probe, "_readings", {})
    assert read_model(build("mistral"), 44).packed_length <= 16


@pytest.mark.parametrize("rope", [
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
     "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
], ids=lambda rope: rope["rope_type"])  # fmt: skip
def test_positions_that_depend_on_the_length_are_not_taken_for_rounding(rope, own_cache, monkeypatch):
    """A plain forward in two pieces is as wrong there as a tree: it must not excuse it."""
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 32 if rope["rope_type"] == "dynamic" else 128}
    config = transformers.LlamaConfig(**sizes, **IDS, rope_parameters=rope, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config).eval()
    assert probe.window_length(model) == 32
    random = np.random.default_rng(2)
    requests = [(random.integers(0, 60, length).tolist(), 2) for length in (20, 40, 41, 58)]
    for request, completion in zip(requests, scored(model, requests, 500), strict=True):
        if rope["rope_type"] == "longrope":  # dynamic positions depend on what was read before, in transformers too
            assert completion.logps == pytest.approx(alone(model, *request)[0], abs=1e-4)
    assert read_model(model, 60).packed_length == 32
    monkeypatch.setattr(probe, "window_length", lambda _: 2**31)  # were it not named in the config
    monkeypatch.setattr(probe, "_readings", {})
    assert probe._probe(model, 60).packed_length == 30


@pytest.mark.parametrize("every, gap, right", [(150, 5e-3, True), (150, 5e-2, False), (20, 1e-3, False)])
def test_few_tokens_may_round_far_and_many_may_not(every, gap, right, monkeypatch, own_cache):
    """Of 199 tokens two may be off by more than 1e-4 nats, up to 1e-2; ten may not."""

    def off(*given, **named):
        for places, logps, likeliest, tokens in tree_pass(*given, **named):
            yield places, logps + gap * torch.from_numpy((places + 1) % every == 0), likeliest, tokens

    tree_pass = probe.tree_pass
    monkeypatch.setattr(probe, "tree_pass", off)
    monkeypatch.setattr(probe, "PROBE", 12)  # its 11 tokens hold none of these
    assert (read_model(build("llama"), 200).packed_length == 200) is right


def test_a_model_saved_after_training_is_read_as_the_one_before(own_cache):
    """Its config says other things that are no numbers: where it came from, whether it caches."""
    one, two = build("llama"), build("llama")
    two.load_state_dict(one.state_dict())
    two.config.use_cache, two.config._name_or_path = False, "elsewhere"
    assert probe._identity(one) == probe._identity(two)


def test_a_deeper_request_is_probed_deeper_and_a_known_depth_is_not(own_cache, monkeypatch):
    model = build("llama")
    assert read_model(model, 30).probed == 30
    assert read_model(model, 44).probed == 44
    monkeypatch.setattr(probe, "_probe", None)  # from here on a probe would fail
    assert read_model(model, 20).probed == 44
    monkeypatch.setattr(probe, "_readings", {})
    assert read_model(build("llama"), 40).probed == 44  # remembered on disk
    [memo] = (own_cache / "readings").iterdir()
    assert json.loads(memo.read_text()) == {
        "packed_length": 44, "probed": 44, "split_head": True, "flex": False,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "takes"), [("llama", True), ("qwen3", True), ("gemma2", True), ("gpt2", False)])
def test_flex_attention_gives_the_same(name, takes, monkeypatch):
    """Its kernel uncompiled, which any CPU can run. transformers' GPT-2 takes no block mask: the probe sees it."""
    monkeypatch.setattr(probe, "FLEX", ("cpu",))
    monkeypatch.setattr("sdpo_data.flex._compiled", lambda: torch.nn.attention.flex_attention.flex_attention)
    model, requests = build(name), some_requests()[:3]
    before = model.config._attn_implementation
    for budget in (7, 500):
        for request, completion in zip(requests, scored(model, requests, budget), strict=True):
            assert completion.logps == pytest.approx(alone(model, *request)[0], abs=1e-5)
    assert read_model(model).flex == takes
    assert model.config._attn_implementation == before


def test_greedy_is_seen():
    model = build("llama")
    ids = [5, 6, 7]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 60]
    assert [completion.greedy for completion in scored(model, [(ids, 3), (other, 3)])] == [True, False]


def test_a_bin_gives_the_same_bits_whatever_came_with_it_and_in_which_order():
    model = build("llama")
    random = np.random.default_rng(2)
    requests = [(random.integers(0, 3, 12).tolist(), 4) for _ in range(20)]
    forward = scored(model, requests, 8)
    backward = scored(model, requests[::-1], 8)[::-1]
    for one, other in zip(forward, backward, strict=True):
        assert one.logps.tobytes() == other.logps.tobytes()
    bin_ = plan_work(model, requests, 8)[-1]
    again = score_bin(model, [requests[place] for place in bin_.sequences], row_tokens(model, 8))  # by itself
    assert [c.logps.tobytes() for c in again] == [forward[place].logps.tobytes() for place in bin_.sequences]


def test_the_head_never_sees_more_than_its_share(monkeypatch):
    """Blocks of 3 rows of 60 float32 logits: 720 bytes."""
    model, seen = build("gemma2"), []
    requests = [(list(range(12)), 2), ([*range(8), 1, 2, 3], 5)]
    expected = [completion.logps for completion in scored(model, requests)]
    monkeypatch.setattr("sdpo_data.head.HEAD_BYTES", {"cpu": 720, "cuda": 720})
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
    got = [completion.logps for completion in scored(model, requests)]
    assert max(seen) == 3
    assert [part.tolist() for part in got] == [pytest.approx(part.tolist(), abs=1e-6) for part in expected]


def test_logits_keep_to_their_share_where_the_head_cannot_be_run_by_itself(monkeypatch):
    """25 rows of 60 float32 logits are 6,000 bytes: of five sequences padded to 12 tokens, two, two and one."""
    model, seen = build("llama"), []
    monkeypatch.setattr(prefix, "read_model", lambda *_: probe.Reading(0, 100, split_head=False))
    monkeypatch.setattr("sdpo_data.head.HEAD_BYTES", {"cpu": 6000, "cuda": 6000})
    requests = [(list(range(place, place + length)), 3) for place, length in enumerate((12, 11, 8, 7, 5))]
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(tuple(logits.shape[:2])))
    computed = []
    got = score_bin(model, requests, 500, computed.append, packed=False)
    hook.remove()
    assert seen == [(2, 12), (2, 12), (1, 12)]
    assert sum(computed) == 60  # what a plan of one batch says
    for request, completion in zip(requests, got, strict=True):
        assert completion.logps == pytest.approx(alone(model, *request)[0], abs=1e-5)
    seen.clear()
    monkeypatch.setattr("sdpo_data.head.HEAD_BYTES", {"cpu": 6, "cuda": 6})
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(tuple(logits.shape[:2])))
    score_bin(model, requests, 500, packed=False)
    assert seen == [(1, 12)] * 5  # at least one


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma2"])
def test_gradients_are_those_of_plain_forwards(name, monkeypatch):
    """In float64: one answer's sum minus twice the other's, in one tree and in two plain forwards."""
    monkeypatch.setattr("sdpo_data.head.HEAD_BYTES", {"cpu": 720, "cuda": 720})
    model = build(name).double()
    requests = [([1, 2, 3, 4, 5, 6], 3), ([1, 2, 3, 7, 8], 3)]
    logps, _ = read_tree(model, requests)
    chosen, rejected = logps.split([3, 2])
    (chosen.sum() - 2 * rejected.sum()).backward()
    tree = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    for (ids, start), factor in zip(requests, (1, -2), strict=True):
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        (factor * sum(logps[place - 1, ids[place]] for place in range(start, len(ids)))).backward()
    tolerance = {"gpt2": 1e-8}.get(name, 1e-6)  # rotary angles are float32 in the others
    for weight_name, weight in model.named_parameters():
        assert (weight.grad - tree[weight_name]).abs().max() < tolerance, weight_name


def test_bfloat16_is_as_near_in_a_tree_as_alone():
    model = build("llama").to(torch.bfloat16)
    requests = some_requests()
    assert read_model(model, 44).packed_length == 44
    for request, completion in zip(requests, scored(model, requests, 24), strict=True):
        assert completion.logps == pytest.approx(alone(model, *request)[0], abs=0.05)


def test_a_model_whose_layers_lie_elsewhere_is_read_all_the_same(tmp_path):
    """accelerate's hooks, as with a device_map: a layer on disk is brought in when it is its turn."""
    model, requests = build("llama"), some_requests()
    expected = [completion.logps.tolist() for completion in scored(model, requests, 24)]
    model.save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    spread = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    got = [completion.logps.tolist() for completion in scored(spread, requests, 24)]
    assert got == [pytest.approx(part, abs=1e-6) for part in expected]


def test_a_sequence_without_a_completion_is_never_scored_zero():
    with pytest.raises(ValueError, match="Sequence 1 has no completion token"):
        scored(build("llama"), [([0, 1], 1), ([0, 1], 2)], 8)


def test_uniform_model_by_hand():
    """A head of zeros gives every token 1/60: three completion tokens are -3 ln 60."""
    model = build("gpt2")
    model.transformer.ln_f.weight.data.zero_()
    [completion] = scored(model, [([1, 2, 3, 4, 5], 2)], 10)
    assert completion.logps.sum() == pytest.approx(-3 * math.log(60), abs=1e-4)


def test_want_of_memory_is_not_remembered_as_a_model_that_knows_no_trees(monkeypatch, own_cache):
    model = build("llama")

    def full(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(probe, "tree_pass", full)
        with pytest.raises(SdpoError, match="Memory ran out in a probe of how LlamaForCausalLM can be read"):
            probe.read_model(model)
    assert list(own_cache.rglob("*.json")) == []
    assert probe.read_model(model).packed_length > 0
