"""Checkpoints inside a step: which are whole, of which work, and what an interrupted step goes on from.

transformers writes a checkpoint file by file. It counts here only once it is sealed: a list of its
files with their checksums, and the key of the work it belongs to, written last. What a kill left
half written, what was damaged since, and what another recipe left is never resumed.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import xxhash

from sdpo_data.run import write_atomically

log = logging.getLogger(__name__)

SEAL = "sealed.json"


def seal(checkpoint: Path, work_key: str, facts: dict[str, Any]) -> None:
    """Declare a checkpoint whole, and remove those before it.

    Args:
        checkpoint: folder that transformers has just finished writing.
        work_key: of the work it is part of, see `StepWork.key`.
        facts: what was proved before it and is needed after it, such as the start gap.
    """
    content = {"work": work_key, "files": _sums(checkpoint), "facts": facts}
    write_atomically(checkpoint / SEAL, lambda temporary: temporary.write_text(json.dumps(content, indent=1)))
    for other in _checkpoints(checkpoint.parent):
        if other != checkpoint:
            shutil.rmtree(other, ignore_errors=True)


def newest(folder: Path, work_key: str) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint to go on from, with its facts; the others are removed, and why is said."""
    found = None
    for checkpoint in _checkpoints(folder):
        why_not = "a later one is whole" if found else _problem(checkpoint, work_key)
        if why_not is None:
            found = checkpoint, json.loads((checkpoint / SEAL).read_text())["facts"]
            continue
        log.info("%s is not resumed: %s", checkpoint, why_not)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return found


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the latest update first."""
    named = [path for path in folder.glob("checkpoint-*") if path.name.rsplit("-", 1)[-1].isdigit()]
    return sorted(named, key=lambda path: -int(path.name.rsplit("-", 1)[-1]))


def _problem(checkpoint: Path, work_key: str) -> str | None:
    try:
        content = json.loads((checkpoint / SEAL).read_text())
        if content["work"] != work_key:
            return "it belongs to other settings, pairs or weights"
        sums = _sums(checkpoint)
        damaged = sorted(name for name in content["files"] if content["files"][name] != sums.get(name))
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its list of files cannot be read ({type(error).__name__})"
    return f"{damaged[0]} is damaged or missing" if damaged else None


def _sums(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    return {str(path.relative_to(checkpoint)): _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    summed = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**24):
            summed.update(block)
    return summed.hexdigest()
