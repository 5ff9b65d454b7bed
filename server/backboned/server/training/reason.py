"""Why a job failed, in one line for its owner."""

import errno

from backboned.registry.errors import BackbonedError
from backboned.server.training.stages_trainer import is_out_of_memory


def reason(error: Exception) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, BackbonedError):
        return error.message
    if (full := _disk_full(error)) is not None:
        where = f" ({full.filename})" if full.filename else ""
        return f"disk full{where}: make room, or give --state-dir and --checkpoint-dir a larger disk"
    if is_out_of_memory(error):
        return "out of memory: lower batch_size, or train fewer stages"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _disk_full(error: BaseException) -> OSError | None:
    """The error that says so: this one, or one that it hides, as `torch.save` does."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError) and at.errno in (errno.ENOSPC, errno.EDQUOT):
            return at
        at = at.__cause__ or at.__context__
    return None
