"""The fork server: `python -m backboned.server.training.fork_server FD PLUGIN_MODULE…`.

It imports torch and the plugins once; each trainer is a fork of it, ready in milliseconds. FD is a Unix socket to the
daemon, for packets that hold JSON:

    ← {"ready": true}                      or {"ready": false}: what is imported here can't be forked
    → fork, with a trainer's standard input, output and error as file descriptors
    ← {"pid": 4711}, with a pidfd          it runs
    ← {"pid": 4711, "code": 0}             it has ended; minus the signal's number if one ended it

It ends with the daemon. See `fork_client.py` for the daemon's end.
"""

import gc
import json
import os
import selectors
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence

from backboned.server.process import collect_no_more, import_torchvision
from backboned.server.training.priority import yield_to_serving


def main() -> int:
    """Fork trainers until the daemon closes the socket."""
    channel = socket.socket(fileno=int(sys.argv.pop(1)))
    # Python warns of any thread, those of the BLAS included, which are made for it: they come again after a fork.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    yield_to_serving()  # before the imports, which take seconds
    import_torchvision()
    import torch

    torch.set_num_threads(1)  # a team of OpenMP's threads, if a plugin started one, would not survive a fork
    from backboned.registry.catalogue import Catalogue
    from backboned.server.training import trainer

    Catalogue.installed(sys.argv[1:])
    ready = threading.active_count() == 1 and not torch.cuda.is_initialized()  # nothing that a fork would lack
    channel.send(json.dumps({"ready": ready}).encode())
    if ready:
        gc.collect()
        collect_no_more()  # so that no trainer's collector writes to what all share, which would copy it
        _serve(channel, trainer.main)
    return 0


def _serve(channel: socket.socket, trainer: Callable[[], int]) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not channel:
                    _reap(channel, selector, key)
                    continue
                asked, descriptors, _, _ = socket.recv_fds(channel, 64, 3)
                if not asked:
                    return
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    channel.close()
                    _become(trainer, descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                pidfd = os.pidfd_open(pid)
                selector.register(pidfd, selectors.EVENT_READ, pid)
                socket.send_fds(channel, [json.dumps({"pid": pid}).encode()], [pidfd])


def _reap(channel: socket.socket, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    selector.unregister(key.fileobj)
    os.close(key.fd)
    _, status = os.waitpid(key.data, 0)
    channel.send(json.dumps({"pid": key.data, "code": os.waitstatus_to_exitcode(status)}).encode())


def _become(trainer: Callable[[], int], descriptors: Sequence[int]) -> None:
    """Be a trainer, and end as one."""
    code = 1
    try:
        os.setsid()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        code = trainer()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # nothing of the fork server's is to be cleaned up here


if __name__ == "__main__":
    sys.exit(main())
