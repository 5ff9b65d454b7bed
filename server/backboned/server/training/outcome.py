"""How a job ended: from what its trainer told, how the process ended and what was asked of it."""

from dataclasses import dataclass
from enum import Enum

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError
from backboned.registry.manifest import Manifest
from backboned.server.training.events import JobState, StateChanged


class Ask(Enum):
    """Why a trainer is asked to stop."""

    CANCEL = "cancel"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True)
class Ended:
    """How a trainer process ended: its own last word, if it had one, and what is known from outside.

    `killed` tells that a signal ended it which no program sends to itself: SIGKILL.
    """

    told: StateChanged | None
    how: str
    killed: bool


MOST_KILLS = 10
"""A trainer that is killed so often without getting any further is given up: it needs more memory than there is."""

MOST_CRASHES = 3


def outcome(ended: Ended, asked: Ask | None, fruitless: int, kept: str) -> StateChanged | None:
    """The final state of a job; None if another trainer is to go on, now or when the daemon is back.

    `fruitless` is how many trainers in a row ended without getting any further, this one included; `kept` says which
    epochs are on disk, if any.
    """
    told = ended.told
    if told is not None and told.state is JobState.SUCCEEDED:
        return told
    if told is not None and told.state is JobState.FAILED:
        return _failed(told.error, kept)
    if asked is Ask.CANCEL:
        return StateChanged(JobState.CANCELLED)
    if asked is Ask.SHUTDOWN or fruitless < (MOST_KILLS if ended.killed or told is not None else MOST_CRASHES):
        return None
    how = "a signal from outside stopped it" if told is not None else ended.how
    return _failed(f"{fruitless} trainers in a row got no further: {how}", kept)


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
