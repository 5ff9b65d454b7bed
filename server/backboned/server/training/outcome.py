"""How a job ended: from what its trainer told, how the process ended and what was asked of it."""

from enum import Enum

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError
from backboned.registry.manifest import Manifest
from backboned.server.training.events import JobState, StateChanged


class Ask(Enum):
    """Why a trainer is asked to stop."""

    CANCEL = "cancel"
    SHUTDOWN = "shutdown"


def outcome(told: StateChanged | None, ended: str, asked: Ask | None, kept: str) -> StateChanged:
    """The final state of a job.

    `told` is the trainer's own last word, if it had one; `ended` says how the process ended, and `kept` which epochs
    are on disk, both for people.
    """
    if told is not None and told.state is not JobState.CANCELLED:
        return told
    if asked is Ask.CANCEL:
        return StateChanged(JobState.CANCELLED)
    if asked is Ask.SHUTDOWN:
        return interrupted(kept)
    reason = "the trainer process was stopped by a signal from outside" if told is not None else ended
    return StateChanged(JobState.FAILED, f"{reason}; {kept}")


def interrupted(kept: str) -> StateChanged:
    """The final state of a job that the daemon didn't outlive."""
    return StateChanged(JobState.FAILED, f"the daemon stopped while it ran; {kept}")


def kept_epochs(directory: CheckpointDirectory, model: str, version: int) -> str:
    """What a version that didn't end well has on disk, and how to go on from there."""
    try:
        epochs = Manifest.read(directory.version(model, version)).epochs
    except BackbonedError:
        return "no epoch had ended; start it again"
    last = max(epoch.epoch for epoch in epochs)
    return f"epochs up to {last} are kept as version {version}; start it again with warm_start_version={version}"
