"""A declaration is checked before any byte comes, and its content alone makes the dataset's id."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.training import upload_declaration
from backboned.server.training.upload_declaration import MAX_IMAGE_BYTES, Declaration, Entry, Part, check_path

GOOD = Entry("red/1.png", ("red",), hashlib.sha256(b"1").hexdigest(), 1)
OTHER = Entry("blue/1.png", ("blue",), hashlib.sha256(b"2").hexdigest(), 1, Part.VALIDATION)


def declared(*entries: Entry, name: str = "") -> Declaration:
    declaration = Declaration()
    declaration.append(name, entries)
    return declaration


def refused(*entries: Entry) -> str:
    with pytest.raises(BackbonedError) as caught:
        declared(*entries).check_whole()
    assert (caught.value.kind, caught.value.field) == (ErrorKind.INVALID_ARGUMENT, "declaration")
    return caught.value.message


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/etc/passwd.png", "../1.png", "red/../../1.png", "red/..", "./1.png", "red//1.png", "red/",
        "a/./1.png", ".hidden/1.png", "red/.1.png", ".dataset.json", "labels.jsonl", "red/1", "red/1.txt", ".png",
        "red\\..\\1.png", "C:\\1.png", "red/\0.png", "red/1\n.png", "red/1.png\0", "red/\x7f.png", "red/\x85.png",
        " /1.png", "red /1.png", "red/1.png ", "x" * 256 + ".png", "d/" * 600 + "1.png",
    ],
)  # fmt: skip
def test_a_path_that_leads_elsewhere_or_names_no_image_is_refused(path: str) -> None:
    assert refused(replace(GOOD, path=path)).startswith(f"image {path!r} "[:900])


@pytest.mark.parametrize("path", ["1.png", "Red/1.PNG", "a/b/c/ü.jpeg", "red/a..b.tiff"])
def test_an_ordinary_path_is_taken_as_it_is(path: str) -> None:
    assert check_path(path) == ""
    assert declared(replace(GOOD, path=path)).entries[0].path == path


@given(st.text(max_size=40))
def test_whatever_path_is_taken_stays_within_the_folder(path: str) -> None:
    if check_path(path) == "":
        parts = path.split("/")
        assert all(parts) and not any(p.startswith(".") for p in parts) and "\\" not in path and "\0" not in path


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"labels": ("",)}, "has the label ''"),
        ({"labels": ("a|b",)}, "has the label 'a|b'"),
        ({"labels": ("a\nb",)}, "line break"),
        ({"labels": (" a",)}, "outer spaces"),
        ({"labels": ("a", "a")}, "each once"),
        ({"labels": ("x" * 256,)}, "label of 256 bytes"),
        ({"sha256": "0" * 63}, "expected 64 hexadecimal digits"),
        ({"sha256": "A" * 64}, "in lower case"),
        ({"sha256": "../" + "0" * 61}, "expected 64 hexadecimal digits"),
        ({"size_bytes": 0}, "has 0 bytes"),
        ({"size_bytes": -1}, "has -1 bytes"),
        ({"size_bytes": MAX_IMAGE_BYTES + 1}, "expected 1 to 268435456"),
    ],
)
def test_what_else_cannot_be_is_refused_with_the_path(wrong: dict[str, object], said: str) -> None:
    message = refused(OTHER, replace(GOOD, **wrong))  # type: ignore[arg-type]
    assert "image 'red/1.png' " in message and said in message


def test_an_image_may_have_no_label_and_stand_under_two_paths() -> None:
    declaration = declared(replace(GOOD, labels=()), replace(GOOD, path="again.png"))
    declaration.check_whole()
    assert [e.path for e in declaration.images] == ["red/1.png"]
    assert declaration.size_bytes == 2


def test_what_contradicts_itself_is_refused() -> None:
    assert refused(GOOD, GOOD) == "image 'red/1.png' is declared twice"
    assert "of the same digest" in refused(GOOD, replace(GOOD, path="a.png", size_bytes=2))
    assert refused(GOOD, replace(OTHER, path="red/1.png/2.png")) == (
        "image 'red/1.png' can't also be the folder of 'red/1.png/2.png'"
    )
    assert "no image is declared" in refused()


def test_there_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_declaration, "MAX_ENTRIES", 1)
    declaration = declared(GOOD)
    with pytest.raises(BackbonedError, match="more than 1 images"):
        declaration.append("", [OTHER])


def test_the_id_is_of_the_content_in_whatever_order_and_parts() -> None:
    several = replace(GOOD, labels=("b", "a"))
    together = declared(several, OTHER, name="one")
    apart = declared(OTHER)
    before = apart.dataset_id
    apart.append("two", [replace(several, labels=("a", "b"))])
    assert together.dataset_id == apart.dataset_id != before
    assert apart.name == "two"
    others = [
        replace(GOOD, path="red/2.png"),
        replace(GOOD, labels=("green",)),
        replace(GOOD, sha256="0" * 64),
        replace(GOOD, part=Part.TEST),
    ]
    ids = {declared(entry).dataset_id for entry in (GOOD, *others)}
    assert len(ids) == 5 and all(len(i) == 19 and i.startswith("ds-") for i in ids)
