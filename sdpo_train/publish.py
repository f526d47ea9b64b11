"""The last model of an arm once more, for others: in the dtype asked for, with its card, and on the hub if asked."""

import hashlib
import logging
import shutil
from pathlib import Path

from sdpo_data.models import load_model, save_model
from sdpo_data.run import write_atomically

log = logging.getLogger(__name__)

CARD = "README.md"


def publish(model: Path, out: Path, dtype: str) -> None:
    """Write a model in another dtype, by itself; `copy_card` brings its card.

    The float32 weights that steps hand on stay where they are: in bfloat16 most small updates round
    away, which is why only what is published may lose them.

    Args:
        model: folder of the last step.
        out: folder to write.
        dtype: of the weights to write.
    """

    def write(folder: Path) -> None:
        loaded, tokenizer = load_model(model, dtype)
        save_model(loaded, tokenizer, folder)

    write_atomically(out, write)


def copy_card(model: Path, out: Path) -> None:
    """Have the published model tell what the card beside the step's weights tells: H4 comes after training."""
    if (model / CARD).exists():
        write_atomically(out / CARD, lambda part: shutil.copyfile(model / CARD, part))


def hash_card(out: Path) -> str | None:
    """Name what a published card says, to know whether the hub has it; None where there is none."""
    return hashlib.sha256((out / CARD).read_bytes()).hexdigest()[:32] if (out / CARD).exists() else None


def upload(folder: Path, repository: str) -> None:
    """Upload a published model to a hub repository, which is created, private, if there is none."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repository, private=True, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=str(folder))
    log.info("uploaded %s to %s", folder, repository)
