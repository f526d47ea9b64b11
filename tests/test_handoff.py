"""Every known way to hand DPO a false reference, provoked on purpose, is caught and named."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from sdpo_data import read_pairs
from sdpo_data.models import load_model, model_key, save_model
from sdpo_data.score import score_pairs
from sdpo_data.tables import SCORES, SdpoError
from sdpo_train import dpo, trainer
from sdpo_train.config import Loss, StepConfig
from sdpo_train.dpo import train_step
from sdpo_train.handoff import check_losses, check_same_scores, check_same_tokens, check_start, zero_margin_loss
from sdpo_train.trainer import PairTrainer, check_trl_section
from sdpo_train.work import StepWork
from tests.conftest import QUESTIONS

FAST = StepConfig(learning_rate=1e-3, batch_pairs=4, warmup=0.0, diagnose=False, kl_samples=0)


@pytest.fixture
def second(pairs, tiny_model, tmp_path):
    """Build the work of a step 2: S was scored, M_1 has other weights."""
    model, tokenizer = load_model(tiny_model)
    model.model.layers[0].mlp.down_proj.weight.data += 0.02
    save_model(model, tokenizer, tmp_path / "step_1")
    start, key = str(tmp_path / "step_1"), model_key(tmp_path / "step_1")

    def build(**changes):
        fields = {"start": start, "start_key": key, "reference": start, "reference_key": key, "base": str(tiny_model)}
        fields |= {"arm": "sdpo", "seed": 0, "step": 2, "pairs": pairs, "out": tmp_path / "step_2"}
        return StepWork(**fields | {"scores": score_pairs(pairs, tiny_model)} | changes)

    return build


def test_fact_1_the_reference_loaded_again_by_its_name_is_s_once_more(second, monkeypatch):
    """TRL loads `config._name_or_path` again; so the log-probabilities are S's, under the name of M_1."""
    work = second()
    monkeypatch.setattr(dpo, "_reference_scores", lambda work, *_: work.scores)
    with pytest.raises(SdpoError, match=r"before the first update .* log-probabilities are S's, .* loaded again by"):
        train_step(work, FAST)
    assert not work.out.exists()


def test_fact_2_adapters_that_were_not_merged_leave_s(second, tiny_model, tmp_path):
    """A step 1 whose adapters stayed beside the base: the folder's weights are S's, not what the arm declares."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model(tiny_model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "unmerged/adapter")
    save_model(adapted.unload(), tokenizer, tmp_path / "unmerged")  # the base: merge_and_unload would have been right
    unmerged = {"start": str(tmp_path / "unmerged"), "reference": str(tmp_path / "unmerged")}
    with pytest.raises(SdpoError, match=r"its start .*unmerged has weights .* declares .* Those are S's weights"):
        train_step(second(**unmerged), FAST)


def test_weights_changed_since_are_told_from_s_once_more(second, tmp_path):
    work = second()
    model, tokenizer = load_model(work.start)
    model.model.norm.weight.data += 1
    save_model(model, tokenizer, tmp_path / "changed")
    with pytest.raises(SdpoError, match=r"its reference .*declares .* The folder was changed after it was trained; --"):
        train_step(second(reference=str(tmp_path / "changed")), FAST)


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_tokens_scored_are_counted_in_every_part(second, part):
    work = second()
    tokenizer = load_model(work.start)[1]
    encoded = dpo._encode(work.pairs, tokenizer, FAST)
    check_same_tokens(work, encoded, work.scores)
    first = pl.int_range(pl.len()) == 0
    longer = work.scores.with_columns(pl.col(f"{part}_tokens") + first.cast(pl.Int64))
    count = longer[f"{part}_tokens"][0]
    said = rf"^1 pair\(s\) of sdpo step 2 .*: {count} {part} tokens scored, {count - 1} now"
    with pytest.raises(SdpoError, match=said):
        check_same_tokens(work, encoded, longer)


def test_fact_3_columns_that_trl_does_not_take_are_missed(second, monkeypatch):
    arguments = trainer._arguments

    def without_precompute(*given):
        made = arguments(*given)
        made.precompute_ref_log_probs = False  # then TRL ignores the columns and loads a reference model
        return made

    monkeypatch.setattr(trainer, "_arguments", without_precompute)
    with pytest.raises(SdpoError, match="TRL did not take the reference log-probabilities that come with the pairs"):
        train_step(second(), FAST)


def test_fact_5_stale_values_under_the_right_name(second, pairs):
    work = second()
    stale = score_pairs(pairs, work.start).with_columns(chosen_logp=pl.col("chosen_logp") - 1.0)
    with pytest.raises(SdpoError, match=r"have other scores than the reference .* by 1 nats"):
        train_step(second(scores=stale), FAST)


def work_of(scores):
    return StepWork("sdpo", 0, 1, pl.DataFrame(), "s", "k", "s", "k", scores, pl.DataFrame())  # type: ignore[arg-type]


def scores_of(tokens, key="k"):
    none = (None,) * 5
    row = ("a", "q", "s", key, -10.0, -11.0, tokens, 2, 7, False, "float32", *none)
    return pl.DataFrame([row], SCORES, orient="row")


def test_noise_is_allowed_and_more_is_not():
    """Float32: 5e-3 nats. Bfloat16: 0.15 nats times the root of the longest completion, 100 tokens: 1.5."""
    scores = scores_of(100)
    assert check_start(work_of(scores), FAST, 0.0049, scores) == 0.0049
    half = FAST.model_copy(update={"dtype": "bfloat16"})
    assert check_start(work_of(scores), half, 1.49, scores) == 1.49
    for config, gap in ((FAST, 0.0051), (half, 1.51), (FAST, math.nan)):
        with pytest.raises(SdpoError, match="before the first update"):
            check_start(work_of(scores), config, gap, scores)


def test_no_gap_is_told_where_the_start_is_not_the_reference():
    other = StepWork("target_from_s", 0, 2, pl.DataFrame(), "s", "k", "m", "l", None, pl.DataFrame())  # type: ignore[arg-type]
    assert check_start(other, FAST, 12.0, scores_of(9)) is None
    check_losses(other, FAST, pl.Series([4.0]), scores_of(9))  # the paper's Figure 3: near 4


def test_a_first_loss_that_is_not_that_of_a_zero_margin_is_caught():
    work = work_of(None)
    check_losses(work, FAST, pl.Series([math.log(2) + 4e-4]), scores_of(9))
    with pytest.raises(SdpoError, match=r"first loss is 0\.69\d+, not 0\.693147 \(zero margin, sigmoid\)"):
        check_losses(work, FAST, pl.Series([math.log(2) + 6e-4]), scores_of(9))


LOSSES = Loss.__args__  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def at_the_start(tiny_model, tmp_path_factory):
    """A trainer of TRL's whose policy is its reference, and a batch: its loss is that of a zero margin."""
    folder = tmp_path_factory.mktemp("losses")
    rows = [{"prompt": question, "chosen": good, "rejected": bad} for question, good, bad in QUESTIONS]
    pl.DataFrame(rows).write_ndjson(folder / "pairs.jsonl")
    pairs = read_pairs(folder / "pairs.jsonl")
    model, tokenizer = load_model(tiny_model)
    scores, encoded = score_pairs(pairs, tiny_model), dpo._encode(pairs, tokenizer, FAST)
    work = StepWork("dpo", 0, 1, pairs, str(tiny_model), "k", str(tiny_model), "k", None, folder / "out")
    watch = trainer._Watch(work, FAST, "key", folder, scores)
    made = trainer._trainer(work, FAST, encoded, scores, model, tokenizer, folder / "scratch", watch)
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    return made, batch


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_loss_of_a_zero_margin_is_trls_own(at_the_start, name, beta):
    made, batch = at_the_start
    smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust", "aot") else {}
    made.beta, made.loss_types, made.loss_weights = beta, [name], [1.0]
    made.label_smoothing = smoothing.get("label_smoothing", 0.0)
    with torch.no_grad():
        got = float(made._compute_loss(made.model, batch, return_outputs=False))
    expected = zero_margin_loss(StepConfig(beta=beta, loss=[name], trl=smoothing))
    if name == "sft":
        assert expected is None
        return
    value, slope = expected  # type: ignore[misc]
    assert got == pytest.approx(value, abs=1e-4 * slope + 1e-5)


def test_weighted_losses_add_up():
    both = zero_margin_loss(StepConfig(beta=0.1, loss=["sigmoid", "hinge"], trl={"loss_weights": [2.0, 0.5]}))
    assert both == (pytest.approx(2 * math.log(2) + 0.5), pytest.approx(2 * 0.05 + 0.5 * 0.1))
    assert zero_margin_loss(StepConfig(loss=["sigmoid", "sft"], trl={"loss_weights": [1.0, 0.1]})) is None
    assert zero_margin_loss(StepConfig(trl={"use_weighting": True})) is None


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"learning_rate": 1e-6}, "train.trl.learning_rate is decided by train.learning_rate"),
        ({"gradient_accumulation_steps": 2}, "is decided by train.batch_pairs"),
        ({"train_sampling_strategy": "random"}, "cannot be set here: the partition's order is the curriculum"),
        ({"ld_alpha": 0.5}, "the reference log-probabilities are sums over all tokens"),
        ({"save_steps": 5}, "cannot be set here: the run folder decides"),
        ({"weight_decay": "much"}, "train.trl.weight_decay is 'much'"),
        ({"wieght_decay": 0.1}, "train.trl.wieght_decay is not a field of TRL's DPOConfig"),
    ],
)
def test_what_must_not_be_set_for_trl_is_refused(section, said):
    with pytest.raises(SdpoError, match=said):
        check_trl_section(StepConfig(trl=section))


def test_other_fields_of_trl_reach_it(at_the_start):
    check_trl_section(StepConfig(trl={"weight_decay": 0.1, "max_grad_norm": 0.5, "label_smoothing": 0.1}))
    made = trainer._arguments(StepConfig(trl={"weight_decay": 0.1, "report_to": "tensorboard"}), dpo.Path("x"), 3)
    assert (made.weight_decay, made.report_to, made.seed) == (0.1, ["tensorboard"], 3)
    assert isinstance(at_the_start[0], PairTrainer)
    assert at_the_start[0].ref_model is None  # no second model is in memory


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_updates_are_handed_on_in_float32_where_bfloat16_would_lose_them(second, tmp_path, dtype):
    """Updates of about 1e-6 on weights of about 0.02: bfloat16 has steps of 1e-4 there."""
    work = second()
    row = train_step(work, FAST.model_copy(update={"learning_rate": 1e-6, "dtype": dtype}))
    before, after = load_model(work.start)[0], load_model(row["model"])[0]
    moved, survive = 0, 0
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        moved += int((old != new).sum())
        survive += int((old.bfloat16() != new.bfloat16()).sum())
    total = sum(weight.numel() for weight in before.parameters())
    assert moved > 0.5 * total
    assert survive < 0.1 * total  # those near zero
    assert row["model_key"] != row["start_key"]
    assert np.isfinite(row["max_start_gap"])
    assert not torch.is_autocast_enabled("cpu")  # what comes after in this process is float32 again


@pytest.mark.parametrize("pairs, nats, caught", [(1, 9e-3, False), (3, 9e-3, True), (1, 6e-2, True), (1, None, True)])
def test_rounding_of_one_pair_in_hundreds_stops_nothing_and_more_of_it_or_a_gross_gap_does(pairs, nats, caught):
    """Of 200 pairs of 9 tokens the noise is 5e-3 nats, a hundredth of them 2, and gross is 5e-2."""
    known = pl.concat([scores_of(9)] * 200).with_columns(pair_id=pl.int_range(pl.len()).cast(pl.String))
    moved = pl.when(pl.int_range(pl.len()) < pairs).then(pl.col("chosen_logp") + nats).otherwise("chosen_logp")
    reference = known.with_columns(chosen_logp=moved)
    if caught:
        with pytest.raises(SdpoError, match=f"{pairs} pair.s. of sdpo step 1 have other scores than the reference"):
            check_same_scores(work_of(known), FAST, reference, known)
    else:
        check_same_scores(work_of(known), FAST, reference, known)
