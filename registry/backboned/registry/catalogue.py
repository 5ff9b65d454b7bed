"""Backbones by name: registered by decorator, found by entry point.

`@register` only marks a function; nothing happens at import. A `Catalogue` is an object that its owner fills: from
entry points, from modules, or by hand. A plugin is added whole or not at all.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

from backboned.registry.backbone import Backbone
from backboned.registry.errors import BackbonedError, ErrorKind, invalid, not_found

ENTRY_POINT_GROUP = "backboned.backbones"
_MARK = "__backboned_plugin__"


@dataclass(frozen=True)
class BackboneFamily:
    """Backbones made on demand, for a library that has too many to list: `<prefix><model>`, as in `timm/resnet50`.

    `make` gets the name without the prefix and raises for one that it can't make; `names` lists what there is, for
    suggestions. Dropped files are recognised as one of these only when they say so by name.
    """

    prefix: str
    make: Callable[[str], Backbone]
    names: Callable[[], Iterable[str]]


Plugin = Backbone | BackboneFamily
PluginFunction = Callable[[], Plugin | Iterable[Plugin]]
F = TypeVar("F", bound=PluginFunction)


def register(function: F) -> F:
    """Mark `function`, which returns a `Backbone`, a `BackboneFamily` or several of them, as a plugin."""
    setattr(function, _MARK, True)
    return function


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be added, and why."""

    name: str
    origin: str
    reason: str


class Catalogue:
    """The backbones that are known, each with its origin. Filled at start by one thread, then only read."""

    def __init__(self) -> None:
        self._backbones: dict[str, Backbone] = {}
        self._families: dict[str, BackboneFamily] = {}
        self._origins: dict[str, str] = {}
        self._made: dict[str, Backbone] = {}
        self._broken: list[BrokenPlugin] = []

    @classmethod
    def from_entry_points(cls, points: Iterable[EntryPoint] | None = None) -> "Catalogue":
        """Everything that installed distributions offer under `backboned.backbones`. Raises nothing: see `broken`."""
        catalogue = cls()
        found = entry_points(group=ENTRY_POINT_GROUP) if points is None else points
        # Our own plugins come first, so that another distribution can't take their names.
        for point in sorted(found, key=lambda p: (_origin(p).split(" ")[0] != "backboned", _origin(p), p.name)):
            catalogue._add_entry_point(point)
        return catalogue

    @classmethod
    def installed(cls, modules: Iterable[str] = ()) -> "Catalogue":
        """What installed distributions offer, and further `modules` by name, for which it raises `BackbonedError`."""
        catalogue = cls.from_entry_points()
        for name in modules:
            try:
                module = importlib.import_module(name)
            except ImportError as error:
                raise invalid(f"can't import the plugin {name!r}: {error}", field="plugin") from error
            catalogue.add(module, name)
        return catalogue

    def add(self, plugin: Any, origin: str) -> None:
        """Add a `Backbone`, a `BackboneFamily`, a plugin function, or a module with such functions; all or nothing.

        Raises `BackbonedError`: `ALREADY_EXISTS`, naming both origins, for a name that is taken.
        """
        plugins = list(_plugins(plugin, origin))
        if not plugins:
            raise BackbonedError(
                ErrorKind.INVALID_ARGUMENT,
                f"{origin} offers no backbone: mark a function that returns a Backbone with @register",
            )
        names = [p.name if isinstance(p, Backbone) else p.prefix for p in plugins]
        for i, name in enumerate(names):
            if name in self._origins or name in names[:i]:
                raise BackbonedError(
                    ErrorKind.ALREADY_EXISTS,
                    f"backbone {name!r} is offered twice: by {self._origins.get(name, origin)} and by {origin}; "
                    "rename one of them",
                )
        for name, item in zip(names, plugins, strict=True):
            self._origins[name] = origin
            if isinstance(item, Backbone):
                self._backbones[name] = item
            else:
                self._families[name] = item

    def get(self, name: str) -> Backbone:
        """The backbone called `name`. Raises `BackbonedError` `NOT_FOUND` with the nearest names."""
        if name in self._backbones:
            return self._backbones[name]
        if name in self._made:
            return self._made[name]
        for prefix, family in self._families.items():
            if name.startswith(prefix):
                return self._made.setdefault(name, family.make(name.removeprefix(prefix)))
        broken = next((b for b in self._broken if name.startswith(b.name)), None)
        hint = f" (the plugin {broken.name!r} from {broken.origin} is broken: {broken.reason})" if broken else ""
        raise not_found("backbone", name, self.names(), field="backbone", hint=hint)

    def names(self) -> list[str]:
        """The names of all backbones that aren't made on demand, sorted."""
        return sorted(self._backbones)

    def origin(self, name: str) -> str:
        """Who offers `name`: a distribution and its version, or a module."""
        return self._origins.get(name) or next((o for p, o in self._origins.items() if name.startswith(p)), "")

    @property
    def families(self) -> tuple[BackboneFamily, ...]:
        """The families of backbones that are made on demand."""
        return tuple(self._families.values())

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """The plugins that could not be added."""
        return tuple(self._broken)

    def __iter__(self) -> Iterator[Backbone]:
        return iter([self._backbones[n] for n in self.names()])

    def __len__(self) -> int:
        return len(self._backbones)

    def _add_entry_point(self, point: EntryPoint) -> None:
        origin = _origin(point)
        try:
            self.add(point.load(), origin)
        except (Exception, SystemExit) as error:  # a plugin is foreign code: whatever it raises must stop nothing else
            reason = error.message if isinstance(error, BackbonedError) else f"{type(error).__name__}: {error}"
            self._broken.append(BrokenPlugin(point.name, origin, " ".join(reason.split())))


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version} ({point.value})" if point.dist else point.value


def _plugins(source: Any, origin: str) -> Iterator[Plugin]:
    if isinstance(source, Backbone | BackboneFamily):
        yield source
    elif isinstance(source, ModuleType):
        for value in list(vars(source).values()):
            if getattr(value, _MARK, False) and getattr(value, "__module__", None) == source.__name__:
                yield from _plugins(value, origin)
    elif callable(source):
        made = source()
        for plugin in made if isinstance(made, Iterable) else [made]:
            if not isinstance(plugin, Backbone | BackboneFamily):
                raise BackbonedError(
                    ErrorKind.INVALID_ARGUMENT,
                    f"{origin}: {source!r} must return Backbone objects, got {type(plugin).__name__}",
                )
            yield plugin
    else:
        raise BackbonedError(
            ErrorKind.INVALID_ARGUMENT, f"{origin}: expected a Backbone, a function or a module, got {source!r}"
        )
