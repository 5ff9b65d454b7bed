"""A manifest says what it said when written, or is refused; whatever else is in the file."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.manifest import MANIFEST_NAME, Epoch, EpochMetrics, Manifest, check_name
from backboned.registry.task import Task

MANIFEST = Manifest(
    model="flowers",
    version=3,
    backbone="resnet18",
    task=Task.SINGLE_LABEL,
    classes=("dandelion", "Gänseblümchen", "雛菊"),
    stages={"stem": "a" * 64, "head": "b" * 64},
    preprocessing=Preprocessing(64, 56, interpolation="bicubic"),
    epochs=(
        Epoch(1, "epoch-0001.pt", "c" * 64, 1000, 1.7e9, EpochMetrics(0.5, 0.75, 0.4, 0.8)),
        Epoch(2, "epoch-0002.pt", "d" * 64, 1000, 1.7e9 + 1, EpochMetrics(train_loss=0.25)),
    ),
    best_epoch=1,
    complete=True,
    trained=("head",),
    adopted_from="mine.pt",
    adopted_key="1@2 -",
    dataset={"folder": "/data/flowers", "train_images": 3},
    options={"seed": 0, "trainable_stages": []},
    versions={"torch": "2.10"},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where it lies."""
    (tmp_path / "flowers" / "3").mkdir(parents=True)
    return tmp_path / "flowers" / "3"


def values() -> dict[str, Any]:
    """What is in the file."""
    plain = json.loads(json.dumps(MANIFEST.__dict__, default=lambda v: getattr(v, "__dict__", str(v))))
    return {**plain, "format": 1, "task": "single_label", "preprocessing": MANIFEST.preprocessing.to_dict()}


def read(folder: Path, content: Any) -> Manifest:
    (folder / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")
    return Manifest.read(folder)


def test_what_is_written_is_read(folder: Path) -> None:
    MANIFEST.write(folder)
    assert Manifest.read(folder) == MANIFEST
    assert [p.name for p in folder.iterdir()] == [MANIFEST_NAME]
    assert read(folder, values()) == MANIFEST  # so the tests below begin with a good one


def test_people_can_read_it(folder: Path) -> None:
    MANIFEST.write(folder)
    assert "Gänseblümchen" in (folder / MANIFEST_NAME).read_text(encoding="utf-8")


def test_a_new_epoch_lends_its_digests_only_if_it_is_the_best() -> None:
    third = Epoch(3, "epoch-0003.pt", "e" * 64, 1000, 1.7e9)
    assert MANIFEST.best.epoch == 1
    plain = MANIFEST.with_epoch(third, best=False, stages={"head": "f" * 64})
    assert (plain.best.epoch, plain.stages, len(plain.epochs)) == (1, MANIFEST.stages, 3)
    better = MANIFEST.with_epoch(third, best=True, stages={"head": "f" * 64})
    assert (better.best, better.stages) == (third, {"head": "f" * 64})
    again = better.with_epoch(third, best=False, stages={})
    assert len(again.epochs) == 3
    first = Manifest.with_epoch(
        Manifest(**{**MANIFEST.__dict__, "epochs": (), "best_epoch": 0}), third, best=False, stages={"head": "0"}
    )
    assert (first.best, first.stages) == (third, {"head": "0"})


def change(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change("format", to=2), "format 2, this version of Backboned reads 1"),
        (change("model", to="birds"), "it is of birds/3, not of flowers/3"),
        (change("version", to=4), "it is of flowers/4, not of flowers/3"),
        (change("version", to=float("inf")), "infinity"),
        (change("task", to="regression"), "'regression' is not a valid Task"),
        (change("best_epoch", to=9), "best epoch 9 is not among its epochs"),
        (change("epochs", to=[]), "best epoch 1 is not among its epochs"),
        (change("epochs", 0, "file", to="../../other/1/epoch-0001.pt"), "must be a plain name"),
        (change("epochs", 0, "file", to="/etc/passwd"), "must be a plain name"),
        (change("epochs", 0, "file", to=".."), "must be a plain name"),
        (change("epochs", 0, "file", to=".hidden"), "must be a plain name"),
        (change("epochs", 0, "file", to=""), "must be a plain name"),
        (change("epochs", 0, "file", to="a\0b"), "must be a plain name"),
        (change("epochs", 0, "file", to=5), "must be a plain name"),
        (change("epochs", 0, "epoch", to=2**31), "is not in 0…"),
        (change("epochs", 0, "epoch", to=-1), "is not in 0…"),
        (change("epochs", 0, "size_bytes", to=2**63), "is not in 0…"),
        (change("epochs", 0, "create_time", to=1e300), "is not in 0…"),
        (change("epochs", 0, "create_time", to=float("nan")), "is not in 0…"),
        (change("epochs", 0, "metrics", to={"loss": 1}), "loss"),
        (change("epochs", 0, "metrics", "val_loss", to="low"), "low"),
        (change("classes", 0, to="\ud800"), "surrogates not allowed"),
        (change("classes", to="abc"), "expected a list of names, got abc"),
        (change("classes", 0, to=3), "expected a list of names, got [3"),
        (change("preprocessing", "crop_size", to=0), "sizes must be 1…2048"),
        (change("stages", to=["stem"]), "AttributeError"),
        (lambda content: content.pop("trained"), "trained"),
        (lambda content: content.clear(), "format"),
    ],
)
def test_a_tampered_one_is_refused_with_the_reason(
    folder: Path, tamper: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = values()
    tamper(content)
    with pytest.raises(BackbonedError) as caught:
        read(folder, content)
    assert caught.value.kind is ErrorKind.DATA_LOSS
    assert caught.value.message.startswith("unreadable manifest.json: ") and message in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BackbonedError, match=r"unreadable manifest\.json"):
        Manifest.read(folder)


def test_one_beyond_all_measure_or_missing_is_refused(folder: Path) -> None:
    with pytest.raises(BackbonedError, match="No such file"):
        Manifest.read(folder)
    with (folder / MANIFEST_NAME).open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(BackbonedError, match="larger than"):
        Manifest.read(folder)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be replaced."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [(*path, key) for key, _ in inner] + [p for key, value in inner for p in places(value, (*path, key))]


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_whatever_is_put_anywhere_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = copy.deepcopy(values())
    for path in data.draw(st.lists(st.sampled_from(places(content)), min_size=1, max_size=2)):
        try:
            change(*path, to=data.draw(ANYTHING))(content)
        except (KeyError, IndexError, TypeError):
            continue  # the first change took it away
    folder = tmp_path_factory.getbasetemp() / "flowers" / "3"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = read(folder, content)
    except BackbonedError as error:
        assert error.kind is ErrorKind.DATA_LOSS
    else:
        assert found.best.file == Path(found.best.file).name
        found.write(folder)
        assert repr(Manifest.read(folder)) == repr(found)  # repr: NaN isn't equal to itself


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "0", "x" * 63])
def test_a_good_name_is_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".a", "_a", "a/b", "a b", "x" * 64, "ä", "a\n", "..", "a\0"])
def test_a_bad_name_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(BackbonedError, match="use 1 to 63 letters") as caught:
        check_name(name, "alias", "alias")
    assert (caught.value.kind, caught.value.field) == (ErrorKind.INVALID_ARGUMENT, "alias")
