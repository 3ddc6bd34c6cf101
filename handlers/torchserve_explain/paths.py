"""Where the project's files lie: in a checkout, or beside an installed package and in the current folder."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
HANDLER = PACKAGE.parent / "explain_handler.py"
_ABOVE = PACKAGE.parents[1]
CHECKOUT = _ABOVE if PACKAGE.parent.name == "handlers" and (_ABOVE / "pyproject.toml").is_file() else None
ROOT = CHECKOUT or Path.cwd()  # holds classifiers/, model_store/, run/
STORE = ROOT / "model_store"


def packaged(name: str) -> Path:
    """Return a file or folder that the project brings: a checkout's own, or what the wheel put into the package."""
    return (CHECKOUT or PACKAGE / "files") / name


def classifier_folder(name: str) -> Path:
    """Return the folder of a classifier's parts, which need not exist; the project brings that of `imagenet`."""
    folders = (ROOT / "classifiers" / name, packaged("classifiers") / name)
    return next((folder for folder in folders if folder.exists()), folders[0])
