"""Aliases outlive the process, change by compare-and-set, and are read from memory."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.serving.aliases import Aliases


@pytest.fixture
def aliases(database: Engine) -> Aliases:
    return Aliases(database)


def refusal(call: Any, *arguments: Any, **options: Any) -> BackbonedError:
    with pytest.raises(BackbonedError) as caught:
        call(*arguments, **options)
    return caught.value


def test_an_alias_points_where_it_was_last_set(aliases: Aliases) -> None:
    assert aliases.of("flowers") == {} and aliases.all() == {}
    aliases.set("flowers", "stable", 1)
    aliases.set("flowers", "next", 2**62)
    aliases.set("birds", "stable", 7)
    aliases.set("flowers", "stable", 3)
    assert aliases.all() == {"flowers": {"stable": 3, "next": 2**62}, "birds": {"stable": 7}}
    aliases.delete("flowers", "next")
    assert aliases.of("flowers") == {"stable": 3}


def test_they_are_there_again_after_a_restart(aliases: Aliases, database: Engine) -> None:
    aliases.set("flowers", "stable", 3)
    aliases.set("flowers", "old", 1)
    aliases.delete("flowers", "old")
    assert Aliases(database).all() == {"flowers": {"stable": 3}}


def test_a_reader_keeps_what_it_has_read(aliases: Aliases) -> None:
    aliases.set("flowers", "stable", 1)
    before, of_model = aliases.all(), aliases.of("flowers")
    aliases.set("flowers", "stable", 2)
    assert before == {"flowers": {"stable": 1}} and of_model == {"stable": 1}
    with pytest.raises(TypeError):
        before["flowers"]["stable"] = 5  # type: ignore[index]


def test_an_expectation_must_hold(aliases: Aliases) -> None:
    aliases.set("flowers", "stable", 1, expected=0)
    error = refusal(aliases.set, "flowers", "stable", 2, expected=0)
    assert (error.kind, error.field) == (ErrorKind.ABORTED, "expected_version")
    assert error.message == "alias 'stable' of flowers points to version 1, not to 0: read it again and retry"
    assert "points to no version, not to 4" in refusal(aliases.set, "flowers", "next", 5, expected=4).message
    assert refusal(aliases.delete, "flowers", "stable", expected=9).kind is ErrorKind.ABORTED
    assert aliases.all() == {"flowers": {"stable": 1}}
    aliases.set("flowers", "stable", 2, expected=1)
    aliases.delete("flowers", "stable", expected=2)
    assert aliases.all() == {}


def test_of_many_who_expect_the_same_one_wins(aliases: Aliases) -> None:
    aliases.set("flowers", "stable", 1)

    def move(version: int) -> bool:
        try:
            aliases.set("flowers", "stable", version, expected=1)
        except BackbonedError as error:
            assert error.kind is ErrorKind.ABORTED
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(move, range(2, 18)))
    assert won.count(True) == 1
    assert aliases.of("flowers") == {"stable": won.index(True) + 2}


@pytest.mark.parametrize("alias", ["", "a b", "../x", "x" * 64, "latest", "3", "007"])
def test_a_name_that_means_something_else_or_nothing_is_refused(aliases: Aliases, alias: str) -> None:
    error = refusal(aliases.set, "flowers", alias, 1)
    assert (error.kind, error.field) == (ErrorKind.INVALID_ARGUMENT, "alias")
    assert aliases.all() == {}


def test_deleting_an_unknown_one_gets_the_nearest(aliases: Aliases) -> None:
    aliases.set("flowers", "stable", 1)
    error = refusal(aliases.delete, "flowers", "stabel")
    assert error.kind is ErrorKind.NOT_FOUND and "did you mean 'stable'?" in error.message
    assert refusal(aliases.delete, "birds", "stable").kind is ErrorKind.NOT_FOUND
