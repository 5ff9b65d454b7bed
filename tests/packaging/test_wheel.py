"""What the wheel holds, and what it asks for."""

import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.metadata import Metadata

SOURCE_ROOTS = ("proto", "registry", "plugins", "server")


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """The paths of the files in the wheel."""
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Metadata:
    (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with ZipFile(wheel) as archive:
        return Metadata.from_email(archive.read(path))


def test_the_base_requires_grpcio_and_protobuf_alone(metadata: Metadata) -> None:
    required = metadata.requires_dist or []
    base = {r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert base == {"grpcio", "protobuf"}


def test_the_server_extra_requires_torch(metadata: Metadata) -> None:
    required = metadata.requires_dist or []
    assert "torch" in {r.name for r in required if r.marker and r.marker.evaluate({"extra": "server"})}


def test_backboned_is_a_namespace_without_an_init_file(root: Path, names: set[str]) -> None:
    assert "backboned/__init__.py" not in names
    strays = [source for source in SOURCE_ROOTS if (root / source / "backboned" / "__init__.py").exists()]
    assert strays == []


def test_all_of_the_four_source_roots_is_in_the_wheel_and_nothing_else(root: Path, names: set[str]) -> None:
    sources = {
        path.relative_to(root / source).as_posix()
        for source in SOURCE_ROOTS
        for path in (root / source).rglob("*")
        if path.is_file() and path.suffix in {".py", ".pyi", ".proto", ".typed"}
    }
    code = {name for name in names if ".dist-info/" not in name}
    assert sources - code == set()
    assert {name for name in code if not name.startswith("backboned/")} == set()


@pytest.mark.parametrize("package", ["v1", "registry", "plugins", "server"])
def test_each_package_says_that_it_is_typed(names: set[str], package: str) -> None:
    assert {f"backboned/{package}/__init__.py", f"backboned/{package}/py.typed"} <= names


def test_the_api_comes_with_its_proto(names: set[str]) -> None:
    assert "backboned/v1/model_service.proto" in names


def test_each_entry_point_names_a_module_in_the_wheel(root: Path, names: set[str]) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    points = [*project["scripts"].values(), *project["entry-points"]["backboned.backbones"].values()]
    modules = {point.partition(":")[0].replace(".", "/") + ".py" for point in points}
    assert modules - names == set()


def test_the_licence_is_in_the_wheel(names: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
