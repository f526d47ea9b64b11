import dataclasses
import gzip
import itertools
import json
import logging
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import polars as pl
import pytest
import ruamel.yaml
from polars.testing import assert_frame_equal

from sdpo_data import assets
from sdpo_data.models import load_model, model_key
from sdpo_data.run import Run
from sdpo_data.tables import CONTAMINATION, DOCUMENTS, ITEMS, RESULTS, STEPS, SdpoError, check
from sdpo_eval import EvalConfig, answers, compare_models, evaluate, h4, h4_v1, harness, questions
from sdpo_eval import __main__ as commands
from sdpo_eval.answers import answer_requests
from sdpo_eval.changes import find_changes, find_flips, find_forgetting
from sdpo_eval.contrasts import choose_models
from sdpo_eval.documents import load_documents
from sdpo_eval.harness import prefix_lm, write_items
from sdpo_eval.questions import encode_items

SUBJECTS = ["anatomy", "astronomy", "virology"]  # of MMLU: lm-eval has a file for each
COUNTS = {"arc_challenge": 7, "hellaswag": 6, "mmlu": 9, "truthfulqa_mc2": 5}
WORDS = ["stone", "water", "wind", "a red bird", "seven", "the moon", "glass", "rye"]


def choices(row, count=4):
    return [f"{WORDS[(row + place) % len(WORDS)]}{' and more' * ((row + place) % 3)}" for place in range(count)]


def hellaswag_rows(count):
    return [
        {"ind": row, "activity_label": f"Act {row}", "ctx": "",
         "ctx_a": f"[title] She takes  {WORDS[row % 8]}.", "ctx_b": "then she",
         "endings": [f"{ending} [step] it." for ending in choices(row)], "label": str(row % 4),
         "source_id": f"document {row // 2}"}
        for row in range(count)
    ]  # fmt: skip


def write(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The four tasks in small, in the layout of a data folder."""
    folder = tmp_path_factory.mktemp("benchmarks")
    arc = [
        {"id": str(row), "question": f"Which is {row}?", "answerKey": "ABCD"[row % 4],
         "choices": {"text": choices(row), "label": list("ABCD")}}
        for row in range(40)
    ]  # fmt: skip
    write(folder / "ARC-Challenge-train.jsonl.gz", arc[7:])
    write(folder / "ARC-Challenge-test.jsonl.gz", arc[:7])
    shots = [{"ind": row, "query": f"Act: {row}", "choices": choices(row), "gold": row % 4} for row in range(15)]
    write(folder / "hellaswag_train_processed.jsonl.gz", shots)
    write(folder / "hellaswag_val.jsonl.gz", hellaswag_rows(6))
    mmlu = [
        {"subject": subject, "question": f"{subject} {row}? ", "choices": choices(row), "answer": row % 4}
        for subject in SUBJECTS
        for row in range(8)
    ]
    write(folder / "mmlu_dev.jsonl.gz", [row for number, row in enumerate(mmlu) if number % 8 < 5])
    write(folder / "mmlu_test.jsonl.gz", [row for number, row in enumerate(mmlu) if number % 8 >= 5])
    truthful = [
        {
            "question": f"Is it {row}?",
            "mc2_targets": {"choices": choices(row, 3 + row % 3), "labels": [1, row % 2, 0, 0, 0][: 3 + row % 3]},
        }
        for row in range(5)
    ]
    write(folder / "truthfulqa_mc.jsonl.gz", truthful)
    return folder


@pytest.fixture
def all_shots(data, monkeypatch):
    """The protocol on the small tasks; their folder."""
    for name, count in COUNTS.items():
        monkeypatch.setitem(h4.TASKS, name, dataclasses.replace(h4.TASKS[name], n_full=count, published={}))
    return data


@pytest.fixture
def small(all_shots, monkeypatch):
    """The same with at most two shots, which is faster."""
    for name, task in h4.TASKS.items():
        monkeypatch.setitem(h4.TASKS, name, dataclasses.replace(task, shots=min(2, task.shots)))
    return all_shots


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Folders of three random models: "base", "one" and "two"."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to share
    folder = tmp_path_factory.mktemp("three")
    for number, name in enumerate(("base", "one", "two")):
        model, tokenizer = load_model(tiny_model)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    yield folder
    torch.set_num_threads(threads)


def steps_of(models, *names, arm="sdpo", start=None):
    rows = [
        {"arm": arm, "seed": 0, "step": step, "start_key": start or model_key(models / "base"), "reference_key": "",
         "model_key": model_key(models / name), "model": str(models / name), "pairs": 1, "tokens": 1, "updates": 1,
         "seconds": 1.0, "first_loss": 0.7, "last_loss": 0.6, "max_start_gap": 0.0, "margin_ref_mean": 0.0,
         "shared_from": None}
        for step, name in enumerate(names, 1)
    ]  # fmt: skip
    return pl.DataFrame(rows, STEPS)


@pytest.fixture
def run(tmp_path, models):
    """A run folder whose config.yaml names the base model."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"model: {models / 'base'}\n")
    return folder


@pytest.fixture
def answered(monkeypatch):
    """Item ids in the order in which models answer them."""
    seen = []
    score = answers.score_answers

    def noted(task, **own):
        seen.append(own["item_id"])
        return score(task, **own)

    monkeypatch.setattr(answers, "score_answers", noted)
    return seen


def config(folder, **settings):
    return EvalConfig(data_dir=str(folder), **settings)


# Against lm-eval itself, on the same files read by its own loader


HELLASWAG_COLUMNS = {
    "activity_label": "", "ctx_a": "", "ctx_b": "", "endings": [""], "query": "", "choices": [""], "gold": 0, "ind": 0,
    "ctx": "", "source_id": "", "split": "", "split_type": "",
}  # fmt: skip


def task_file(folder, name, data, subject=None):
    """A task file for lm-eval: its own, on our files, with the shots of its openllm group."""
    import lm_eval

    task = h4.TASKS[name]
    rows = {split: data_rows(data / file) for split, file in task.files.items()}
    files = {}
    for split, content in rows.items():
        if subject:
            content = [row for row in content if row["subject"] == subject]
        elif name == "hellaswag":  # one set of columns for both files, or datasets does not read them
            content = [HELLASWAG_COLUMNS | row | {"label": str(row.get("label", row.get("gold")))} for row in content]
        files[split] = str(folder / f"{subject or name}-{split}.jsonl")
        with open(files[split], "w") as file:  # noqa: PTH123
            file.writelines(json.dumps(row) + "\n" for row in content)
    settings = {
        "include": f"{lm_eval.__path__[0]}/tasks/{task.yaml.format(subject=subject)}", "task": subject or name,
        "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files},
        "num_fewshot": task.shots,
    }  # fmt: skip
    if name in ("arc_challenge", "hellaswag"):
        settings["fewshot_split"] = "train"
    if name == "hellaswag" and "gold" in rows["train"][0]:
        settings["fewshot_config"] = {"process_docs": None}
    path = folder / f"{subject or name}.yaml"
    ruamel.yaml.YAML().dump(settings, path)
    return str(path)


def data_rows(path):
    with gzip.open(path) as lines:
        return [json.loads(line) for line in lines]


def oracle(lm, files, limit, folder, monkeypatch):
    """lm-eval's samples, by task, of the first `limit` documents."""
    samples = ask_lm_eval(lm, files, limit, folder, monkeypatch)["samples"]
    return {task: sorted(own, key=lambda sample: sample["doc_id"]) for task, own in samples.items()}


def ask_lm_eval(lm, files, limit, folder, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    manager = TaskManager(include_defaults=False)
    return simple_evaluate(
        model=lm, tasks=files, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
    )


def dummy_lm():
    from lm_eval.api.model import LM

    class Dummy(LM):
        def loglikelihood(self, requests, disable_tqdm=False):
            return [(-float(len(request.args[1])), False) for request in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        def generate_until(self, requests):
            raise NotImplementedError

    return Dummy()


def pairs_of(sample):
    return [tuple(arguments) for arguments in sample["arguments"]]


def asked(item):
    return [(item.context, choice) for choice in item.choices]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.real
def test_questions_are_lm_evals_own(name, all_shots, tmp_path, monkeypatch):
    task = h4.TASKS[name]
    documents = load_documents(task, str(all_shots))
    subjects = SUBJECTS if name == "mmlu" else [None]
    files = [task_file(tmp_path, name, all_shots, subject) for subject in subjects]
    samples = oracle(dummy_lm(), files, None, tmp_path, monkeypatch)
    for subject, theirs in samples.items():
        ours = write_items(task, documents, [f"{subject}/{row}" for row in range(len(theirs))])
        assert [asked(item) for item in ours] == [pairs_of(sample) for sample in theirs]
        [alone] = write_items(task, documents, [f"{subject}/2"])  # its shots do not depend on what else is asked
        assert asked(alone) == pairs_of(theirs[2])


@pytest.mark.real
def test_hellaswag_shots_from_raw_documents_are_lm_evals_own(small, tmp_path, monkeypatch):
    task = h4.TASKS["hellaswag"]
    raw = tmp_path / "raw"
    shutil.copytree(small, raw)
    write(raw / task.files["train"], hellaswag_rows(14))  # as the hub has them
    samples = oracle(dummy_lm(), [task_file(tmp_path, "hellaswag", raw)], None, tmp_path, monkeypatch)
    ours = list(write_items(task, load_documents(task, str(raw)), [f"hellaswag/{row}" for row in range(6)]))
    assert [asked(item) for item in ours] == [pairs_of(sample) for sample in samples["hellaswag"]]
    assert "She takes stone. Then she" in ours[0].context  # brackets and doubled blanks gone: preprocessed


METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "mmlu": "acc", "truthfulqa_mc2": "acc"}


def compare_with_lm_eval(folder, data, names, limit, tmp_path, monkeypatch, moved=1e-6):
    """Answer the first documents of each task on the prefix engine, and with HFLM through simple_evaluate."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(folder)
    # its float32 softmax alone is 1.2e-4 nats off a float64 model on TruthfulQA's first question, the engine 2e-5
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float64")
    for name, subject in names:
        task = h4.TASKS[name]
        samples = oracle(lm, [task_file(tmp_path, name, data, subject)], limit, tmp_path, monkeypatch)
        theirs = samples[subject or name]
        ids = [f"{subject or name}/{row}" for row in range(limit)]
        requests = encode_items(write_items(task, load_documents(task, str(data)), ids), tokenizer, "tokenizer")
        parts = answer_requests(model, task, requests, 4096, lambda _: None)
        rows = sorted(itertools.chain(*parts), key=lambda row: int(row["item_id"].rsplit("/", 1)[1]))
        for ours, sample in zip(rows, theirs, strict=True):
            logps = [logp for logp, _ in sample["filtered_resps"]]
            assert ours["choice_logps"] == pytest.approx(logps, abs=1e-4)
            assert ours["score"] == pytest.approx(sample[METRICS[name]], abs=moved)
            if name == "truthfulqa_mc2":
                labels = sample["doc"]["mc2_targets"]["labels"]
                assert ours["gold_logp"] == pytest.approx(
                    max(logps[: labels.count(1)]) if labels[-1] == 0 else max(logps), abs=1e-4
                )
                assert ours["correct"] is None
            else:
                assert ours["gold_logp"] == pytest.approx(logps[int(sample["target"])], abs=1e-4)
                assert ours["correct"] == ours["score"]
        assert len(theirs) == limit


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.real
def test_answers_are_lm_evals_own(name, models, small, tmp_path, monkeypatch):
    compare_with_lm_eval(
        models / "one", small, [(name, "virology" if name == "mmlu" else None)], 3, tmp_path, monkeypatch
    )


@pytest.mark.real
def test_results_are_lm_evals_own(models, small, tmp_path, monkeypatch):
    """Of whole tasks: acc_norm, acc and mc2 as its `results` give them, and MMLU's as the mean over its subjects."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(models / "one")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    asked = [(name, subject) for name in COUNTS for subject in (SUBJECTS if name == "mmlu" else [None])]
    files = [task_file(tmp_path, name, small, subject) for name, subject in asked]
    theirs = ask_lm_eval(lm, files, None, tmp_path, monkeypatch)["results"]
    values = {name: [] for name in COUNTS}
    for name, subject in asked:
        values[name].append(100 * theirs[subject or name][f"{METRICS[name]},none"])
    ours = evaluate(models / "one", config(small))
    for name in COUNTS:
        assert len(values[name]) == (3 if name == "mmlu" else 1)
        mean = sum(values[name]) / len(values[name])
        assert ours.filter(task=name)["value"].to_list() == [pytest.approx(mean, abs=1e-4)]
    assert ours.filter(task="h4")["value"][0] == pytest.approx(sum(sum(v) / len(v) for v in values.values()) / 4)


def test_bos_where_the_tokenizer_adds_one(models, small):
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = load_model(models / "base")
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    plain = HFLM(pretrained=model, tokenizer=tokenizer)._encode_pair("Which?", " That")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", bos)]
    )
    with_bos = HFLM(pretrained=model, tokenizer=tokenizer)._encode_pair("Which?", " That")
    assert with_bos == ([bos, *plain[0]], plain[1])
    assert plain[0][0] != bos


# Runs


def test_base_and_steps_on_the_same_items(small, models, run):
    results = evaluate(steps_of(models, "one", "two"), config(small, limit=4), run)
    check(results, RESULTS, "results")
    assert results.select("arm", "step", "task").rows() == [
        (arm, step, task) for arm, step in (("base", 0), ("sdpo", 1), ("sdpo", 2)) for task in [*h4.TASKS, "h4"]
    ]
    assert results.filter(task="h4")["n"].to_list() == [16] * 3
    assert results["n_full"].to_list() == [*COUNTS.values(), 27] * 3
    items = Run(run).items
    check(items, ITEMS, "items")
    asked = items.group_by("arm", "step").agg(pl.col("item_id").sort())["item_id"].to_list()
    assert asked[0] == asked[1] == asked[2]
    assert items.select("step", "model_key").unique().sort("step").rows() == [
        (step, model_key(models / name)) for step, name in enumerate(("base", "one", "two"))
    ]
    assert_frame_equal(Run(run).results, results)


def test_only_the_steps_and_seeds_asked_for(small, models, run):
    both = [steps_of(models, "one", "two").with_columns(seed=pl.lit(seed, pl.Int64)) for seed in (3, 5)]
    steps = pl.concat(both).filter(~((pl.col("seed") == 5) & (pl.col("step") == 2)))  # seed 5 has finished one step
    asked = {"limit": 1, "tasks": ["arc_challenge"]}

    def models_of(results):
        return results.select("arm", "seed", "step").rows()

    lasts = evaluate(steps, config(small, steps="last", **asked), run)
    assert models_of(lasts) == [("base", 0, 0), ("sdpo", 3, 2), ("sdpo", 5, 1)]
    one = evaluate(steps, config(small, seeds=[5], **asked), base=models / "base")
    assert models_of(one) == [("base", 0, 0), ("sdpo", 5, 1)]
    tuned = pl.lit("sdpo,learning_rate=1e-06,beta=0.1")  # a label of train.tune
    pruned = steps.with_columns(arm=tuned, model=pl.when(step=1).then(pl.lit("nowhere")).otherwise("model"))
    kept = evaluate(pruned, config(small, **asked), base=models / "base")
    assert models_of(kept) == [("base", 0, 0), ("sdpo,learning_rate=1e-06,beta=0.1", 3, 2)]
    with pytest.raises(SdpoError, match=r"eval.seeds has 4, but no step is finished with it. Finished: seed 3, seed 5"):
        evaluate(steps, config(small, seeds=[5, 4], **asked), base=models / "base")


@pytest.mark.real
def test_a_result_is_the_mean_of_its_items(small, models, run):
    results = evaluate(models / "one", config(small), run)
    items = Run(run).items
    for task in ("arc_challenge", "hellaswag", "truthfulqa_mc2"):
        own = items.filter(task=task)
        scores, row = own["score"], results.filter(task=task).row(0, named=True)
        assert row["value"] == pytest.approx(100 * scores.mean())
        sums = own.group_by("cluster").agg((pl.col("score") - scores.mean()).sum())["score"]
        error = 100 * (len(sums) / (len(sums) - 1) * (sums**2).sum()) ** 0.5 / len(scores)
        assert row["stderr"] == (pytest.approx(error) if error else None)
        clusters = {int(item.split("/")[1]): cluster for item, cluster in own.select("item_id", "cluster").iter_rows()}
        made_from = "document {}" if task == "hellaswag" else f"{task}/{{}}"
        per = 2 if task == "hellaswag" else 1
        assert clusters == {row: made_from.format(row // per) for row in range(COUNTS[task])}
    by_subject = items.filter(task="mmlu").group_by("subject").agg(pl.col("score").mean())["score"]
    assert len(by_subject) == 3
    assert results.filter(task="mmlu")["value"][0] == pytest.approx(100 * by_subject.mean())


@pytest.mark.real
def test_a_second_time_nothing_is_done(small, models, run, monkeypatch):
    first = evaluate(steps_of(models, "one"), config(small, limit=2), run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    lineage = Run(run).lineage
    monkeypatch.setattr(answers, "load_model", None)
    assert_frame_equal(evaluate(steps_of(models, "one"), config(small, limit=2), run), first)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == before
    assert Run(run).lineage == lineage


def test_what_it_can_tell_is_said_before_any_model_is_loaded(small, models, run, other_tasks, monkeypatch, caplog):
    # 50 / sqrt(7) = 18.90; HellaSwag's six are three pairs of one source: 50 * sqrt(3 * 2^2) / 6 = 28.87;
    # three subjects of 3: sqrt(3 * 2500 / 3) / 3 = 16.67; 50 / sqrt(5) = 22.36;
    # H4 sqrt(18.90^2 + 28.87^2 + 16.67^2 + 22.36^2) / 4 = sqrt(1968.3) / 4 = 11.09
    def stopped(*_):
        raise KeyboardInterrupt

    load = answers.load_model
    monkeypatch.setattr(answers, "load_model", stopped)
    settings = config(small, tasks=["choose", "h4"], task_dir=str(other_tasks))
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        evaluate(models / "one", settings, run)
    [asked, errors] = caplog.messages
    assert asked == "budget full, questions: ARC-Challenge 7 of 7, HellaSwag 6 of 6, MMLU 9 of 9, TruthfulQA 5 of 5"
    assert errors.startswith("standard errors, points, at most about: ARC-Challenge 18.90, HellaSwag 28.87, MMLU 16.67")
    assert errors.endswith(", TruthfulQA 22.36, H4 11.09")
    monkeypatch.setattr(answers, "load_model", load)
    few = config(small, tasks=["mmlu"], limit=2)  # two subjects of 1: sqrt(2 * 2500) / 2 = 35.36
    with caplog.at_level(logging.INFO):
        evaluate(models / "one", few, run)
        assert "limit 2, questions: MMLU 2 of 9" in caplog.messages
        assert "standard errors, points, at most about: MMLU 35.36" in caplog.messages
        assert any("tokens at " in message and " for base, of 1 models" in message for message in caplog.messages)
        caplog.clear()
        evaluate(models / "one", few, run)  # nothing is asked
    assert not any("standard errors" in message for message in caplog.messages)


@pytest.mark.real
def test_a_larger_limit_asks_only_what_is_new(small, models, run, answered):
    few = evaluate(models / "base", config(small, limit=2), run)
    asked = set(answered)
    answered.clear()
    many = evaluate(models / "base", config(small, limit=4), run)
    assert len(answered) == 8
    assert not asked & set(answered)
    assert_frame_equal(many, evaluate(models / "base", config(small, limit=4)), rel_tol=1e-5)
    answered.clear()
    assert_frame_equal(evaluate(models / "base", config(small, limit=2), run), few)  # the items of the larger one stay
    assert answered == []
    assert Run(run).items.height == 16


@pytest.mark.real
def test_numbers_do_not_depend_on_rows_or_limit(small, models, tmp_path):
    tasks = ["hellaswag", "truthfulqa_mc2"]
    evaluate(models / "base", config(small, limit=3, token_budget=1, tasks=tasks), tmp_path / "a")
    evaluate(models / "base", config(small, token_budget=4096, tasks=tasks), tmp_path / "b")
    few, all_ = (Run(tmp_path / name).items.sort("task", "item_id").drop("correct") for name in "ab")
    common = all_.join(few, on=["task", "item_id"], how="semi", maintain_order="left")
    assert few.height == 6
    assert all_.height == 11
    assert_frame_equal(few, common, abs_tol=1e-4)


@pytest.mark.real
def test_equal_weights_are_evaluated_once(small, models, run, answered):
    evaluate(steps_of(models, "one"), config(small, limit=2), run)
    answered.clear()
    results = evaluate({"copy": models / "one"}, config(small, limit=2), run)
    assert answered == []
    values = [results.filter(arm=arm)["value"].to_list() for arm in ("sdpo", "copy")]
    assert values[0] == values[1]
    assert (run / "items/copy-0-0-mmlu.parquet").exists()


@pytest.mark.real
def test_a_killed_run_goes_on_where_it_stopped(small, models, run, answered, monkeypatch):
    monkeypatch.setattr(answers, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(questions, "SLICE", 4)
    score = answers.score_answers

    def dies(*arguments, **own):
        if len(answered) == 7 + 6 + 4:  # in MMLU, after ARC and HellaSwag and a slice of it
            raise KeyboardInterrupt
        return score(*arguments, **own)

    monkeypatch.setattr(answers, "score_answers", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models / "base", config(small), run)
    kept = {*Run(run).items["item_id"]}
    assert len(kept) > 7 + 6  # some of MMLU's too; what was answered since the last write is lost
    answered.clear()
    monkeypatch.setattr(answers, "score_answers", score)
    results = evaluate(models / "base", config(small), run)
    assert not kept & set(answered)
    assert len(kept) + len(answered) == len({*kept, *answered}) == 27
    assert_frame_equal(results, evaluate(models / "base", config(small)), rel_tol=1e-5)


@pytest.fixture
def retokenized(models, tmp_path):
    """The weights of "one" with a tokenizer that puts a blank before every text."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = shutil.copytree(models / "one", tmp_path / "retokenized")
    _, tokenizer = load_model(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.save_pretrained(folder)
    return folder


def forget_tokenizers(run):
    """Make a run folder one from before tokenizers were noted."""
    for path in run.glob("items/*.parquet"):
        pl.read_parquet(path).drop("tokenizer_key", strict=False).write_parquet(path)
    lineage = json.loads((run / "lineage.json").read_text())
    for made in lineage.values():
        made["recipe"].pop("tokenizer_key", None)
    (run / "lineage.json").write_text(json.dumps(lineage))


def test_equal_weights_with_another_tokenizer_are_another_model(small, models, run, retokenized, answered, other_tasks):
    settings = config(small, limit=2, tasks=["truthfulqa_mc2", "choose"], task_dir=str(other_tasks))
    evaluate({"mine": models / "one"}, settings, run)
    answered.clear()
    results = evaluate({"other": retokenized}, settings, run)
    assert len(answered) == 2
    assert results["model_key"].n_unique() == 1
    for task in ("truthfulqa_mc2", "choose"):
        mine, other = (Run(run).items.filter(task=task, arm=arm)["choice_logps"].to_list() for arm in ("mine", "other"))
        assert mine != other
    assert_frame_equal(results.filter(arm="other"), evaluate({"other": retokenized}, settings))
    with pytest.raises(SdpoError, match=r"mine-0-0-truthfulqa_mc2.parquet holds answers of tokenizer_key \w+, now"):
        evaluate({"mine": retokenized}, settings, run)
    with pytest.raises(SdpoError, match=r"other_tasks/mine-0-0-choose was made with tokenizer_key = "):
        evaluate({"mine": retokenized}, config(small, tasks=["choose"], limit=2, task_dir=str(other_tasks)), run)


def test_a_run_from_before_tokenizers_were_noted(small, models, run, retokenized, answered, other_tasks, caplog):
    settings = config(small, limit=2, tasks=["truthfulqa_mc2", "choose"], task_dir=str(other_tasks))
    first = evaluate(steps_of(models, "one"), settings, run)
    forget_tokenizers(run)
    answered.clear()
    with caplog.at_level(logging.INFO):
        assert_frame_equal(evaluate(steps_of(models, "one"), settings, run), first)
        both = pl.concat([steps_of(models, "one"), steps_of(models, "one", arm="dpo")])
        results = evaluate(both, settings, run)  # a step is a copy of the base model's tokenizer
    assert answered == []
    assert_frame_equal(results.filter(arm="dpo").drop("arm"), results.filter(arm="sdpo").drop("arm"))
    assert "4 answers name no tokenizer: taken for those of the tokenizers the models have now" in caplog.text
    evaluate({"other": retokenized}, settings, run)  # but not of any model that comes along
    assert len(answered) == 2


def test_other_weights_under_the_same_name_are_refused(small, models, run):
    evaluate({"mine": models / "one"}, config(small, limit=2, tasks=["mmlu"]), run)
    before = Run(run).items
    with pytest.raises(
        SdpoError, match=r"items/mine-0-0-mmlu.parquet holds answers of model_key \w+, now it is .*--force"
    ):
        evaluate({"mine": models / "two"}, config(small, limit=2, tasks=["mmlu"]), run)
    assert_frame_equal(Run(run).items, before)
    evaluate({"mine": models / "two"}, config(small, limit=1, tasks=["mmlu"]), run, force=True)
    assert Run(run).items["model_key"].to_list() == [model_key(models / "two")]


def test_another_protocol_under_the_same_name_is_refused(small, models, run, tmp_path):
    evaluate(models / "one", config(small, limit=2, tasks=["hellaswag"]), run)
    changed = tmp_path / "changed"
    shutil.copytree(small, changed)
    write(changed / "hellaswag_val.jsonl.gz", hellaswag_rows(7)[1:])
    with pytest.raises(SdpoError, match="holds answers of protocol h4-lmeval@"):
        evaluate(models / "one", config(changed, limit=2, tasks=["hellaswag"]), run)


@pytest.mark.real
def test_force_evaluates_again(small, models, run, answered):
    evaluate(models / "one", config(small, limit=2, tasks=["mmlu"]), run)
    evaluate(models / "one", config(small, limit=2, tasks=["mmlu"]), run, force=True)
    assert len(answered) == 4
    assert Run(run).items.height == 2


def test_a_folder_whose_weights_have_changed_is_refused(small, models, run):
    steps = steps_of(models, "one").with_columns(model=pl.lit(str(models / "two")))
    with pytest.raises(SdpoError, match=r"two does not hold the weights of arm sdpo, seed 0, step 1"):
        evaluate(steps, config(small, limit=1, tasks=["mmlu"]), run)


def test_a_base_that_was_not_trained_from_is_refused(small, models, run):
    steps = steps_of(models, "one", start="0" * 32)
    with pytest.raises(SdpoError, match=r"base does not hold the weights of arm base, seed 0, step 0"):
        evaluate(steps, config(small, limit=1, tasks=["mmlu"]), run)


def test_steps_from_two_base_models_are_refused(small, models, run):
    steps = pl.concat([steps_of(models, "one"), steps_of(models, "two", arm="dpo", start="other")])
    with pytest.raises(SdpoError, match="start from 2 different models"):
        evaluate(steps, config(small), run)


def test_the_base_model_must_be_named(small, models, tmp_path):
    with pytest.raises(SdpoError, match=r"config.yaml does not name the model before step 1"):
        evaluate(steps_of(models, "one"), config(small), tmp_path)
    named = evaluate(steps_of(models, "one"), config(small, limit=1, tasks=["mmlu"]), tmp_path, base=models / "base")
    assert named["arm"].to_list() == ["base", "sdpo"]


@pytest.mark.real
def test_without_truthfulqa_three_tasks_and_no_h4(small, models, run, tmp_path, monkeypatch, caplog):
    def silent(*_):
        raise SdpoError("The hub did not answer.")

    monkeypatch.setattr(assets, "hub_dataset", silent)
    monkeypatch.setattr(assets, "require_hub", silent)
    without = tmp_path / "without"
    shutil.copytree(small, without, ignore=shutil.ignore_patterns("truthfulqa*"))
    with caplog.at_level(logging.WARNING):
        results = evaluate(models / "one", config(without, limit=1), run)
    assert results["task"].to_list() == ["arc_challenge", "hellaswag", "mmlu"]
    assert caplog.text.count("TruthfulQA is not asked") == 1
    whole = evaluate(models / "one", config(small, limit=1), run)
    assert whole.filter(task="h4").height == 1
    again = evaluate(models / "one", config(without, limit=1), run)  # what was answered before still stands
    assert_frame_equal(again, whole)
    more = evaluate(models / "one", config(without, limit=2), run)
    assert more["task"].to_list() == ["arc_challenge", "hellaswag", "mmlu"]


@pytest.mark.real
def test_results_hold_only_models_asked_the_same(small, models, run, caplog):
    evaluate({"early": models / "one"}, config(small, limit=1), run)
    with caplog.at_level(logging.WARNING):
        results = evaluate(models / "base", config(small, limit=2), run)
    assert results["arm"].unique().to_list() == ["base"]
    assert "leaves out 4 evaluations of other or fewer items, e.g. early-0-0-arc_challenge" in caplog.text


def test_mmlu_on_named_subjects(small, models, run):
    results = evaluate(models / "one", config(small, tasks=["mmlu"], mmlu_subjects=["virology", "anatomy"]), run)
    assert results.select("n", "n_full").rows() == [(6, 9)]
    assert sorted(Run(run).items["subject"].unique()) == ["anatomy", "virology"]
    with pytest.raises(
        SdpoError, match=r"mmlu_subjects has 'astrology', but MMLU does not. It has: anatomy, astronomy"
    ):
        evaluate(models / "one", config(small, mmlu_subjects=["astrology"]), run)


@pytest.mark.real
def test_loaded_models_and_their_dtype(small, models):
    import torch

    model, tokenizer = load_model(models / "one")
    only = config(small, limit=2, tasks=["arc_challenge"])
    loaded = evaluate((model, tokenizer), only)
    assert_frame_equal(loaded, evaluate(models / "one", only))
    with pytest.raises(SdpoError, match=r"'mine' is in bfloat16, but eval.dtype is float32"):
        evaluate({"mine": (model.to(torch.bfloat16), tokenizer)}, only)
    with pytest.raises(SdpoError, match="Cannot evaluate a LlamaForCausalLM"):
        evaluate(model, only)


@pytest.mark.real
def test_a_model_spread_over_devices(small, models, monkeypatch, tmp_path):
    """One layer lies on disk, as where a model is larger than its device: the same answers."""
    import accelerate

    def spread(name, dtype):
        model, tokenizer = load_model(name, dtype)
        place = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                 "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
        return accelerate.dispatch_model(model, place, offload_dir=str(tmp_path), force_hooks=True), tokenizer

    tasks = config(small, tasks=["mmlu"])
    whole = evaluate(models / "one", tasks)
    monkeypatch.setattr(answers, "load_model", spread)
    assert_frame_equal(evaluate(models / "one", tasks), whole)
    with pytest.raises(
        SdpoError, match=r"A loaded \w+ has weights off its device, so it is not known by them. Give its"
    ):
        evaluate(spread(models / "one", "float32"), tasks)


@pytest.mark.real
def test_dtypes_are_different_protocols(small, models):
    single, half = (
        evaluate(models / "one", config(small, limit=1, tasks=["mmlu"], dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    assert single["protocol"][0] != half["protocol"][0]


def test_a_question_longer_than_the_model_reads_is_refused(all_shots, models):
    with pytest.raises(SdpoError, match=r"ARC-Challenge has questions of [\d,]+ tokens, but the model reads 512"):
        evaluate(models / "one", config(all_shots, limit=1, tasks=["arc_challenge"]))


def test_a_model_without_numbers_is_refused(small, models):
    import torch

    model, tokenizer = load_model(models / "one")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(SdpoError, match=r"MMLU, item \w+/\d: log-probabilities \[nan"):
        evaluate((model, tokenizer), config(small, limit=1, tasks=["mmlu"]))


def test_a_name_that_is_no_file_name(small, models):
    with pytest.raises(SdpoError, match=r"cannot be called 'my/model'"):
        evaluate({"my/model": models / "one"}, config(small))


# The command


def test_command(small, models, run, run_command):
    steps = run / "arms" / "sdpo" / "seed_0"
    steps.mkdir(parents=True)
    steps_of(models, "one").write_parquet(steps / "steps.parquet")
    code, out, _ = run_command("sdpo_eval.__main__", run, "--limit", 2, "--data-dir", small)
    assert code == 0
    assert "H4 (n = 8)" in " ".join(out.split())
    assert "a subset, not the benchmark: " in out
    assert "MMLU 2 of 9" in out
    code, out, _ = run_command("sdpo_eval.__main__", run)  # config.yaml remembers limit and data_dir
    assert code == 0
    assert out.splitlines()[0] == f"up to date: {run / 'results.parquet'}"


def test_up_to_date_needs_neither_torch_nor_lm_eval(small, models, run):
    steps = run / "arms" / "sdpo" / "seed_0"
    steps.mkdir(parents=True)
    steps_of(models, "one").write_parquet(steps / "steps.parquet")
    evaluate(steps_of(models, "one"), config(small, limit=1), run)
    code = f"""
import dataclasses, sys
from sdpo_eval import h4, __main__
for name, (count, shots) in { {name: (task.n_full, task.shots) for name, task in h4.TASKS.items()} }.items():
    h4.TASKS[name] = dataclasses.replace(h4.TASKS[name], n_full=count, shots=shots, published={{}})
sys.argv = ["sdpo_eval", {str(run)!r}]
__main__.main()
print([name for name in ("torch", "lm_eval", "transformers", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("up to date: ")
    assert lines[-1] == "[]"


def test_command_without_steps_evaluates_the_model(small, models, tmp_path, run_command):
    arguments = ["--model", models / "two", "--limit", 1, "--tasks", "mmlu", "--data-dir", small]
    code, out, _ = run_command("sdpo_eval.__main__", tmp_path / "new", *arguments)
    assert code == 0
    assert "no H4" in out
    assert Run(tmp_path / "new").results.select("arm", "model_key").rows() == [("base", model_key(models / "two"))]


def test_what_is_evaluated_as_text(small, run, run_command):
    code, out, _ = run_command("sdpo_eval.__main__", run, "--documents", "--limit", 2, "--data-dir", small)
    assert code == 0
    assert "8 questions" in out
    documents = check(Run(run).read("documents"), DOCUMENTS, "documents")
    assert documents["task"].unique(maintain_order=True).to_list() == list(COUNTS)
    texts = dict(documents.select("item_id", "text").rows())
    row = int(documents.filter(task="hellaswag")["item_id"][0].split("/")[1])
    assert texts[f"hellaswag/{row}"] == f"[title] She takes  {WORDS[row]}. Then she"
    assert texts[documents.filter(task="arc_challenge")["item_id"][0]].startswith("Which is ")
    assert not (run / "results.parquet").exists()


def test_what_a_task_beside_h4_asks_as_text(other_tasks, small, models, run, run_command):
    """The same texts, under the same ids, as an evaluation keeps; as many as are asked."""
    names = ["choose", "write_it"]
    flags = ["--tasks", "arc_challenge", *names, "--limit", 2, "--data-dir", small, "--task-dir", other_tasks]
    code, _, err = run_command("sdpo_eval.__main__", run, "--documents", *flags)
    assert code == 0, err
    written = Run(run).read("documents").filter(pl.col("task").is_in(names))
    assert dict(written["task"].value_counts().rows()) == dict.fromkeys(names, 2)
    evaluate(models / "base", config(small, tasks=names, limit=2, task_dir=str(other_tasks)), run)
    kept = Run(run).questions.filter(pl.col("task").is_in(names))
    key = ["task", "item_id", "text"]
    assert written.select(key).sort(key).equals(kept.select(key).sort(key))


def test_a_question_whose_choices_stand_within_it_is_told_with_the_first():
    doc = {"sentence": "Ann thanked _ .", "options": ["Ann thanked Eve", "Ann thanked her"]}
    within = SimpleNamespace(doc_to_text=lambda _: 1, doc_to_choice=lambda doc: doc["options"])  # as winogrande is
    assert harness._question(within, doc) == "Ann thanked Eve"
    assert harness._question(SimpleNamespace(doc_to_text=lambda doc: doc["sentence"]), doc) == "Ann thanked _ ."


def test_clean_results_that_are_those_of_all_are_not_shown_twice():
    rows = [
        ("base", 0, 0, "key", "h4-lmeval@1", task, metric, 50.0, 1.0, n, 9, subset)
        for task, metric, n, subset in (
            ("arc_challenge", "acc_norm", 2, "all"), ("truthfulqa_mc2", "mc2", 2, "all"),
            ("arc_challenge", "acc_norm", 2, "clean"), ("truthfulqa_mc2", "mc2", 1, "clean"),
        )
    ]  # fmt: skip
    results = pl.DataFrame(rows, RESULTS, orient="row")
    titles = ["ARC-Challenge (n = 2)", "TruthfulQA (n = 2)", "TruthfulQA, clean (n = 1)"]
    assert commands.tabulate(results).columns == ["arm", "seed", "step", *titles]
    told = "no question of ARC-Challenge is given away by a training pair: clean results are the same."
    assert told in commands.caveats(results, [])


def test_clean_results_leave_out_what_training_pairs_touch(small, models, run, pairs, caplog):
    tasks = config(small, tasks=["arc_challenge", "truthfulqa_mc2"])
    before = evaluate(models / "one", tasks, run)
    assert before["subset"].unique().to_list() == ["all"]
    found = [(pair, "arc_challenge", f"arc_challenge/{row}", rule, "words")
             for pair, row, rule in (("p1", 2, "question"), ("p2", 2, "8-gram"), ("p3", 5, "question"),
                                     ("p1", 0, "13-gram"), ("gone", 1, "question"))]  # fmt: skip
    pl.DataFrame(found, CONTAMINATION, orient="row").write_parquet(run / "contamination.parquet")
    pairs.with_columns(pair_id=pl.format("p{}", pl.int_range(pl.len()))).write_parquet(run / "pairs.parquet")
    Run(run).questions.write_parquet(run / "documents.parquet")
    results = evaluate(models / "one", tasks, run)
    assert_frame_equal(results.filter(subset="all"), before)
    clean = results.filter(subset="clean")
    assert clean.select("task", "n", "n_full").rows() == [("arc_challenge", 5, 5), ("truthfulqa_mc2", 5, 5)]
    scores = Run(run).items.filter(task="arc_challenge").filter(~pl.col("item_id").str.ends_with("/2"))
    scores = scores.filter(~pl.col("item_id").str.ends_with("/5"))["score"]
    assert clean["value"][0] == pytest.approx(100 * scores.mean())
    assert clean["value"][1] == before["value"][1]
    Run(run).questions.filter(task="arc_challenge").write_parquet(run / "documents.parquet")
    results = evaluate(models / "one", tasks, run)  # nobody knows whether TruthfulQA's are clean
    assert results.filter(subset="clean")["task"].to_list() == ["arc_challenge"]
    assert "5 questions were not in the documents that the pairs were held against" in caplog.text


def test_show_prints_the_ends_of_one_request_per_task(small, models, run, run_command):
    arguments = ["--show", "--data-dir", small, "--model", models / "one", "--protocol", "h4-v1"]
    code, out, _ = run_command("sdpo_eval.__main__", run, *arguments)
    assert code == 0
    assert out.count("  begins ") == 4
    mmlu = out[out.index("MMLU, ") : out.index("TruthfulQA, ")].splitlines()
    assert mmlu[1].replace(" ", "").startswith("beginsThe")
    assert mmlu[2].replace(" ", "").endswith("wer:")
    assert mmlu[3].split() == ["choice", "Ġ", "A"] or mmlu[3].split() == ["choice", "ĠA"]
    assert not (run / "results.parquet").exists()


def test_show_prints_what_a_task_beside_h4_asks_first(small, models, run, other_tasks, run_command, monkeypatch):
    """As lm-eval gives it to a model in an evaluation: shots, blanks and all."""
    for name, more in (("shots", {"num_fewshot": 2, "fewshot_split": "test"}), ("bare", {"doc_to_text": ""})):
        task = ruamel.yaml.YAML(typ="safe").load(other_tasks / "choose.yaml")
        ruamel.yaml.YAML().dump(task | {"task": name} | more, other_tasks / f"{name}.yaml")
    rows = [{"q": f"Is it {row} or {row + 1}? ", "answers": choices(row, 3), "gold": row % 3} for row in range(5)]
    (other_tasks / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["choose", "shots", "bare", "write_it"]
    flags = ["--tasks", *names, "mmlu", "--task-dir", other_tasks, "--data-dir", small, "--model", models / "one"]
    code, out, err = run_command("sdpo_eval.__main__", run, "--show", *flags)
    assert code == 0, err
    assert not (run / "results.parquet").exists()
    assert out.startswith("MMLU, ")  # H4's stand first
    lines = out.splitlines()[4:]

    model, tokenizer = load_model(models / "one")
    lm, seen = prefix_lm(model, tokenizer), []

    def tokens(ids):
        return " ".join(tokenizer.convert_ids_to_tokens(ids))

    monkeypatch.setattr(
        type(lm), "_loglikelihood_tokens", lambda _, asked, **__: seen.append(asked[0]) or [(-1.0, False)] * len(asked)
    )
    for name in names[:3]:
        harness.evaluate_task(lm, name, None, str(other_tasks), "float32")
    wanted = []
    for name, (_, context, answer) in zip(names, seen, strict=False):
        first, last, choice = map(tokens, (context[:8], context[-8:], answer))
        wanted.append(f"{name}, {name}/0, lm-eval 0.4.13: {len(context):,} tokens, first choice {len(answer)}")
        wanted += [f"  begins {first}", f"  ends   {last}", f"  choice {choice}"]
    assert len(seen[1][1]) > 2 * len(seen[0][1])  # two questions before it
    assert seen[2][1] == [tokenizer.eos_token_id]  # nothing before the answer: what HFLM puts there
    prompt = tokenizer(rows[0]["q"])["input_ids"]  # with the blank at its end, which a choice would have taken
    wanted += [f"write_it, write_it/0, lm-eval 0.4.13: {len(prompt)} tokens, no choices"]
    wanted += [f"  begins {tokens(prompt[:8])}", f"  ends   {tokens(prompt[-8:])}"]
    assert lines == wanted


def test_one_model_without_a_run_folder(small, models, run_command):
    code, out, _ = run_command(
        "sdpo_eval.__main__", "--model", models / "two", "--limit", 1, "--tasks", "mmlu", "--data-dir", small
    )
    assert code == 0
    assert f"{models / 'two'}, nothing kept" in out.replace("\n", "")


def test_the_help_says_what_the_model_is_and_what_is_asked_by_default(run_command):
    _, told, _ = run_command("sdpo_eval.__main__", "--help")
    told = " ".join(told.replace("│", " ").split())
    assert "--model STR The model evaluated, of a run with steps the one before step 1" in told
    assert "Reference model S" not in told
    assert "Named subset of H4, always the same items: without it all 26,073;" in told


def test_limit_and_budget_together_are_refused(run, run_command):
    code, _, err = run_command("sdpo_eval.__main__", run, "--limit", 5, "--budget", "tiny")
    assert code == 2
    assert "limit 5 and budget 'tiny' both say how many items; set one of them" in err


def test_protocols_are_not_mixed_in_one_run(small, models, run):
    first = evaluate(models / "one", config(small, limit=2, tasks=["mmlu"]), run)
    with pytest.raises(SdpoError, match=r"holds answers of protocol h4-lmeval@.*, now it is h4-v1@"):
        evaluate(models / "one", config(small, limit=2, tasks=["mmlu"], protocol="h4-v1"), run)
    other = evaluate(models / "one", config(small, limit=2, tasks=["mmlu"], protocol="h4-v1"))
    assert other["value"].to_list() == first["value"].to_list()  # MMLU's questions are the same in both


def test_a_step_whose_tokenizer_adds_bos_unlike_the_base_models_is_refused(small, models, run, tmp_path):
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(models / "one", tmp_path / "one")
    _, tokenizer = load_model(tmp_path / "one")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "one")
    steps = steps_of(models, "one").with_columns(model=pl.lit(str(tmp_path / "one")))
    with pytest.raises(SdpoError, match=r"one adds BOS before a text, unlike the base model's"):
        evaluate(steps, config(small, limit=1, tasks=["truthfulqa_mc2"]), run)


# Tasks beside H4


@pytest.fixture
def other_tasks(tmp_path):
    """Folder with two tasks of one's own, one of choices and one that generates."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": f"Is it {row}?", "answers": choices(row, 3), "gold": row % 3} for row in range(5)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "own.jsonl")}}}
    common = {**data, "test_split": "test", "doc_to_text": "{{q}}", "metadata": {"version": 1}}
    choose = {"task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{answers}}",
              "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    kwargs = {"until": ["?"], "max_gen_toks": 4}
    write_it = {"task": "write_it", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}],
                "doc_to_target": "{{answers[0]}}", "generation_kwargs": kwargs}  # fmt: skip
    for task in (choose, write_it):
        ruamel.yaml.YAML().dump(common | task, folder / f"{task['task']}.yaml")
    return folder


def test_other_tasks_stand_beside_h4_and_are_lm_evals_own(small, models, run, other_tasks, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    names = ["mmlu", "choose", "write_it"]
    settings = config(small, limit=3, tasks=names, task_dir=str(other_tasks))
    results = evaluate(models / "one", settings, run)
    assert results.select("task", "metric", "n", "n_full").rows() == [
        ("mmlu", "acc", 3, 9), ("choose", "acc", 3, 5), ("choose", "acc_norm", 3, 5), ("write_it", "exact_match", 3, 5),
    ]  # fmt: skip
    check(results, RESULTS, "results")
    items = check(Run(run).items, ITEMS, "items")
    model, tokenizer = load_model(models / "one")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    theirs = oracle(lm, [str(other_tasks / "choose.yaml")], 3, tmp_path, monkeypatch)["choose"]
    ours = items.filter(task="choose").sort("item_id")
    for row, sample in zip(ours.iter_rows(named=True), theirs, strict=True):
        assert row["choice_logps"] == pytest.approx([logp for logp, _ in sample["filtered_resps"]], abs=1e-4)
        assert row["score"] == sample["acc"]
    assert results.filter(task="choose", metric="acc")["value"][0] == pytest.approx(100 * ours["score"].mean())
    assert results.filter(task="choose")["protocol"][0].startswith("lm-eval@")
    texts = dict(Run(run).questions.filter(~pl.col("task").is_in(list(h4.TASKS))).select("item_id", "text").rows())
    assert texts == {f"{task}/{row}": f"Is it {row}?" for task in ("choose", "write_it") for row in range(3)}
    monkeypatch.setattr(answers, "load_model", None)
    assert_frame_equal(evaluate(models / "one", settings, run), results)  # nothing is done a second time
    both = evaluate({"copy": models / "one"}, settings, run)  # nor for equal weights under another name
    own = [both.filter(arm=arm).drop("arm") for arm in ("base", "copy")]
    assert_frame_equal(*own)
    assert own[0].height == 4
    compared = compare_models(run, a="copy")  # tasks beside H4 stand among the contrasts, and in no mean
    assert compared.select("task", "effect").rows() == [("mmlu", 0.0), ("choose", 0.0), ("write_it", 0.0)]
    sides = [choose_models(Run(run).items, arm) for arm in ("copy", "base")]
    assert find_forgetting(*sides).select("task").unique().height == 3
    assert find_flips(find_changes(*sides, Run(run).questions)).is_empty()


def test_a_task_beside_h4_is_asked_anew_for_more_documents_and_never_for_fewer(
    small, models, run, answered, other_tasks, caplog
):
    def asked(limit, **more):
        settings = config(small, limit=limit, tasks=["truthfulqa_mc2", "choose"], task_dir=str(other_tasks))
        rows = evaluate(models / "one", settings, run, **more)
        return dict(rows.select("task", "n").rows()), len(Run(run).items.filter(task="choose"))

    assert asked(2) == ({"truthfulqa_mc2": 2, "choose": 2}, 2)
    assert asked(4) == ({"truthfulqa_mc2": 4, "choose": 4}, 4)
    assert len(answered) == 4  # H4's first two stand
    assert asked(None) == ({"truthfulqa_mc2": 5, "choose": 5}, 5)
    with caplog.at_level(logging.INFO):
        assert asked(3) == ({"truthfulqa_mc2": 3, "choose": 5}, 5)
    assert "other_tasks/base-0-0-choose was asked all documents, which stand; now it would be 3." in caplog.text
    assert Run(run).lineage["other_tasks/base-0-0-choose"]["recipe"]["limit"] is None
    assert len(answered) == 5
    assert asked(3, force=True) == ({"truthfulqa_mc2": 3, "choose": 3}, 3)
    other = config(small, tasks=["choose"], task_dir=str(other_tasks), dtype="bfloat16")
    with pytest.raises(SdpoError, match=r"other_tasks/base-0-0-choose was made with dtype = 'float32'"):
        evaluate(models / "one", other, run)


@pytest.mark.real
def test_a_task_that_is_none(small, models, run, other_tasks):
    with pytest.raises(SdpoError, match=r"eval.tasks has 'chose', which is neither of H4 nor of lm-eval.*choose"):
        evaluate(models / "one", config(small, tasks=["chose"], task_dir=str(other_tasks)), run)


def test_a_task_whose_data_is_out_of_reach(small, models, run, other_tasks):
    (other_tasks / "own.jsonl").unlink()
    with pytest.raises(SdpoError, match=r"The data of choose cannot be had: .* eval.task_dir"):
        evaluate(models / "one", config(small, tasks=["choose"], task_dir=str(other_tasks)), run)


def test_a_task_beside_h4_that_would_be_cut_is_refused(small, models, run, other_tasks):
    _, tokenizer = load_model(models / "one")
    rows = [json.loads(line) for line in (other_tasks / "own.jsonl").read_text().splitlines()]
    rows[1]["q"] = "a" * 600
    (other_tasks / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    longest = max(len(tokenizer(f"{rows[1]['q']} {answer}")["input_ids"]) for answer in rows[1]["answers"]) - 1
    choose, write_it = (config(small, tasks=[name], task_dir=str(other_tasks)) for name in ("choose", "write_it"))
    said = r"choose: 3 of 15 requests are longer than the 512 tokens that the model reads, the longest has {:,}\. Their"
    with pytest.raises(SdpoError, match=said.format(longest)):
        evaluate(models / "one", choose, run)
    said = r"write_it: 1 of 5 requests are longer than the 508 tokens that the model reads before the 4 it writes, the"
    with pytest.raises(SdpoError, match=said):
        evaluate(models / "one", write_it, run)
    assert Run(run).items.is_empty()
    few = evaluate(models / "one", config(small, tasks=["choose"], task_dir=str(other_tasks), limit=1), run)
    assert few["n"].to_list() == [1, 1]  # without the long one


def test_what_anyones_prefix_lm_cuts_is_said_once(models, caplog):
    lm = prefix_lm(*load_model(models / "one"))
    fits, longer = (("", ""), [7] * 510, [4, 5, 6]), (("", ""), [7] * 511, [4, 5, 6])  # 512 tokens are read, or 513
    lm._loglikelihood_tokens([fits, fits])
    assert not caplog.records
    lm._loglikelihood_tokens([fits, longer, fits])
    lm._loglikelihood_tokens([longer])
    [record] = caplog.records
    assert record.getMessage() == (
        "1 of 3 requests are longer than the 512 tokens that the model reads, the longest has 513: their beginnings "
        "are cut off, as by HFLM. Said once for this model."
    )


def test_anyones_simple_evaluate_on_the_prefix_engine(models):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(models / "one")
    long = list(range(3, 300)) * 2  # longer than the 512 tokens that the model reads: cut on the left, as HFLM does
    requests = [(("", ""), [5, 6, 7], [8]), (("", ""), [5, 6], [9, 10, 11]), (("", ""), long, [4, 5])]
    ours = prefix_lm(model, tokenizer)._loglikelihood_tokens(requests)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_in_bfloat16_it_stays_within_its_rounding_of_hflm(models):
    # 8 bits of mantissa: both ways are off by about 0.1 nats a token from float32 on this model of random weights, each
    # in its own way, as sums are ordered otherwise. Allowed are 0.1 nats a token between them, and no larger bias.
    import numpy as np
    from lm_eval.models.huggingface import HFLM

    draw = np.random.default_rng(0)
    context = draw.integers(3, 400, 120).tolist()
    requests = []
    for _ in range(12):
        question = context + draw.integers(3, 400, 20).tolist()
        requests += [(("", ""), question, draw.integers(3, 400, 1 + choice).tolist()) for choice in range(4)]
    tokens = np.array([len(answer) for _, _, answer in requests])

    def per_token(lm):
        return np.array([logp for logp, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]) / tokens

    exact, tokenizer = load_model(models / "one")
    half, _ = load_model(models / "one", "bfloat16")
    truth, theirs = (per_token(HFLM(pretrained=model, tokenizer=tokenizer)) for model in (exact, half))
    ours = per_token(prefix_lm(half, tokenizer))
    assert np.abs(ours - theirs).max() < 0.1
    assert np.abs(ours - truth).mean() < 1.5 * np.abs(theirs - truth).mean()
    assert np.abs(ours - truth).max() > 1e-3  # it did compute in bfloat16


@pytest.mark.real
def test_the_documented_example_gives_what_hflm_gives(models, other_tasks, tmp_path, monkeypatch):
    """The lines of its docstring, on tasks of one's own: choices, and a text's perplexity by rolling windows."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    text = {"task": "perplexity", "output_type": "loglikelihood_rolling", "doc_to_text": "", "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(other_tasks / "own.jsonl")}}, "test_split": "test",
            "doc_to_target": "{{answers|join(' and ')}}", "metric_list": [{"metric": "bits_per_byte"}]}  # fmt: skip
    ruamel.yaml.YAML().dump(text, other_tasks / "perplexity.yaml")
    tasks = [str(other_tasks / f"{name}.yaml") for name in ("choose", "perplexity")]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    example = textwrap.dedent(prefix_lm.__doc__.split("Example:\n")[1])
    example = example.replace('"my/model", "bfloat16"', repr(str(models / "one")))
    names: dict = {}
    exec(example.replace('["winogrande", "lambada_openai"]', repr(tasks)), names)
    hflm = HFLM(pretrained=names["lm"].model, tokenizer=names["lm"].tokenizer)
    theirs = lm_eval.simple_evaluate(model=hflm, tasks=tasks, limit=200)
    assert set(names["got"]["results"]) == {"choose", "perplexity"}
    for task, scores in theirs["results"].items():
        for name, value in scores.items():
            ours = names["got"]["results"][task][name]
            assert ours == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), (task, name)


def test_where_the_engine_does_not_apply_hflm_answers(models, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    asked = []
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", lambda self, requests, *_: asked.append(requests))
    lm = prefix_lm(*load_model(models / "one"))
    lm.backend = "seq2seq"
    lm._loglikelihood_tokens([(("", ""), [5], [8])])
    assert asked == [[(("", ""), [5], [8])]]


# The real model and data


@pytest.mark.real
@pytest.mark.parametrize("name", COUNTS)
def test_real_questions_are_lm_evals_own(name, shared_data, tmp_path, monkeypatch):
    task, data = h4.TASKS[name], shared_data / "benchmarks"
    documents = load_documents(task, str(data))
    files = [
        task_file(tmp_path, name, data, subject)
        for subject in (["anatomy", "world_religions"] if name == "mmlu" else [None])
    ]
    samples = oracle(dummy_lm(), files, 20, tmp_path, monkeypatch)
    for subject, theirs in samples.items():
        rows = [f"{subject}/{row}" for row in range(20)]
        ours = {item.item_id: asked(item) for item in write_items(task, documents, rows)}
        assert [ours[row] for row in rows] == [pairs_of(sample) for sample in theirs]
        assert [asked(item) for item in write_items(task, documents, rows[-1:])] == [pairs_of(theirs[-1])]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_real_question_is_lm_evals_own(name, shared_data, tmp_path, monkeypatch):
    task, data = h4.TASKS[name], shared_data / "benchmarks"
    documents = load_documents(task, str(data))
    subjects = sorted(documents) if name == "mmlu" else [None]
    files = [task_file(tmp_path, name, data, subject) for subject in subjects]
    samples = oracle(dummy_lm(), files, None, tmp_path, monkeypatch)
    theirs = {f"{subject}/{sample['doc_id']}": pairs_of(sample) for subject in samples for sample in samples[subject]}
    assert len(theirs) == task.n_full
    assert {item.item_id: asked(item) for item in write_items(task, documents, theirs)} == theirs


@pytest.mark.slow
def test_every_question_of_mmlu_is_the_same_in_both_protocols(shared_data):
    task = h4.TASKS["mmlu"]
    documents = load_documents(task, str(shared_data / "benchmarks"))
    every = [f"{subject}/{row}" for subject, splits in documents.items() for row in range(len(splits["test"]))]
    old = {item.item_id: item for item in h4_v1.write_items(task, documents, every)}
    assert len(old) == task.n_full
    assert {item.item_id: item for item in write_items(task, documents, every)} == old


@pytest.mark.real
def test_real_answers_are_lm_evals_own(shared_data, tmp_path, monkeypatch):
    # about 17,000 tokens for HFLM and 4,000 for the engine: a minute on two idle cores
    short, long = [("mmlu", "anatomy"), ("truthfulqa_mc2", None)], [("hellaswag", None), ("arc_challenge", None)]
    folder, data = "embedded:smollm2-135m", shared_data / "benchmarks"
    compare_with_lm_eval(folder, data, short, 5, tmp_path, monkeypatch)
    compare_with_lm_eval(folder, data, long, 1, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_many_real_answers_are_lm_evals_own(name, shared_data, tmp_path, monkeypatch):
    names = [(name, "anatomy" if name == "mmlu" else None)]
    moved = 1e-5 if name == "truthfulqa_mc2" else 1e-6  # a share of probability moves as log-probabilities do
    compare_with_lm_eval("embedded:smollm2-135m", shared_data / "benchmarks", names, 25, tmp_path, monkeypatch, moved)
