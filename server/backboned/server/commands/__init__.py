"""The command line: `backboned serve`, `finetune`, `predict` and the rest. Importing it loads no torch."""

from backboned.server.commands.application import app, main

__all__ = ["app", "main"]
