"""A trainer that imports for itself: `python -m backboned.server.training.trainer_alone PLUGIN_MODULE…`."""

import os
import sys

from backboned.server.process import import_torchvision

if __name__ == "__main__":
    import_torchvision()
    from backboned.server.training.trainer import main

    status = main()
    sys.stderr.flush()
    os._exit(status)  # at once: to take torch and gigabytes apart piece by piece takes a second, and is for nothing
