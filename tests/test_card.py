"""The model card: what it says of a run, read back by the hub's own library; nothing from data is markup."""

import html
import json
import re
import shutil
import subprocess
import sys

import huggingface_hub
import polars as pl
import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from made_run import KEYS, make_run

from sdpo_data.models import model_key
from sdpo_data.run import Run
from sdpo_data.tables import SdpoError
from sdpo_train.card import _plain, make_card, write_card, write_cards
from tests.conftest import ROOT

CONFIG = "model: {model}\npairs: {{source: {sources}}}\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made, tmp_path) -> Run:
    return Run(shutil.copytree(made, tmp_path / "run"))


def configure(run, model="my-org/my-sft", sources="[embedded:alpaca-eval, 'allenai/ultra:train', data/mine.jsonl]"):
    (run.path / "config.yaml").write_text(CONFIG.format(model=model, sources=sources))


def test_the_hub_reads_the_card_back(run):
    configure(run)
    path = write_card(run, "sdpo", 0, license="apache-2.0")
    assert path == run.path / "arms/sdpo/seed_0/step_2/README.md"
    card = ModelCard.load(path)
    assert card.data.base_model == "my-org/my-sft"
    assert card.data.datasets == ["tatsu-lab/alpaca_eval", "allenai/ultra"]  # a file is no dataset of the hub
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.model_name == "my-sft-sdpo"
    results = run.results.filter(arm="sdpo", step=2)
    found = {result.dataset_type: result for result in card.data.eval_results}
    assert len(found) == 4  # the mean of the four is no dataset
    arc = results.filter(task="arc_challenge").row(0, named=True)
    got = found["allenai/ai2_arc"]
    assert got.metric_value == pytest.approx(arc["value"], abs=1e-4)
    assert got.metric_args == {"protocol": arc["protocol"], "n": 60, "stderr": arc["stderr"]}
    assert got.dataset_name == "ARC-Challenge (60 of 1,172 questions)"
    assert (got.dataset_config, got.dataset_split, got.dataset_args) == ("ARC-Challenge", "test", {"num_few_shot": 25})


def test_the_chain_and_the_scores_are_in_the_text(run):
    text = make_card(run, "sdpo", 0).text
    steps = run.steps.filter(arm="sdpo")
    rows = [line for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    for line, step in zip(rows, steps.iter_rows(named=True), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == str(step["pairs"])
        assert cells[3:6] == [f"`{step[name][:12]}`" for name in ("start_key", "reference_key", "model_key")]
        assert cells[6] == f"{step['first_loss']:.4f} to {step['last_loss']:.4f}"
        assert cells[7:] == ["2.1e-05", f"{step['margin_ref_mean']:+.2f}"]
    own, base = (
        run.results.filter(arm=arm, step=step, task="h4").row(0, named=True) for arm, step in list(KEYS)[2::-2]
    )
    h4 = next(line for line in text.splitlines() if line.startswith("| h4 |"))
    assert f"| {own['value']:.2f} ± {own['stderr']:.2f} | {base['value']:.2f} | 285 of 26,073 |" in h4
    assert "Limited run: only some of the questions of arc\\_challenge, h4," in text
    assert "arXiv 2403.19270" in text
    assert "trl 1.16.0" in text


def test_settings_that_differ_between_steps_are_told_in_their_order(run):
    lineage = run.lineage
    first = lineage["arms/sdpo/seed_0/step_1"]
    first["recipe"] = {"beta": 0.1, "loss": ["sigmoid"], "learning_rate": 5e-7, "start": "5a", "reference": "5a"}
    lineage["arms/sdpo/seed_0/step_2"] = first | {"recipe": first["recipe"] | {"beta": 0.2}}
    (run.path / "lineage.json").write_text(json.dumps(lineage))
    text = make_card(run, "sdpo", 0).text
    assert "| beta | 0.1, then 0.2 |" in text
    assert "| learning\\_rate | 5e-07 |" in text
    assert "| loss | \\['sigmoid'\\] |" in text
    assert "| start | 5a |" not in text


def test_a_run_that_was_not_evaluated_says_so_and_has_no_scores(run):
    (run.path / "results.parquet").unlink()
    card = make_card(run, "dpo", 0)
    assert card.data.eval_results is None
    assert card.data.license is None
    assert "This model was not evaluated." in card.text
    assert "No licence is stated for this model." in card.text
    assert "CC BY-NC" not in card.text  # config.yaml names no source of ours


def test_a_licence_that_is_known_is_told(run):
    configure(run, model="embedded:smollm2-135m", sources="[embedded:alpaca-eval/claude, embedded:alpaca-eval]")
    card = make_card(run, "sdpo", 0)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.license is None
    assert "Apache-2.0" in card.text
    assert "CC BY-NC 4.0: not for commercial use" in card.text


def test_folders_of_this_machine_are_not_told(run):
    configure(run, model="/home/someone/secret/my-model", sources="[/home/someone/pairs.jsonl]")
    card = make_card(run, "sdpo", 0)
    assert card.data.base_model is None
    assert "someone" not in card.content
    assert "from my-model." in card.text


def test_text_from_data_is_shown_as_it_is(run):
    evil = "<script>x</script>|[a](http://b)\n---\n# *c* `d` \\"
    pairs = run.pairs.with_columns(source=pl.when(pl.col("source") == "piqa").then(pl.lit(evil)).otherwise("source"))
    pairs.write_parquet(run.path / "pairs.parquet")
    order = run.partition.with_columns(source=pl.lit(evil))
    order.write_parquet(run.path / "arms/sdpo/seed_0/partition.parquet")
    card = ModelCard.load(write_card(run, "sdpo", 0))
    shown = "&lt;script&gt;x&lt;/script&gt;\\|\\[a\\]\\(http://b\\) --- \\# \\*c\\* \\`d\\` \\\\"
    assert f"- {shown}: " in card.text
    assert "<script>" not in card.text
    chain = next(line for line in card.text.splitlines() if line.startswith("| 1 |"))
    assert f"| {shown} 80 |" in chain
    assert len([at for at, char in enumerate(chain) if char == "|" and chain[at - 1] != "\\"]) == 10  # nine cells


@given(st.text("ab *_#<>&|[](){}`~!\\\\-+=1.:/$\\n\\té", max_size=30))
def test_any_text_comes_through_markdown_as_it_is(text):
    from markdown_it import MarkdownIt

    cell = MarkdownIt("commonmark").enable("table").render(f"| x | y |\n| --- | --- |\n| {_plain(text)} | end |\n")
    cells = re.findall(r"<td>(.*?)</td>", cell)
    shown = " ".join(text.split())
    assert [html.unescape(one) for one in cells] == [shown, "end"]
    item = MarkdownIt("commonmark").render(f"- {_plain(text)}: 5\n")
    assert html.unescape(item) == f"<ul>\n<li>{shown}: 5</li>\n</ul>\n"


def test_writing_again_changes_nothing_and_new_scores_change_it(run):
    path = write_card(run, "sdpo", 0)
    before = path.stat().st_mtime_ns
    assert write_card(run, "sdpo", 0).stat().st_mtime_ns == before
    (run.path / "results.parquet").unlink()
    assert write_card(run, "sdpo", 0).stat().st_mtime_ns != before


def test_a_card_does_not_change_what_the_model_is(run, tiny_model):
    folder = shutil.copytree(tiny_model, run.path / "arms/sdpo/seed_0/step_2", dirs_exist_ok=True)
    before = model_key(folder)
    write_card(run, "sdpo", 0)
    assert model_key(folder) == before


def test_what_is_not_there_has_no_card(run):
    with pytest.raises(SdpoError, match="no finished step of arm 'sdpo' with seed 5"):
        make_card(run, "sdpo", 5)
    shutil.rmtree(run.path / "arms/dpo/seed_0/step_1")
    with pytest.raises(SdpoError, match=r"no model folder .*step_1"):
        write_card(run, "dpo", 0)


def publish_and_upload(run, arm, step, repository, finished):
    """Have lineage and folders say that a model was published, and uploaded; its weights are not read."""
    key = run.steps.filter(arm=arm, step=step)["model_key"].item()
    (run.path / f"arms/{arm}/seed_0/published").mkdir()
    recipe = {"model": key, "export_dtype": "bfloat16"}
    told = {"uploaded": recipe | {"repository": repository, "card": "before"}, "published": recipe}
    units = {
        f"arms/{arm}/seed_0/{what}": {"recipe": recipe, "inputs": {}, "outputs": [], "sha256": {}, "finished": finished}
        for what, recipe in told.items()
    }
    (run.path / "lineage.json").write_text(json.dumps(run.lineage | units))


@pytest.fixture
def uploads(monkeypatch):
    """What a hub that is not there was asked for: [(method, arguments by name)]."""
    asked = []

    class Hub:
        def __getattr__(self, name):
            return lambda **given: asked.append((name, given))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return asked


def test_the_command_tells_every_finished_arm_anew(run, run_command, uploads):
    """Unasked nothing goes to the hub, though it has been there; an arm with a step to go has no card yet."""
    publish_and_upload(run, "sdpo", 2, "me/model", "2026-01-02T03:04:05Z")
    order = run.path / "arms/dpo/seed_0/partition.parquet"
    pl.read_parquet(order).with_columns(step=pl.lit(2, pl.Int64)).write_parquet(order)
    code, out, err = run_command("sdpo_train.card", run.path)
    folder = run.path / "arms/sdpo/seed_0"
    assert (code, out.split()) == (0, [str(folder / f"{place}/README.md") for place in ("step_2", "published")])
    assert "dpo seed 0: 1 of 2 steps are finished, so there is no card yet" in err
    assert not (run.path / "arms/dpo/seed_0/step_1/README.md").exists()
    h4 = run.results.filter(arm="sdpo", step=2, task="h4")["value"].item()
    for place in ("step_2", "published"):
        assert f"| h4 | mean | {h4:.2f}" in (folder / place / "README.md").read_text()
    assert run_command("sdpo_train.card", run.path)[:2] == (0, f"up to date: {run.path / 'arms'}\n")
    assert uploads == []


def test_a_published_copy_of_an_earlier_training_keeps_its_card(run):
    publish_and_upload(run, "sdpo", 1, "me/model", "2026-01-02T03:04:05Z")
    write_card(run, "sdpo", 0)
    assert not (run.path / "arms/sdpo/seed_0/published/README.md").exists()


def test_a_repository_gets_the_card_of_the_model_it_holds(run, uploads, caplog):
    write_cards(run, "me/model")
    assert "No finished model of" in caplog.text
    publish_and_upload(run, "dpo", 1, "me/model", "2026-01-02T03:04:06Z")
    publish_and_upload(run, "sdpo", 2, "me/model", "2026-01-02T03:04:05Z")
    for _ in range(2):
        write_cards(run, "me/model")
    path = str(run.path / "arms/dpo/seed_0/published/README.md")
    assert uploads == [
        ("upload_file", {"repo_id": "me/model", "path_or_fileobj": path, "path_in_repo": "README.md"})
    ]  # fmt: skip


def test_the_command_needs_no_torch_and_a_run(run, tmp_path):
    code = "import runpy, sys; runpy.run_module('sdpo_train.card', run_name='__main__'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, run.path], cwd=ROOT, capture_output=True, text=True, check=False)
    *cards, torch = done.stdout.split()
    assert (done.returncode, len(cards), torch) == (0, 2, "False"), done.stderr
    (tmp_path / "empty").mkdir()
    with pytest.raises(SdpoError, match=r"has no arm whose last step is finished.*python -m sdpo_train"):
        write_cards(Run(tmp_path / "empty"))
