"""The folder that the demo leaves behind."""

import shutil
from pathlib import Path

from backboned.registry.errors import invalid

MARK = ".backboned-demo"


def fresh_folder(folder: Path) -> Path:
    """Make `folder` and return its absolute path; what an earlier demo left there is removed.

    Raises `BackbonedError` if it holds anything else.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise invalid(f"{folder} is a file: name another folder with --output")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise invalid(f"{folder} isn't empty and no earlier demo made it: name another with --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("Made by `backboned demo`, which replaces this folder when it runs again.\n")
    return folder
