"""Publish an adapter on the hub.

    python -m rlg.push --ckpt runs/NAME/checkpoint-N --repo USER/NAME --private

It uploads the PEFT folder, the diffusers file, the model card and the evaluations' curves. The trainer's state, the
config and the images stay here. A token is needed: `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import huggingface_hub

from rlg.io import public_names
from rlg.io.run_folder import CARD, CURVES, EVALUATIONS
from rlg.models import adapter_files, hub
from rlg.publishing import hub_names, model_card


def check_token() -> None:
    """Raise ValueError where nothing can be pushed.

    There is no token, or the hub's libraries are told to stay offline.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError("pushing needs the hub, and HF_HUB_OFFLINE is set")
    if not huggingface_hub.get_token():
        raise ValueError("pushing needs a token of the hub: `hf auth login`, or the variable HF_TOKEN")


def push(checkpoint: Path, repo: str, private: bool = False, license: str | None = None) -> str:
    """Upload a checkpoint in one commit; return the repository's address.

    A new repository is created.

    repo: NAME in the token's own namespace, or USER/NAME. license: see `model_card.write`, which brings the card here
    up to date too. Raises ValueError for a folder that is no checkpoint, a missing token, and a refusal of the hub.
    """
    if not model_card.files(checkpoint):
        adapter_files.check_no_run(checkpoint)
        raise ValueError(f"{checkpoint} is no checkpoint with an adapter in both formats; a trainer writes one")
    hub_names.check_license(license)
    hub_names.check_repo(repo)
    check_token()
    model_card.write(checkpoint, license=license)
    with tempfile.TemporaryDirectory(prefix="rlg-push-") as place:
        stage(checkpoint, Path(place))
        api = huggingface_hub.HfApi(library_name="rlg")
        try:
            made = api.create_repo(repo, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=made.repo_id, folder_path=place, commit_message=f"Upload {checkpoint.name}")
        except Exception as error:  # the hub may raise anything
            again = f"python -m rlg.push --ckpt {checkpoint} --repo {repo}{' --private' if private else ''}"
            raise ValueError(f"cannot push to {repo}: {hub.short(error)}; to try again: {again}") from error
    return str(made)


def stage(checkpoint: Path, place: Path) -> None:
    """Copy the files that are published into an empty folder.

    They are the files of the checkpoint, and of its evaluations in eval/ID. The adapter names its base where that has
    a public name; see `rlg.io.public_names`.
    """
    for name in model_card.files(checkpoint):
        (place / name).parent.mkdir(exist_ok=True)
        public_names.copy_adapter(checkpoint / name, place / name)
    if not model_card.is_users(checkpoint):
        card = model_card.render(checkpoint, checkpoint.resolve().name, model_card.stated(checkpoint), EVALUATIONS)
        (place / CARD).write_text(card, encoding="utf-8", errors="replace")
    for evaluated in model_card.evaluations(checkpoint):
        if (evaluated.folder / CURVES).is_file():
            folder = place / EVALUATIONS / evaluated.folder.name
            folder.mkdir(parents=True)
            shutil.copyfile(evaluated.folder / CURVES, folder / CURVES)
