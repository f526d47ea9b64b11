"""Documents of H4's tasks: where they come from, whether they are the published ones, and their fingerprint."""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import zlib
from pathlib import Path
from typing import Any

from sdpo_data import assets
from sdpo_data.tables import SdpoError
from sdpo_eval.h4 import Task

log = logging.getLogger(__name__)

LM_EVAL = "0.4.13"
V1_COMMIT = "b281b09"  # of lm-eval, that the Open LLM Leaderboard v1 ran
SHOTS_SEED = {"h4-lmeval": 1234, "h4-v1": 42}  # simple_evaluate's default; the old evaluator's own
BOS = {"h4-lmeval": "tokenizer", "h4-v1": "never"}  # "tokenizer": where it adds one by default, as HFLM does

Documents = dict[str, dict[str, list[dict[str, Any]]]]
"""subject -> split -> documents in file order. MMLU has 57 subjects, the other tasks one: themselves."""

PROCESSED = ("query", "choices", "gold")  # HellaSwag's train file, which lm-eval's preprocess has been through


def load_documents(task: Task, data_dir: str, truthfulqa: str = "truthfulqa/truthful_qa") -> Documents | None:
    """Read a task's documents, shots included, with the fields that the task reads.

    Args:
        task: one of TASKS.
        data_dir: "hub", embedded:NAME, or a folder that holds `task.files`.
        truthfulqa: where TruthfulQA comes from if not from `data_dir`: a file, or a hub id.

    Returns:
        The documents; None, with a warning, for TruthfulQA on a hub that does not answer.

    Raises:
        SdpoError: a file is missing or cannot be read, or its rows are not the published ones.
    """
    folder = None if data_dir == "hub" else assets.benchmark_folder(data_dir)
    if task.name == "truthfulqa_mc2" and not (folder and (folder / task.files[task.split]).exists()):
        return _truthfulqa(task, truthfulqa)
    if folder is None:
        return _grouped(task, _from_hub(task, task.hub[0]), task.hub[0])
    return _grouped(task, {split: _read(folder / file, task) for split, file in task.files.items()}, str(folder))


def _truthfulqa(task: Task, source: str) -> Documents | None:
    if Path(source).suffix in (".gz", ".jsonl") or Path(source).is_file():
        return _grouped(task, {task.split: _read(Path(source), task)}, source)
    try:
        return _grouped(task, _from_hub(task, source), source)
    except SdpoError:
        try:
            assets.require_hub(f"TruthfulQA ({source})")
        except SdpoError as silence:
            log.warning("TruthfulQA is not asked, and H4 needs it. %s For it, name a file in eval.truthfulqa.", silence)
            return None
        raise  # the hub answers: it is the name that is wrong


def _from_hub(task: Task, repo: str) -> dict[str, list[dict[str, Any]]]:
    return {split: assets.hub_dataset(repo, task.hub[1], split).to_list() for split in task.files}


def _read(path: Path, task: Task) -> list[dict[str, Any]]:
    if not path.exists():
        raise SdpoError(f"{path} does not exist; {task.title} is read from it. See eval.data_dir and eval.truthfulqa.")
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SdpoError(f"{path} cannot be read as JSON lines: {error}. Fetch it again.") from None


def _grouped(task: Task, splits: dict[str, list[dict[str, Any]]], place: str) -> Documents:
    """Keep what the task reads, sort documents under their subjects, and refuse half a task."""
    documents: Documents = {}
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            if all(field in row for field in task.fields):
                document = {field: row[field] for field in task.fields}
            elif task.name == "hellaswag" and all(field in row for field in PROCESSED):
                document = {"query": row["query"], "choices": row["choices"], "label": str(row["gold"])}
            else:
                raise SdpoError(
                    f"{place}: row {number} of {task.title}'s {split} documents lacks one of {', '.join(task.fields)}."
                )
            subject = document.get("subject", task.name)
            documents.setdefault(subject, {name: [] for name in task.files})[split].append(document)
    _refuse_unpublished(task, documents, place)
    return documents


def _refuse_unpublished(task: Task, documents: Documents, place: str) -> None:
    """Refuse what is not the published task: a missing row or subject, another text, too few shots."""
    for split, (rows, checksum) in task.published.items():
        texts = [text for subject in sorted(documents) for text in map(_essence, documents[subject][split])]
        remedy = "Its scores would be those of another test; fetch the whole of it again."
        if len(texts) != rows:
            subjects = f" in {len(documents)} subjects" if task.name == "mmlu" else ""
            raise SdpoError(
                f"{place} holds {len(texts):,} {split} documents of {task.title}{subjects}, "
                f"the task has {rows:,}. {remedy}"
            )
        found = hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
        raw_shots = task.name == "hellaswag" and split != task.split and "endings" in documents[task.name][split][0]
        if found != checksum and not raw_shots:  # the hub's own HellaSwag train texts: only the processed are pinned
            raise SdpoError(
                f"{place}: {task.title}'s {split} documents have checksum {found}, "
                f"the published ones {checksum}. {remedy}"
            )
    for subject, splits in documents.items():
        for split, shots in splits.items():
            if split != task.split and len(shots) < task.shots:
                raise SdpoError(
                    f"{place} holds {len(shots)} {split} documents of {subject}, which needs {task.shots} shots. "
                    "Fetch the whole of it again."
                )


def _essence(document: dict[str, Any]) -> str:
    """Write a document as a line that is the same wherever it comes from."""
    parts = {name: value for name, value in document.items() if name != "label"}
    if "answerKey" in document:  # ARC: 1-5 on the hub where the embedded copy has A-E
        parts |= {"choices": document["choices"]["text"], "answerKey": gold_choice(document)}
    if "label" in document:
        parts["label"] = int(document["label"])
    return json.dumps(parts, sort_keys=True, ensure_ascii=False) + "\n"


def gold_choice(document: dict[str, Any]) -> int:
    """Place of ARC's right answer among its choices."""
    return document["choices"]["label"].index(document["answerKey"])


def document_text(document: dict[str, Any]) -> str:
    """Give what a document asks as plain text, without shots and choices; HellaSwag's is the story so far."""
    if "question" in document:
        return document["question"]
    return f"{document['ctx_a']} {document['ctx_b'].capitalize()}".strip()


def fingerprint(protocol: str, task: Task, documents: Documents, dtype: str) -> str:
    """Name what a task asks and how it is scored, as `protocol@hash`: the same name, the same question.

    The hash is over lm-eval's version and its files that define the task (h4-v1: its commit), the
    shots and their seed, the documents as they are read, the BOS rule and the dtype; it needs no
    import of lm-eval.

    Raises:
        SdpoError: the protocol is h4-lmeval, and lm-eval is missing or not its version.
    """
    content = hashlib.sha256()
    for subject, splits in sorted(documents.items()):
        content.update(json.dumps([subject, splits], sort_keys=True, ensure_ascii=False).encode())
    definition = [V1_COMMIT] if protocol == "h4-v1" else [LM_EVAL, _definition(protocol, task)]
    rule = [protocol, *definition, task.shots, SHOTS_SEED[protocol], task.metric, content.hexdigest()]
    digest = hashlib.sha256(json.dumps([*rule, BOS[protocol], dtype]).encode()).hexdigest()
    return f"{protocol}@{digest[:12]}"


def _definition(protocol: str, task: Task) -> list[tuple[str, str]]:
    """Give each of lm-eval's files that define the task, with its sha256."""
    spec = importlib.util.find_spec("lm_eval")
    version = importlib.metadata.version("lm_eval") if spec else "missing"
    if not spec or not spec.origin or version != LM_EVAL:
        raise SdpoError(f"{protocol} is defined by lm-eval {LM_EVAL}; here it is {version}. pip install 'sdpo[eval]'.")
    folder = Path(spec.origin).parent / "tasks"
    return [
        (str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest())
        for source in task.sources
        for path in sorted(folder.glob(source))
    ]
