"""The report of a version: a page, and its figures, beside the checkpoints."""

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, ErrorKind

REPORT_NAME = "report.html"
EVALUATION_NAME = "evaluation.json"
MAX_REPORT_BYTES = 32 * 2**20


def read_report(directory: CheckpointDirectory, model: str, version: int | None = None) -> tuple[int, str]:
    """A version and its page; of the newest version that has one, unless `version` names another.

    Raises `BackbonedError`: `NOT_FOUND` if there is none, `DATA_LOSS` if it is no page of ours. Reads a file.
    """
    for number in reversed(directory.versions(model)) if version is None else [version]:
        path = directory.version(model, number) / REPORT_NAME
        try:
            if not path.is_file() or path.is_symlink():
                continue
            if path.stat().st_size > MAX_REPORT_BYTES:
                raise _unusable(number, f"it is larger than {MAX_REPORT_BYTES} bytes")
            return number, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise _unusable(number, "it is no UTF-8") from error
        except OSError as error:
            raise _unusable(number, error.strerror or str(error)) from error
    which = f"{model} version {version} has" if version is not None else f"no version of {model} has"
    no = " no" if version is not None else " a"
    raise BackbonedError(
        ErrorKind.NOT_FOUND,
        f"{which}{no} report: a FineTune writes one as it ends well, and a dropped file has none",
        field="model" if version is None else "version",
    )


def _unusable(version: int, reason: str) -> BackbonedError:
    return BackbonedError(ErrorKind.DATA_LOSS, f"the report of version {version} can't be read: {reason}")
