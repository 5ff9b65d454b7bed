"""A look at the models that may have changed finds what a look at everything would."""

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.look import Part, Seen

MODELS = ("birds", "flowers", "not a name", "linked")
ENTRIES = ("1", "2", "a.pt", "b.safetensors", "notes.txt")

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["version", "file", "tombstone", "link", "link out", "folder", "remove", "remove model"]),
        st.sampled_from(MODELS[:3]),
        st.sampled_from(ENTRIES),
    ),
    min_size=1,
    max_size=8,
)


def _part(kind: str, model: str, name: str) -> Part:
    """What an event names: a version alone, unless it may be a link, or was none before."""
    alone = name.isdigit() and kind in ("version", "tombstone", "folder")
    return model, int(name) if alone else None


def change(root: Path, kind: str, model: str, name: str) -> None:
    folder = root / model
    path = folder / name
    if kind == "remove model":
        shutil.rmtree(folder, ignore_errors=True)
        return
    folder.mkdir(exist_ok=True)
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
    if kind in ("version", "tombstone"):
        path.mkdir()
        (path / ("manifest.json" if kind == "version" else "deleted.json")).write_text("{}")
    elif kind == "file":
        path.write_bytes(b"x")
    elif kind == "folder":
        path.mkdir()
    elif kind in ("link", "link out"):
        path.symlink_to(root / "flowers" / "1" if kind == "link" else root.parent)


@given(st.lists(CHANGES, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_changed_is_all_that_must_be_looked_at(turns: list[list[tuple[str, str, str]]]) -> None:
    with TemporaryDirectory() as parent:
        root = Path(parent) / "checkpoints"
        (root / "flowers").mkdir(parents=True)
        (root / "linked").symlink_to(root / "flowers")
        directory = CheckpointDirectory(root)
        seen = directory.scan()
        for changes in turns:
            for kind, model, name in changes:
                change(root, kind, model, name)
            parts = {_part(*each) for each in changes} | {(model, None) for model in seen.linked}
            seen = directory.scan_again(seen, parts)
            assert replace(seen, parts=None) == directory.scan()


def test_others_are_not_looked_at(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    for model in ("birds", "flowers"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "a.pt").write_bytes(b"x")
    seen = directory.scan_again(Seen(), {("birds", None)})
    assert {drop.model for drop in seen.drops.values()} == {"birds"}
    assert {drop.model for drop in directory.scan_again(seen, {("flowers", None)}).drops.values()} == {
        "birds",
        "flowers",
    }
