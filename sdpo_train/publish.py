"""The last model of an arm once more, for others: in the dtype asked for, with its card, and on the hub if asked."""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

from sdpo_data.models import load_model, save_model
from sdpo_data.run import Run, write_atomically

log = logging.getLogger(__name__)

CARD = "README.md"


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
        if (model / CARD).exists():
            shutil.copyfile(model / CARD, folder / CARD)

    write_atomically(out, write)


def upload(run: Run, chain: str, repository: str, *, force: bool = False) -> None:
    """Upload a published model to a hub repository, which is created, private, if there is none: once.

    Where the repository has it already, and only its card says more since, the card alone goes there.

    Args:
        chain: whose model, as arms/<arm>/seed_<s>.
        force: upload what is there already.

    Raises:
        SdpoError: other weights of this chain, or to another repository, were uploaded (and not `force`).
    """
    if not force and upload_card(run, chain, repository):
        return
    from huggingface_hub import HfApi

    folder = run.path / chain / "published"
    with run.stage(f"{chain}/uploaded", _declared(run, chain, repository), force=force) as stage:
        if not stage.current:
            hub = HfApi()
            hub.create_repo(repository, private=True, exist_ok=True)
            hub.upload_folder(repo_id=repository, folder_path=str(folder))
            log.info("uploaded %s to %s", folder, repository)


def upload_card(run: Run, chain: str, repository: str) -> bool:
    """Upload the card alone of a model that a hub repository has, if it is not the one that was uploaded.

    Returns:
        Whether it was.
    """
    unit, numbers = f"{chain}/uploaded", _declared(run, chain, repository)
    before = run.lineage.get(unit, {}).get("recipe", {})
    if before == numbers or before | {"card": numbers["card"]} != numbers:
        return False
    from huggingface_hub import HfApi

    path = run.path / chain / "published" / CARD
    with run.stage(unit, numbers, force=True):
        HfApi().upload_file(repo_id=repository, path_or_fileobj=str(path), path_in_repo=CARD)
        log.info("uploaded %s to %s", path, repository)
    return True


def _declared(run: Run, chain: str, repository: str) -> dict[str, Any]:
    """Say what the hub is to have: the published weights, by what made them, and the card, by a hash of its text."""
    card = run.path / chain / "published" / CARD
    text = hashlib.sha256(card.read_bytes()).hexdigest()[:32] if card.exists() else None
    made = run.lineage.get(f"{chain}/published", {}).get("recipe", {})
    return made | {"repository": repository, "card": text}
