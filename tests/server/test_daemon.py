"""What keeps a daemon from starting at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from backboned.registry import BackbonedError
from backboned.server.config import Config
from backboned.server.daemon import Daemon
from backboned.server.database import open_database

MakeKey = Callable[..., tuple[Path, Path]]


def test_a_daemon_does_not_start_with_a_key_that_it_cannot_use(tmp_path: Path, make_key: MakeKey) -> None:
    private, public = make_key("daemon")
    database = open_database(tmp_path / "backboned.sqlite")
    try:
        for config, said in (
            (Config(signing_key=public), f"the private key {public} can't be used: expected a PEM file"),
            (Config(trusted_key=(public, private)), f"the public key {private} can't be used: expected a PEM file"),
        ):
            with pytest.raises(BackbonedError) as caught:
                Daemon(config, database)
            assert caught.value.message.startswith(said)
    finally:
        database.dispose()
