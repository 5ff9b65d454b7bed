"""What a person writes beside a dropped file is understood, or refused with the file's name and the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.sidecar import Sidecar, parse_classes, read_sidecar, sidecar_paths
from backboned.registry.task import Task

NAMES = ("ant", "bee")


def beside(folder: Path, name: str, content: bytes | Any) -> Sidecar:
    """What `name` tells of `model.pt` beside it."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_sidecar(folder / "model.pt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", b"ant\nbee\n"),
        ("classes.txt", b"\xef\xbb\xbfant\r\n\r\n  bee  "),
        ("model.txt", b"ant\nbee"),
        ("classes.json", ["ant", "bee"]),
        ("model.json", {"ant": 0, "bee": 1}),
        ("model.json", {"1": "bee", "0": "ant"}),
        ("model.pt.json", {"classes": ["ant", "bee"]}),
        ("model.pt.json", {"classes": {"bee": 1, "ant": 0}}),
        ("model.pt.json", {"class_to_idx": {"ant": 0, "bee": 1}}),
    ],
)
def test_class_names_are_read_in_every_form(tmp_path: Path, name: str, content: Any) -> None:
    assert beside(tmp_path, name, content) == Sidecar(classes=NAMES)


def test_a_json_file_may_tell_more(tmp_path: Path) -> None:
    preprocessing = Preprocessing(64, 56, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic")
    told = {"backbone": "resnet18", "task": "TASK_MULTI_LABEL", "preprocessing": preprocessing.to_dict()}
    assert beside(tmp_path, "model.json", told) == Sidecar(None, "resnet18", Task.MULTI_LABEL, preprocessing)


def test_without_a_file_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").mkdir()  # a folder is no file
    assert read_sidecar(tmp_path / "model.pt") == Sidecar()


def test_the_nearest_file_counts(tmp_path: Path) -> None:
    for path in reversed(sidecar_paths(tmp_path / "model.pt")):
        name = path.name
        path.write_text(json.dumps([name]) if path.suffix == ".json" else name)
        assert read_sidecar(tmp_path / "model.pt").classes == (name,)
    assert name == "model.pt.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.json", b'["ant", ', "classes.json beside it can't be used: Expecting value"),
        ("classes.json", b"[" * 100_000, "classes.json beside it can't be used"),
        ("classes.txt", b"\xff\xfe\x00", "classes.txt beside it can't be used"),
        ("model.json", ["ant", 1], "class names must be strings"),
        ("model.json", {"0": "ant", "1": ["bee"]}, "class names must be strings"),
        ("model.json", {"0": "ant", "2": "bee"}, "class indices must be 0…1, each once"),
        ("model.json", {"ant": 0, "bee": 0}, "class indices must be 0…1, each once"),
        ("model.json", {"one": "ant"}, "invalid literal"),
        ("model.json", 3, "expected class names, got a int"),
        ("model.json", {"task": "regression"}, "'regression' is not a valid Task"),
        ("model.json", {"backbone": ["resnet18"]}, "backbone must be a name, got ['resnet18']"),
        ("model.json", {"preprocessing": {"crop_size": 224}}, "malformed preprocessing"),
        ("model.json", {"preprocessing": 5}, "malformed preprocessing"),
        ("model.json", {"preprocessing": Preprocessing().to_dict() | {"crop_size": float("inf")}}, "malformed"),
        ("model.json", {"preprocessing": Preprocessing().to_dict() | {"mean": [float("nan")] * 3}}, "a finite mean"),
        ("model.json", {"preprocessing": Preprocessing().to_dict() | {"std": [0, 1, 1]}}, "a positive std"),
        ("model.json", {"preprocessing": Preprocessing().to_dict() | {"crop_size": 10**6}}, "must be 1…2048"),
    ],
)
def test_a_mistake_is_told_with_the_name_of_the_file(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(BackbonedError) as caught:
        beside(tmp_path, name, content)
    assert message in caught.value.message and name in caught.value.message
    assert caught.value.kind is ErrorKind.DATA_LOSS


def test_a_file_beyond_all_measure_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "classes.txt").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(BackbonedError, match="larger than"):
        read_sidecar(tmp_path / "model.pt")


def test_a_file_from_outside_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "flowers").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("ant\nbee\n")
    (tmp_path / "checkpoints" / "flowers" / "classes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(BackbonedError, match="leads out of the checkpoint directory"):
        read_sidecar(tmp_path / "checkpoints" / "flowers" / "model.pt")


@given(st.lists(st.text(), unique=True))
@settings(deadline=None)
def test_names_mean_the_same_in_every_form(names: list[str]) -> None:
    forms = (names, {n: i for i, n in enumerate(names)}, {str(i): n for i, n in enumerate(names)})
    assert {parse_classes(form) for form in forms} == {tuple(names)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["classes", "backbone", "task", "preprocessing", "0", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(JSON)
@settings(deadline=None, max_examples=200)
def test_any_json_is_understood_or_refused(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    try:
        found = beside(tmp_path_factory.getbasetemp(), "model.json", content)
    except BackbonedError as error:
        assert error.kind is ErrorKind.DATA_LOSS
    else:
        assert all(isinstance(name, str) for name in found.classes or ())
