"""The last model of an arm once more, for others: in the dtype asked for, with its card, and on the hub if asked."""

import logging
import shutil
from pathlib import Path

from sdpo_data.models import load_model, save_model
from sdpo_data.run import write_atomically

log = logging.getLogger(__name__)


def publish(model: Path, out: Path, dtype: str) -> None:
    """Write a model in another dtype, with the card that lies beside it.

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
        if (model / "README.md").exists():
            shutil.copy2(model / "README.md", folder / "README.md")

    write_atomically(out, write)


def upload(folder: Path, repository: str) -> None:
    """Upload a published model to a hub repository, which is created, private, if there is none."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repository, private=True, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=str(folder))
    log.info("uploaded %s to %s", folder, repository)
