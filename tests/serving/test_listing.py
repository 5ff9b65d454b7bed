"""Checkpoints as rows: what is said of each epoch, and of what can't be used."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError
from backboned.registry.manifest import MANIFEST_NAME, Epoch, EpochMetrics, Manifest
from backboned.server.api.checkpoints import checkpoint_fields, checkpoint_message
from backboned.server.serving.listing import CheckpointRow, checkpoint_rows
from backboned.server.serving.snapshot import KnownModel, KnownVersion, LoadedModel, RefusedFile, Snapshot, State

MakeManifest = Callable[..., Manifest]
DIRECTORY = CheckpointDirectory(Path("/checkpoints"))

EPOCHS = tuple(
    Epoch(n, f"epoch-000{n}.pt", str(n) * 64, 100 * n, 1.7e9 + n, EpochMetrics(0.5 / n, 0.5, None, 0.25 * n))
    for n in (1, 2, 3)
)


def snapshot_of(*versions: KnownVersion, refused: tuple[RefusedFile, ...] = ()) -> Snapshot:
    models: dict[str, dict[int, KnownVersion]] = {}
    for known in versions:
        models.setdefault(known.manifest.model, {})[known.manifest.version] = known
    return Snapshot(MappingProxyType({n: KnownModel(n, v) for n, v in models.items()}), refused)


def rows(snapshot: Snapshot, model: str = "", **aliases: Mapping[str, int]) -> list[CheckpointRow]:
    return checkpoint_rows(snapshot, DIRECTORY, aliases, model)


def told(row: CheckpointRow) -> tuple[str, int, int, State]:
    return row.model, row.version, row.epoch, row.state


def test_a_row_says_what_its_manifest_says(make_manifest: MakeManifest) -> None:
    manifest = make_manifest(epochs=EPOCHS[:1])
    (row,) = rows(snapshot_of(KnownVersion(manifest, State.AVAILABLE)))
    assert row == CheckpointRow(
        model="flowers",
        version=1,
        epoch=1,
        path=Path("/checkpoints/flowers/1/epoch-0001.pt"),
        backbone="digits",
        task=manifest.task,
        classes=("ant", "bee", "wasp"),
        metrics=EPOCHS[0].metrics,
        sha256="1" * 64,
        size_bytes=100,
        create_time=1.7e9 + 1,
        best=True,
        state=State.AVAILABLE,
    )


def test_the_newest_come_first_and_refused_files_before_all(make_manifest: MakeManifest) -> None:
    refused = RefusedFile("birds", Path("/checkpoints/birds/x.pt"), State.QUARANTINED, "it is empty", 0, 1.7e9)
    snapshot = snapshot_of(
        KnownVersion(make_manifest(version=1, epochs=EPOCHS[:2], best_epoch=1), State.SERVING),
        KnownVersion(make_manifest(version=2, epochs=EPOCHS[:1]), State.LOADING),
        refused=(refused,),
    )
    assert [told(row) for row in rows(snapshot)] == [
        ("birds", 0, 0, State.QUARANTINED),
        ("flowers", 2, 1, State.LOADING),
        ("flowers", 1, 2, State.AVAILABLE),
        ("flowers", 1, 1, State.SERVING),
    ]
    first = rows(snapshot)[0]
    assert (first.path, first.reason, first.create_time) == (refused.path, "it is empty", 1.7e9)
    assert [row.model for row in rows(snapshot, "birds")] == ["birds"]
    assert [row.version for row in rows(snapshot, "flowers")] == [2, 1, 1]
    assert rows(snapshot, "unknown") == []


def test_state_and_reason_are_of_the_best_epoch_and_serving_also_of_the_one_that_serves_on(
    make_manifest: MakeManifest,
) -> None:
    earlier = LoadedModel(make_manifest(epochs=EPOCHS[:2], best_epoch=2), (), ())
    known = KnownVersion(make_manifest(epochs=EPOCHS, best_epoch=3), State.QUARANTINED, "it is altered", earlier)
    assert [(r.epoch, r.state, r.reason) for r in rows(snapshot_of(known))] == [
        (3, State.QUARANTINED, "it is altered"),
        (2, State.SERVING, ""),
        (1, State.AVAILABLE, ""),
    ]


def test_aliases_stand_at_the_best_epoch_of_their_version(make_manifest: MakeManifest) -> None:
    snapshot = snapshot_of(
        KnownVersion(make_manifest(version=1, epochs=EPOCHS, best_epoch=2), State.AVAILABLE),
        KnownVersion(make_manifest(version=2), State.AVAILABLE),
    )
    found = rows(snapshot, flowers={"stable": 1, "old": 1, "next": 2, "gone": 9}, birds={"stable": 2})
    assert [(r.version, r.epoch, r.aliases) for r in found if r.aliases] == [
        (2, 1, ("next",)),
        (1, 2, ("old", "stable")),
    ]


ANYTHING: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.just([])
    | st.just({})
)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_no_manifest_that_can_be_read_stands_in_the_way_of_a_listing(
    make_manifest: MakeManifest, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One bad file must not cost the answer about all the good ones."""
    folder = tmp_path_factory.getbasetemp() / "flowers" / "1"
    folder.mkdir(parents=True, exist_ok=True)
    make_manifest(epochs=EPOCHS).write(folder)
    content: Any = copy.deepcopy(json.loads((folder / MANIFEST_NAME).read_text()))
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(ANYTHING)
            break
        place = place[key]
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    try:
        manifest = Manifest.read(folder)
    except BackbonedError:
        return
    for row in checkpoint_rows(
        snapshot_of(KnownVersion(manifest, State.AVAILABLE)), CheckpointDirectory(folder.parents[1]), {}
    ):
        checkpoint_message(row).SerializeToString()
        for field in checkpoint_fields():
            field.of(row)
