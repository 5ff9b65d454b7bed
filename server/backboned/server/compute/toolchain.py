"""What compiling needs of the machine: a C++ compiler and Python's headers."""

import os
import shlex
import shutil
import sysconfig
from pathlib import Path


def missing_for_compiling() -> str:
    """What is lacking and how to mend it, as a sentence; empty where nothing is."""
    compiler = os.environ.get("CXX") or "g++"
    lacking = []
    if not shutil.which(next(iter(shlex.split(compiler)), "")):
        lacking.append(f"a C++ compiler ({compiler}; CXX names another)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        lacking.append("Python's headers (Python.h)")
    if not lacking:
        return ""
    return (
        f"this machine lacks {' and '.join(lacking)}, so networks run uncompiled, at some two thirds of the speed; "
        "install them, on Debian and Ubuntu by: apt install g++ python3-dev"
    )
