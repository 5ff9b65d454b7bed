import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from torch import nn

from backboned.registry import Backbone, BackbonedError, BackboneFamily, Catalogue, ErrorKind, Head, Stage, register

WritePlugin = Callable[[str, str], EntryPoint]

GOOD = """
from torch import nn
from backboned.registry import Backbone, Head, Stage, register

@register
def plugin():
    return Backbone("from_file", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)),
                    (Stage.of("flat", "0"),), Head.at("1"), 3)
"""


def backbone(name: str) -> Backbone:
    return Backbone(name, nn.Identity, (Stage.of("stem", "0"),), Head.at("1"), 4)


@pytest.fixture
def write_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritePlugin]:
    """Writes a module and gives an entry point to it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name: str, text: str) -> EntryPoint:
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return EntryPoint(name=name, value=name, group="backboned.backbones")

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_a_backbone_is_found_by_its_name_with_its_origin() -> None:
    catalogue = Catalogue()
    catalogue.add(backbone("one"), "here")
    assert catalogue.get("one").name == "one"
    assert catalogue.origin("one") == "here"
    assert [b.name for b in catalogue] == ["one"]


def test_a_duplicate_name_is_refused_with_both_origins() -> None:
    catalogue = Catalogue()
    catalogue.add(backbone("one"), "first 1.0")
    with pytest.raises(BackbonedError, match=r"'one' is offered twice: by first 1\.0 and by second 2\.0") as caught:
        catalogue.add(backbone("one"), "second 2.0")
    assert caught.value.kind is ErrorKind.ALREADY_EXISTS
    assert catalogue.origin("one") == "first 1.0"


def test_a_plugin_that_offers_a_name_twice_is_refused_whole() -> None:
    catalogue = Catalogue()
    with pytest.raises(BackbonedError, match="offered twice"):
        catalogue.add(lambda: [backbone("new"), backbone("twin"), backbone("twin")], "here")
    assert catalogue.names() == []


def test_a_plugin_whose_second_backbone_is_a_duplicate_adds_nothing() -> None:
    catalogue = Catalogue()
    catalogue.add(backbone("one"), "first")
    with pytest.raises(BackbonedError):
        catalogue.add(lambda: [backbone("new"), backbone("one")], "second")
    assert catalogue.names() == ["one"]


def test_a_plugin_that_raises_after_its_first_backbone_adds_nothing() -> None:
    def half() -> Iterator[Backbone]:
        yield backbone("new")
        raise RuntimeError("out of ideas")

    catalogue = Catalogue()
    with pytest.raises(RuntimeError):
        catalogue.add(half, "here")
    assert catalogue.names() == []


@pytest.mark.parametrize("made", [None, 3, "resnet50", [3]])
def test_a_plugin_that_returns_something_else_is_refused(made: object) -> None:
    with pytest.raises(BackbonedError, match="must return Backbone objects, got"):
        Catalogue().add(lambda: made, "here")


def test_a_module_without_a_registered_function_is_refused(write_plugin: WritePlugin) -> None:
    catalogue = Catalogue.from_entry_points([write_plugin("unmarked_plugin", GOOD.replace("@register", ""))])
    assert "mark a function that returns a Backbone with @register" in catalogue.broken[0].reason


def test_an_unknown_name_gets_the_nearest_names() -> None:
    catalogue = Catalogue()
    for name in ("resnet18", "resnet50", "vgg16"):
        catalogue.add(backbone(name), "here")
    with pytest.raises(BackbonedError, match=r"unknown backbone 'ResNet-50'; did you mean 'resnet50'") as caught:
        catalogue.get("ResNet-50")
    assert (caught.value.kind, caught.value.field) == (ErrorKind.NOT_FOUND, "backbone")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('no GPU\\n  here')", "RuntimeError: no GPU here"),
        ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
        ("def (:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_plugin_that_fails_to_import_is_listed_as_broken_and_stops_nothing(
    write_plugin: WritePlugin, text: str, reason: str
) -> None:
    points = [write_plugin("a_broken_plugin", text), write_plugin("b_good_plugin", GOOD)]
    catalogue = Catalogue.from_entry_points(points)
    assert catalogue.names() == ["from_file"]
    (broken,) = catalogue.broken
    assert (broken.name, broken.origin) == ("a_broken_plugin", "a_broken_plugin")
    assert reason in broken.reason


def test_the_error_for_an_unknown_name_tells_of_the_broken_plugin_that_may_have_offered_it(
    write_plugin: WritePlugin,
) -> None:
    catalogue = Catalogue.from_entry_points([write_plugin("shiny", "import nothing_like_this")])
    with pytest.raises(BackbonedError, match=r"unknown backbone 'shiny_50'.*'shiny' .* is broken: .*nothing_like_this"):
        catalogue.get("shiny_50")


def test_a_second_distribution_with_a_taken_name_is_broken_and_the_first_stays(
    write_plugin: WritePlugin,
) -> None:
    catalogue = Catalogue.from_entry_points([write_plugin("a_plugin", GOOD), write_plugin("b_plugin", GOOD)])
    assert catalogue.origin("from_file") == "a_plugin"
    assert "offered twice: by a_plugin and by b_plugin" in catalogue.broken[0].reason


def test_only_functions_that_the_module_itself_defines_are_its_plugins(
    write_plugin: WritePlugin,
) -> None:
    points = [write_plugin("a_plugin", GOOD), write_plugin("b_plugin", "from a_plugin import plugin")]
    catalogue = Catalogue.from_entry_points(points)
    assert catalogue.names() == ["from_file"]
    assert "offers no backbone" in catalogue.broken[0].reason


def test_registering_a_function_calls_nothing() -> None:
    calls = []

    @register
    def plugin() -> Backbone:
        calls.append(1)
        return backbone("late")

    assert calls == []
    Catalogue().add(plugin, "here")
    assert calls == [1]


def test_a_family_makes_a_backbone_once_and_on_demand() -> None:
    made = []

    def make(name: str) -> Backbone:
        made.append(name)
        return backbone(f"zoo/{name}")

    catalogue = Catalogue()
    catalogue.add(BackboneFamily("zoo/", make, lambda: ["zoo/ape"]), "zoo 1.0")
    assert (made, len(catalogue)) == ([], 0)
    assert catalogue.get("zoo/ape") is catalogue.get("zoo/ape")
    assert made == ["ape"]
    assert catalogue.origin("zoo/ape") == "zoo 1.0"
