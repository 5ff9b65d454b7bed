"""How a CPU's cores are shared out among the lanes."""

import math

_FORGETTING = 0.9
"""What is left, a batch later, of how many images were under way at once."""


class Cores:
    """Tells each batch the threads that it may use, and remembers which lanes have such threads. Not thread-safe.

    OpenMP keeps the threads that a lane has used for it alone, and they wait for its next operator awake, unless there
    are more of them in the process than cores: then all of them are put to sleep at once, and ResNet-50 takes 14.8 ms
    an image instead of 11.6 (two lanes that had used both of two cores, libgomp 13). So a lane whose threads are too
    many has to give them back, which only the end of the thread that used them brings about.
    """

    def __init__(self, cores: int, lanes: int) -> None:
        self._cores = cores
        self._lanes = lanes
        self._teams = [1] * lanes
        self._crowd = 0.0

    def take(self, lane: int, images: int, under_way: int) -> int:
        """The threads for a batch of so many images, of all those `under_way`: all, if it is alone and lately was.

        Callers who were answered a moment ago will be back: a batch that takes the other lanes' cores meanwhile is
        still there then, and its threads and theirs wait for each other.
        """
        self._crowd = max(under_way, _FORGETTING * self._crowd)
        batches = min(math.ceil(self._crowd / images), self._lanes)
        threads = max(1, self._cores // batches)
        if threads > 1:  # one thread alone is used without a team, and leaves it as it is
            self._teams[lane] = threads
        return threads

    def too_many(self, lane: int) -> list[int]:
        """The other lanes that have threads, if together with this one's they are more than there are cores."""
        others = [i for i, team in enumerate(self._teams) if i != lane and team > 1]
        extra = sum(self._teams[i] - 1 for i in others)
        return others if self._teams[lane] > 1 and self._teams[lane] + extra > self._cores else []

    def give_back(self, lane: int) -> None:
        """A lane's thread has ended, and those that it used with it."""
        self._teams[lane] = 1
