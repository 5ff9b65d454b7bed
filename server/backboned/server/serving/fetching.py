"""Weights that must be downloaded before a version can be read: fetched aside, while others are loaded and serve."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.manifest import Manifest
from backboned.registry.weights import WeightStore

log = logging.getLogger(__name__)


class Fetches:
    """Fetches the weights of backbones. For one thread; `fetched` is called from another one."""

    def __init__(self, weights: WeightStore, fetched: Callable[[], None]) -> None:
        """`fetched` is called whenever some have come, or can't."""
        self._weights = weights
        self._fetched = fetched
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._under_way: dict[str, Future[object]] = {}

    def at_hand(self, manifest: Manifest) -> bool:
        """Whether a version can be read now; if not, it is seen to. Raises `BackbonedError` if it can't be had."""
        name = manifest.backbone
        try:
            if set(manifest.trained) >= set(manifest.stages) or self._weights.is_local(name):
                return True
        except BackbonedError:
            return True  # an unknown backbone: reading the version says so
        fetch = self._under_way.get(name)
        if fetch is None:
            log.info("fetching the weights of %s", name)
            self._under_way[name] = fetch = self._pool.submit(self._weights.stages, name)
            fetch.add_done_callback(lambda _: self._fetched())
        if not fetch.done():
            return False
        del self._under_way[name]
        error = fetch.exception()
        if isinstance(error, BackbonedError):
            raise error
        if error is not None:
            raise BackbonedError(ErrorKind.FAILED_PRECONDITION, str(error)) from error
        return True

    def stop(self) -> None:
        """Fetch nothing more; what is under way isn't waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
