"""One real step of DPO on a tiny model: what it hands on, and that every false hand-off is caught."""

import hashlib
import json
import math

import polars as pl
import pytest

from sdpo_data import PartitionConfig
from sdpo_data.encode import encode_pairs
from sdpo_data.models import load_model, model_key, save_model
from sdpo_data.partition import divide_pairs
from sdpo_data.run import Run
from sdpo_data.score import ScoreConfig, score_pairs
from sdpo_data.tables import LOGP_MARGIN, METRICS, SCORES, SdpoError, check
from sdpo_train.config import StepConfig, TrainConfig
from sdpo_train.dpo import train_step
from sdpo_train.handoff import BF16_GAP
from sdpo_train.steps import run_sdpo
from sdpo_train.work import StepWork

FAST = StepConfig(learning_rate=1e-3, batch_pairs=4, warmup=0.0)


@pytest.fixture
def work(pairs, tiny_model, tmp_path):
    """Build the work of a first step, with any field replaced."""

    def build(**changes):
        key = model_key(tiny_model)
        fields = {"arm": "sdpo", "seed": 0, "step": 1, "pairs": pairs, "scores": None, "out": tmp_path / "step_1"}
        fields |= dict.fromkeys(("start", "reference"), str(tiny_model))
        fields |= dict.fromkeys(("start_key", "reference_key"), key)
        return StepWork(**fields | changes)

    return build


@pytest.fixture
def other_model(tiny_model, tmp_path):
    """The tiny model, moved a little: what a stale or wrong reference would be."""
    model, tokenizer = load_model(tiny_model)
    model.model.layers[0].mlp.down_proj.weight.data += 0.02
    save_model(model, tokenizer, tmp_path / "other")
    return str(tmp_path / "other")


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.real)], ids=["full", "lora"])
def test_a_step_moves_the_model_and_hands_on_float32_weights(work, tiny_model, rank):
    row = train_step(work(), FAST.model_copy(update={"lora_rank": rank}))
    model, _ = load_model(row["model"])  # plain transformers, no adapters left
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    assert row["model_key"] == model_key(row["model"]) == model_key(model) != row["start_key"]
    assert row["updates"] == 2
    assert row["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert row["last_loss"] < row["first_loss"]
    assert row["max_start_gap"] < 1e-3


@pytest.mark.real
def test_a_step_leaves_its_reference_scores_and_metrics(work, pairs):
    row = train_step(work(), FAST)
    folder = work().out
    reference = check(pl.read_parquet(folder / "reference_scores.parquet"), SCORES, "reference_scores")
    assert reference["pair_id"].to_list() == pairs["pair_id"].to_list()
    assert reference["model_key"].unique().to_list() == [row["reference_key"]]
    margins = reference["chosen_logp"] - reference["rejected_logp"]
    assert row["margin_ref_mean"] == pytest.approx(margins.mean())
    tokens = reference.select(pl.sum_horizontal("prompt_tokens", "chosen_tokens", "rejected_tokens").sum()).item()
    assert row["tokens"] == tokens
    metrics = check(pl.read_parquet(folder / "metrics.parquet"), METRICS, "metrics")
    assert metrics.filter(pl.col("name") == "loss")["update"].to_list() == [1, 2]


@pytest.mark.real
def test_scores_of_the_reference_are_used_and_others_are_not(work, pairs, tiny_model, other_model):
    right = score_pairs(pairs, tiny_model)
    with_scores = train_step(work(scores=right), FAST)
    without = train_step(work(), FAST)
    with_others = train_step(work(scores=score_pairs(pairs, other_model)), FAST)  # their key says: not of S
    assert with_scores["model_key"] == without["model_key"] == with_others["model_key"]


@pytest.mark.real
def test_order_is_kept(work, pairs):
    forward = train_step(work(), FAST)
    backward = train_step(work(pairs=pairs.reverse()), FAST)
    assert forward["model_key"] != backward["model_key"]


@pytest.mark.real
def test_the_same_work_gives_the_same_bits(work):
    assert train_step(work(), FAST)["model_key"] == train_step(work(), FAST)["model_key"]


@pytest.mark.real
def test_a_reference_that_is_not_the_start_is_allowed_where_the_arm_says_so(work, other_model):
    row = train_step(work(reference=other_model, reference_key=model_key(other_model)), FAST)
    assert row["max_start_gap"] is None
    assert abs(row["first_loss"] - math.log(2)) > 1e-4


def test_a_start_with_other_weights_than_declared_is_caught(work, other_model):
    with pytest.raises(SdpoError, match=r"its start .* has weights .* but the arm declares"):
        train_step(work(start=other_model), FAST)


def test_trl_hashes_no_weights(work, monkeypatch):
    from trl.trainer import dpo_trainer

    def hash_module(_):
        raise AssertionError("a pass over all weights for a cache that is not used")

    monkeypatch.setattr(dpo_trainer, "hash_module", hash_module)
    train_step(work(), FAST)
    assert dpo_trainer.hash_module is hash_module  # and TRL has its own back


def test_stale_reference_scores_are_caught_in_nats(work, pairs, other_model, tiny_model):
    """FIELD.md, fact 5: scores of other weights under the right name. Only the log-probabilities tell."""
    stale = score_pairs(pairs, other_model).with_columns(model_key=pl.lit(model_key(tiny_model)))
    with pytest.raises(SdpoError, match=r"6 pair\(s\) of sdpo step 1 have other scores .* under other weights"):
        train_step(work(scores=stale), FAST)
    assert not work().out.exists()


def test_a_score_store_that_holds_other_numbers_is_caught_before_the_first_update(work, pairs, tiny_model, tmp_path):
    """Those of answers moved by a hundredth of a nat, in a shard that is sound: the policy itself does not say so."""
    store = tmp_path / "store"
    score_pairs(pairs, tiny_model, ScoreConfig(store=str(store)))
    for shard in list(store.glob("*/*.parquet")):
        moved = pl.read_parquet(shard).with_columns(pl.col("logp") + 0.01)
        shard.unlink()
        moved.write_parquet(shard)
        shard.rename(shard.with_stem(hashlib.sha256(shard.read_bytes()).hexdigest()[:32]))
    with pytest.raises(SdpoError, match=r"before the first update .* differs from the reference's by 0.01"):
        train_step(work(store=str(store)), FAST)


def test_scores_of_other_tokens_of_the_same_number_are_caught(work, pairs, tiny_model):
    """Two words of one answer changed places after it was scored: as many tokens, other log-probabilities."""
    model, tokenizer = load_model(tiny_model)
    scores = score_pairs(pairs, (model, tokenizer))
    [message] = json.loads(pairs["chosen"][0])
    *words, one, two = message["content"].split(" ")
    turned = json.dumps([message | {"content": " ".join([*words, two, one])}])
    changed = pairs.with_columns(chosen=pl.Series([turned, *pairs["chosen"][1:]]))
    before, after = (encode_pairs(frame, tokenizer, 1024, "cut")["chosen_ids"][0] for frame in (pairs, changed))
    assert len(before) == len(after)
    assert before.to_list() != after.to_list()
    with pytest.raises(SdpoError, match=r"1 pair\(s\) of sdpo step 1 have other scores than the reference"):
        train_step(work(pairs=changed, scores=scores), FAST)


@pytest.mark.parametrize("dtype, scored", [("float32", "float32"), ("bfloat16", "bfloat16_autocast")])
def test_reference_scores_at_hand_cost_no_forward_pass(work, pairs, tiny_model, dtype, scored, monkeypatch):
    scores = score_pairs(pairs, tiny_model, ScoreConfig(dtype=scored))
    assert scores["dtype"].unique().to_list() == [scored]
    monkeypatch.setattr("sdpo_data.scorer.score_bin", None)
    train_step(work(scores=scores), FAST.model_copy(update={"dtype": dtype, "diagnose": False, "kl_samples": 0}))


def test_scores_whose_store_is_gone_are_computed_again_and_that_is_said(work, pairs, tiny_model, tmp_path, caplog):
    config = FAST.model_copy(update={"diagnose": False, "kl_samples": 0})
    stored, gone = work(scores=score_pairs(pairs, tiny_model)), str(tmp_path / "another store")
    kept = train_step(stored, config)["model_key"]
    with caplog.at_level("INFO", "sdpo_train"):
        assert train_step(work(scores=stored.scores, store=gone), config)["model_key"] == kept
    assert "16 answers of the reference were not in the score store" in caplog.text
    assert "another store" in caplog.text


def test_scores_are_held_against_the_store_where_some_pairs_have_none(work, pairs, tiny_model):
    """A pair without a score hides no other's: of the 7 that are left one is a nat off."""
    first = pl.col("pair_id") == pairs["pair_id"][1]
    scores = score_pairs(pairs, tiny_model)[1:].with_columns(chosen_logp=pl.col("chosen_logp") - first.cast(pl.Float64))
    with pytest.raises(SdpoError, match=r"1 pair\(s\) of sdpo step 1 have other scores .* by 1 nats"):
        train_step(work(scores=scores), FAST)


def test_in_bfloat16_a_short_answer_has_the_noise_of_a_short_one(work, pairs, tiny_model):
    """An answer of n tokens may move by 0.15 sqrt(n) nats; here it does by that of twice as many."""
    half = FAST.model_copy(update={"dtype": "bfloat16"})
    scores = score_pairs(pairs, tiny_model, ScoreConfig(dtype="bfloat16_autocast"))
    short, longest = scores.sort("rejected_tokens").row(0, named=True), scores["chosen_tokens"].max()
    assert 2 * short["rejected_tokens"] < longest  # the noise of the longest would hide it
    moved = BF16_GAP * (2 * short["rejected_tokens"]) ** 0.5
    edited = pl.col("rejected_logp") + moved * (pl.col("pair_id") == short["pair_id"]).cast(pl.Float64)
    with pytest.raises(SdpoError, match=r"1 pair\(s\) of sdpo step 1 have other scores"):
        train_step(work(scores=scores.with_columns(rejected_logp=edited)), half)


def test_a_model_in_bfloat16_is_not_scored_as_if_its_weights_were_float32(pairs, tiny_model):
    with pytest.raises(SdpoError, match="needs a model in float32, and this one is in bfloat16: load it in float32"):
        score_pairs(pairs, load_model(tiny_model, "bfloat16"), ScoreConfig(dtype="bfloat16_autocast"))


def test_scores_of_cut_answers_are_caught(work, pairs, tiny_model):
    scores = score_pairs(pairs, tiny_model).with_columns(chosen_tokens=pl.col("chosen_tokens") - 1)
    with pytest.raises(SdpoError, match=r"8 pair\(s\) .* were scored on other tokens .* Set train.max_length"):
        train_step(work(scores=scores), FAST)


@pytest.mark.real
def test_a_loss_that_is_not_finite_stops_the_step(work):
    with pytest.raises(SdpoError, match=r"the loss is nan at update \d+. Lower train.learning_rate"):
        train_step(work(), FAST.model_copy(update={"learning_rate": 1e38, "epochs": 2}))
    assert not work().out.exists()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_saved_model_has_the_config_it_started_with(work, tiny_model, lora_rank):
    """Training turns the cache off; a model saved so would write its answers without one."""
    train_step(work(), FAST.model_copy(update={"lora_rank": lora_rank}))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tiny_model, work().out))
    told = ("transformers_version", "dtype")
    assert {k: v for k, v in after.items() if k not in told} == {k: v for k, v in before.items() if k not in told}


@pytest.fixture
def held_apart(pairs, tiny_model, tmp_path):
    """A run, SCORES, and pairs in two parts that each hold one prompt of four out."""
    run = Run(tmp_path / "run")
    run.path.mkdir()
    scores = score_pairs(pairs, tiny_model)
    divided = divide_pairs(scores, PartitionConfig(parts=2, hold_out=0.3))
    assert sorted(divided.held_out["step"]) == [1, 2]
    divided.held_out.write_parquet(run.path / "held_out_parts.parquet")
    return run, scores, divided


@pytest.mark.real
def test_forgetting_is_told_of_the_pairs_that_each_part_holds_out(pairs, tiny_model, held_apart):
    """Of step 2, on the pair held out of part 1: margin under M_2 less that under M_1, nats."""
    run, scores, divided = held_apart
    config = TrainConfig(learning_rate=1e-3, batch_pairs=2, kl_samples=0)
    steps = run_sdpo(pairs, divided.partition, tiny_model, run.path, scores=scores, config=config)
    told = dict(run.metrics.filter(step=2).select("name", "value").rows())
    held = pairs.filter(pl.col("pair_id").is_in(divided.held_out.filter(step=1)["pair_id"].to_list()))
    before, after = (score_pairs(held, model).select(LOGP_MARGIN).item() for model in steps["model"])
    assert told["forgetting/part_1/margin_change"] == pytest.approx(after - before, abs=1e-4)
    assert told["forgetting/part_1/pairs"] == 1
    assert told["held_out/pairs"] == 2
    assert not [name for name in told if name.startswith("forgetting/part_2")]
    assert not run.metrics.filter(pl.col("name").str.starts_with("forgetting"), step=1).height


@pytest.mark.real
def test_forgetting_is_told_of_every_arm_that_has_parts(pairs, tiny_model, held_apart):
    """Of hard_to_easy the held-out pair of the harder part is the earlier one; of random steps none is."""
    run, scores, divided = held_apart
    config = TrainConfig(
        arms=["hard_to_easy", "length_only", "cumulative", "random"], learning_rate=1e-3, batch_pairs=2, kl_samples=0
    )
    steps = run_sdpo(pairs, divided.partition, tiny_model, run.path, scores=scores, config=config)
    told = run.metrics.filter(pl.col("name") == "forgetting/part_1/margin_change")
    assert set(told.select("arm", "step").rows()) <= {(arm, 2) for arm in config.arms[:3]}
    assert {"hard_to_easy", "cumulative"} <= set(told["arm"])
    for arm, part in (("hard_to_easy", 2), ("cumulative", 1)):
        held = pairs.filter(pl.col("pair_id").is_in(divided.held_out.filter(step=part)["pair_id"].to_list()))
        models = steps.filter(arm=arm)["model"]
        before, after = (score_pairs(held, model).select(LOGP_MARGIN).item() for model in models)
        assert told.filter(arm=arm)["value"].item() == pytest.approx(after - before, abs=1e-4)
