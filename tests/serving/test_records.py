"""Decisions and the journal outlive the process."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from backboned.server.serving.decisions import share
from backboned.server.serving.history import Change, Entry
from backboned.server.serving.policy import Policy, VersionPolicy
from backboned.server.serving.records import Records


@pytest.fixture
def records(database: Engine) -> Records:
    return Records.of(database)


def test_a_policy_is_what_was_set_last_also_after_a_start(records: Records, database: Engine) -> None:
    decisions = records.decisions
    assert decisions.policy("m") == Policy() and not decisions.policies()
    decisions.choose("m", VersionPolicy.PINNED, 3)
    decisions.choose("n", VersionPolicy.BEST)
    decisions.choose("m", VersionPolicy.MANUAL, 2**61)
    expected = {"m": Policy(VersionPolicy.MANUAL, 2**61), "n": Policy(VersionPolicy.BEST)}
    assert decisions.policies() == expected
    assert Records.of(database).decisions.policies() == expected


@pytest.mark.parametrize("kind", VersionPolicy)
def test_what_is_rejected_stays_so_until_it_is_named(records: Records, kind: VersionPolicy) -> None:
    decisions, names_one = records.decisions, kind in (VersionPolicy.PINNED, VersionPolicy.MANUAL)
    decisions.choose("m", kind, 5 if names_one else None)
    decisions.reject("m", 5, "worse", instead=4)
    assert decisions.policy("m") == Policy(kind, 4 if names_one else None, {5: "worse"})
    decisions.reject("m", 4, "worse too", instead=5)
    assert decisions.policy("m").rejected == {4: "worse too"}
    decisions.choose("m", VersionPolicy.PINNED, 4)
    assert decisions.policy("m") == Policy(VersionPolicy.PINNED, 4)


def test_traffic_falls_by_weight_and_for_a_key_always_alike(records: Records, database: Engine) -> None:
    records.decisions.divide("m", {"stable": 1, "canary": 1})
    records.decisions.divide("m", {"stable": 9, "canary": 1})
    split = Records.of(database).decisions.split("m")
    assert split == {"stable": 9, "canary": 1}
    keys = [f"user-{i}" for i in range(4000)]
    fallen = Counter(share(split, "m", key) for key in keys)
    assert 300 < fallen["canary"] < 500
    assert [share(split, "m", key) for key in keys] == [share(split, "m", key) for key in keys]
    by_chance = Counter(share(split, "m", "") for _ in range(4000))
    assert 250 < by_chance["canary"] < 550
    wider = {"stable": 8, "canary": 2}
    lost = [key for key in keys if share(split, "m", key) == "canary" != share(wider, "m", key)]
    assert not lost  # who had the canary keeps it when it gets more
    assert share({"only": 3}, "m", "") == "only"
    records.decisions.divide("m", {})
    assert not records.decisions.split("m")


def test_the_journal_tells_what_served_newest_first(records: Records, database: Engine) -> None:
    history = records.history
    history.add(Entry("m", Change.SERVING, 1, 0), Entry("n", Change.SERVING, 7, 0))
    history.add(Entry("m", Change.ALIAS, 1, 0, subject="stable", actor="ann", reason="why not"))
    history.add(Entry("m", Change.SERVING, 2, 1), Entry("n", Change.SERVING, 0, 7))
    history.add(Entry("m", Change.SERVING, 1, 2))
    assert history.served("m") == [1, 2, 1] and not history.entries()  # it knows what it has still to write
    history.catch_up(wait_seconds=5)
    history.catch_up(wait_seconds=5)
    again = Records.of(database).history
    assert again.served("m") == [1, 2, 1] and again.served("n") == [7]
    assert again.serving() == {"m": 1}
    entries = again.entries()
    assert [e.number for e in entries] == [6, 5, 4, 3, 2, 1]
    assert all(e.time > 1.7e9 for e in entries)
    (alias,) = (e for e in again.entries("m") if e.change is Change.ALIAS)
    assert (alias.subject, alias.actor, alias.reason) == ("stable", "ann", "why not")
    assert {e.model for e in again.entries("n")} == {"n"}


def test_a_change_and_its_entry_in_the_journal_are_made_together_or_not_at_all(
    records: Records, database: Engine
) -> None:
    entry = Entry("m", Change.POLICY, 3)
    records.decisions.choose("m", VersionPolicy.PINNED, 3, journal=[entry])
    records.aliases.set("m", "stable", 3, journal=[replace(entry, change=Change.ALIAS)])
    noted = [e.change for e in records.history.entries()]
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE history RENAME TO elsewhere")
    changes: tuple[Callable[[], None], ...] = (
        lambda: records.decisions.choose("m", VersionPolicy.BEST, journal=[entry]),
        lambda: records.decisions.divide("m", {"stable": 1}, journal=[entry]),
        lambda: records.decisions.reject("m", 3, "worse", instead=2, journal=[entry]),
        lambda: records.aliases.set("m", "stable", 4, journal=[entry]),
        lambda: records.aliases.delete("m", "stable", journal=[entry]),
    )
    for change in changes:
        with pytest.raises(OperationalError):
            change()
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO history")
    for now in (records, Records.of(database)):
        assert now.decisions.policies() == {"m": Policy(VersionPolicy.PINNED, 3)} and not now.decisions.split("m")
        assert now.aliases.of("m") == {"stable": 3}
        assert [e.change for e in now.history.entries()] == noted == [Change.ALIAS, Change.POLICY]
