"""What the database holds about models."""

from dataclasses import dataclass

from sqlalchemy import Engine

from backboned.server.serving.aliases import Aliases
from backboned.server.serving.decisions import Decisions
from backboned.server.serving.history import History


@dataclass(frozen=True)
class Records:
    """Aliases, decisions, and the journal of how they came about."""

    aliases: Aliases
    decisions: Decisions
    history: History

    @classmethod
    def of(cls, database: Engine) -> "Records":
        """Those in a database; their tables are made if they aren't there."""
        return cls(Aliases(database), Decisions(database), History(database))
