"""What LLaMA-Factory, axolotl and OpenRLHF read in our export, by their own code out of their own pinned wheels."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_export import LORA, SMALL, exported_ids, partition  # noqa: F401 - a fixture

from sdpo_data.assets import Wheel, _verified, cache_folder
from sdpo_data.encode import encode_pairs
from sdpo_data.export import ExportConfig, export_steps
from sdpo_data.models import load_tokenizer
from sdpo_data.tables import SdpoError

pytestmark = pytest.mark.real

WHEELS = {
    "llama_factory": Wheel(
        "llamafactory-0.9.5-py3-none-any.whl",
        "10776e9b259798bf65f6c5343f6298f0302e92e9cd47472abe29eef69e286c6a", 1, "LLaMA-Factory, for a test",
    ),
    "axolotl": Wheel(
        "axolotl-0.19.0-py3-none-any.whl",
        "f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc", 2, "axolotl, for a test",
    ),
    "openrlhf": Wheel(
        "openrlhf-0.11.2-cp311-cp311-manylinux1_x86_64.whl",
        "c969d70db03a70724c3d8a5a01186c6e0728bce624fb3dff95e39b5396acefa6", 1, "OpenRLHF, for a test",
    ),
}  # fmt: skip


@pytest.fixture
def probe(tmp_path, pairs, partition, tiny_model):  # noqa: F811
    """Export for a trainer and read every step by its own code: the probe's JSON, and the pairs and model wanted."""

    def probe(name: str, *, lora: bool = False) -> list[dict]:
        folder = cache_folder() / "trainers"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            wheel = _verified(WHEELS[name], folder)
        except SdpoError as error:
            pytest.skip(f"the wheel of {name} cannot be had: {error}")
        zipfile.ZipFile(wheel).extractall(tmp_path / "code")
        code = next((tmp_path / "code").glob("*.data/purelib"), tmp_path / "code")
        training = LORA if lora else SMALL
        export_steps(pairs, partition, str(tiny_model), tmp_path / "export", ExportConfig(to=[name]), training)
        script = str(Path(__file__).with_name("trainer_probes.py"))
        call = [sys.executable, script, name, str(code), str(tiny_model)]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(call, cwd=tmp_path / "export", env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
        read = json.loads(found.removeprefix("FOUND "))
        assert len(read) == partition["step"].n_unique() == 2
        starts = [str(tiny_model), f"models/{name}/step_1"]  # S, then what the step before wrote
        ids = [exported_ids(tmp_path / "export", step) for step in (1, 2)]
        return [one | {"wanted": own, "start": start} for one, own, start in zip(read, ids, starts, strict=True)]

    return probe


@pytest.fixture
def texts(pairs, tiny_model):
    """Prompt and answer of each pair as they were scored."""
    tokenizer = load_tokenizer(tiny_model)
    encoded = encode_pairs(pairs, tokenizer, 1024, "drop")

    def texts(ids: list[str], side: str, *, prompt: bool) -> list[str]:
        rows = {row["pair_id"]: row for row in encoded.iter_rows(named=True)}
        return [tokenizer.decode((rows[i]["prompt_ids"] if prompt else []) + rows[i][f"{side}_ids"]) for i in ids]

    return texts


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_llama_factory_reads_our_texts_in_order(probe, texts, lora):
    for found in probe("llama_factory", lora=lora):
        assert found["texts"] == texts(found["wanted"], "chosen", prompt=True)
        assert found["rejected"] == texts(found["wanted"], "rejected", prompt=False)
        assert (found["disable_shuffling"], found["beta"]) == (True, 0.1)
        assert (found["model"], found["ref_model"]) == (found["start"], None if lora else found["start"])
        assert (found["new"], found["rank"]) == ((True, 4) if lora else (False, 8))


def test_axolotl_reads_our_pairs_in_order_and_samples_them_so(probe, pairs):
    for found in probe("axolotl"):
        assert found["unknown"] == []
        assert found["ids"] == found["wanted"]
        first = pairs.filter(pair_id=found["wanted"][0]).row(0, named=True)
        assert found["first"]["prompt"] == json.loads(first["prompt"])  # not rendered: TRL does that
        assert (found["sampling"], found["beta"], found["model"]) == ("sequential", 0.1, found["start"])


def test_openrlhf_reads_our_texts_in_order_by_our_script_alone(probe, texts):
    for found in probe("openrlhf"):
        read = texts(found["wanted"], "chosen", prompt=True)
        wanted = [text.rstrip("\n") for text in read]  # it cuts a last line end
        assert found["texts"] == wanted
        assert (found["sampler"], found["beta"], found["epochs"]) == ("SequentialSampler", 0.1, 1)
        assert found["models"] == [found["start"]] * 2  # the policy, and the reference
        assert found["without"]["sampler"] == "RandomSampler"
        assert sorted(found["without"]["texts"]) == sorted(wanted)
