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
    are on disk, if any.
    """
    if told is not None and told.state is JobState.SUCCEEDED:
        return told
    if told is not None and told.state is JobState.FAILED:
        return _failed(told.error, kept)
    if asked is Ask.CANCEL:
        return StateChanged(JobState.CANCELLED)
    if asked is Ask.SHUTDOWN:
        return interrupted(kept)
    return _failed(ended if told is None else "the trainer process was stopped by a signal from outside", kept)


def interrupted(kept: str) -> StateChanged:
    """The final state of a job that the daemon didn't outlive."""
    return _failed("the daemon stopped while it ran", kept or "no epoch had ended; start it again")


def kept_epochs(directory: CheckpointDirectory, model: str, version: int) -> str:
    """What a version that didn't end well has on disk, and how to go on from there; empty if nothing."""
    try:
        epochs = Manifest.read(directory.version(model, version)).epochs
    except BackbonedError:
        return ""
    last = max(epoch.epoch for epoch in epochs)
    return f"epochs up to {last} are kept as version {version}; start it again with warm_start_version={version}"


def _failed(reason: str, kept: str) -> StateChanged:
    return StateChanged(JobState.FAILED, f"{reason}; {kept}" if kept else reason)
