"""Whatever changes below the directory is a hint; looking at it is none."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from backboned.registry.look import Part
from backboned.server.serving.watch import Watcher, WatchMode, needs_polling

TIMEOUT_SECONDS = 30.0

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/models /mnt/models nfs4 rw 0 0
/dev/sdb1 /mnt/models/local xfs rw 0 0
share /mnt/with\\040space cifs rw 0 0
gcs /mnt/bucket fuse.gcsfuse rw 0 0
first /mnt/twice nfs rw 0 0
second /mnt/twice ext4 rw 0 0
broken
"""


class Hints:
    """Is told of changes, counts them, and waits for one."""

    def __init__(self) -> None:
        self.count = 0
        self.parts: set[Part] = set()
        self.closed: set[Path] = set()
        self.anything = False
        self._came = threading.Event()

    def everything(self) -> None:
        self.anything = True
        self._told()

    def changed(self, parts: Iterable[Part], closed: Path | None = None) -> None:
        self.parts |= set(parts)
        self.closed |= set() if closed is None else {closed}
        self._told()

    @property
    def models(self) -> set[str]:
        return {model for model, _ in self.parts}

    def _told(self) -> None:
        self.count += 1
        self._came.set()

    def come_after(self, action: Callable[[], object]) -> bool:
        self._came.clear()
        action()
        return self._came.wait(TIMEOUT_SECONDS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints" / "flowers").mkdir(parents=True)
    (tmp_path / "checkpoints" / "flowers" / "there.pt").write_bytes(b"x")
    (tmp_path / "outside.pt").write_bytes(b"x")
    return tmp_path / "checkpoints"


@pytest.fixture
def hints() -> Hints:
    return Hints()


@pytest.fixture
def watcher(root: Path, hints: Hints) -> Iterator[Watcher]:
    watcher = Watcher(root, hints, "inotify")
    watcher.ensure()
    yield watcher
    watcher.stop()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/srv/models", False),
        ("/mnt/models", True),
        ("/mnt/models/flowers", True),
        ("/mnt/models-elsewhere", False),
        ("/mnt/models/local/flowers", False),
        ("/mnt/with space/flowers", True),
        ("/mnt/bucket", True),
        ("/mnt/twice", False),
    ],
)
def test_a_file_system_whose_changes_are_made_elsewhere_is_polled(path: str, expected: bool) -> None:
    assert needs_polling(Path(path), MOUNTS) is expected


def test_an_unknown_table_of_mounts_changes_nothing() -> None:
    assert not needs_polling(Path("/srv"), "")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "new.pt").write_bytes(b"x"),
        lambda folder: (folder / "there.pt").write_bytes(b"y"),
        lambda folder: (folder / "there.pt").rename(folder / "new.pt"),
        lambda folder: (folder / "there.pt").unlink(),
        lambda folder: (folder / "there.pt").rename(folder.parents[1] / "gone.pt"),
        lambda folder: (folder.parents[1] / "outside.pt").rename(folder / "new.pt"),
        lambda folder: (folder / "new.pt").hardlink_to(folder.parents[1] / "outside.pt"),
        lambda folder: (folder / "new.pt").symlink_to(folder / "there.pt"),
        lambda folder: (folder / "1").mkdir(),
        lambda folder: (folder.parent / "birds").mkdir(),
    ],
    ids=["write", "rewrite", "rename", "remove", "rename out", "rename in", "link", "symlink", "version", "model"],
)
def test_every_way_for_something_to_come_or_go_is_a_hint(
    watcher: Watcher, hints: Hints, root: Path, change: Callable[[Path], object]
) -> None:
    assert hints.come_after(lambda: change(root / "flowers"))
    assert hints.models <= {"flowers", "birds"} and len(hints.models) == 1 and not hints.anything


@pytest.mark.parametrize("linked", [False, True])
def test_files_that_were_closed_or_renamed_are_told(root: Path, hints: Hints, linked: bool) -> None:
    """Whoever wrote them is done: they needn't stand still first."""
    given = root.parent / "link" if linked else root
    if linked:
        given.symlink_to(root)
    watcher = Watcher(given, hints, "inotify")
    watcher.ensure()
    (root / "flowers" / "written.pt").write_bytes(b"x")
    (root / "flowers" / "there.pt").rename(root / "flowers" / "renamed.pt")
    expected = {given / "flowers" / "written.pt", given / "flowers" / "renamed.pt"}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while hints.closed != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hints.closed == expected and hints.models == {"flowers"}
    watcher.stop()


def test_looking_is_no_hint(watcher: Watcher, hints: Hints, root: Path) -> None:
    file = root / "flowers" / "a.pt"
    assert hints.come_after(lambda: file.write_bytes(b"x"))
    assert hints.come_after(file.unlink)  # the file's own events have all come
    for _ in range(200):
        (root / "flowers").stat()
        list(os.scandir(root / "flowers"))
    before = hints.count
    assert hints.come_after((root / "marker").mkdir)
    assert hints.count - before < 100  # events keep their order: those of looking would have come before


def test_what_has_a_name_of_its_own_until_it_is_whole_is_no_hint(watcher: Watcher, hints: Hints, root: Path) -> None:
    version = root / "flowers" / "1"
    assert hints.come_after(version.mkdir)
    writing = version / ".writing-1"
    before = hints.count
    for _ in range(100):
        writing.write_bytes(b"x")
    assert hints.come_after(lambda: writing.rename(version / "epoch-0001.pt"))
    assert hints.count == before + 1
    assert hints.parts == {("flowers", 1)} and hints.closed == {version / "epoch-0001.pt"}


def test_links_that_are_exchanged_behind_a_dot_are_a_hint(watcher: Watcher, hints: Hints, root: Path) -> None:
    """As Kubernetes does it: which models they lead to isn't known here."""
    (root.parent / "first").mkdir()
    assert hints.come_after(lambda: (root / "..data_tmp").symlink_to(root.parent / "first"))
    assert hints.come_after(lambda: (root / "..data_tmp").rename(root / "..data"))
    assert not hints.models and not hints.anything


def test_a_directory_that_is_removed_may_have_changed_anyhow(watcher: Watcher, hints: Hints, root: Path) -> None:
    shutil.rmtree(root / "flowers")
    assert hints.come_after(root.rmdir)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not hints.anything and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hints.anything


def test_a_directory_that_was_replaced_is_watched_again(watcher: Watcher, hints: Hints, root: Path) -> None:
    root.rename(root.parent / "away")
    watcher.ensure()  # nothing there: nothing happens
    root.mkdir()
    watcher.ensure()
    assert hints.come_after((root / "flowers").mkdir)


@pytest.mark.parametrize("mode", ["polling", "auto"])
def test_polling_watches_nothing_and_says_so(root: Path, hints: Hints, mode: WatchMode) -> None:
    watcher = Watcher(root, hints, mode)
    before = set(threading.enumerate())
    watcher.ensure()
    started = bool(set(threading.enumerate()) - before)
    watcher.stop()
    assert started is not watcher.polling
    assert watcher.polling or mode == "auto"


def test_after_a_stop_there_are_no_hints_and_no_threads(root: Path, hints: Hints) -> None:
    before = set(threading.enumerate())
    watcher = Watcher(root, hints, "inotify")
    watcher.ensure()
    watcher.ensure()  # once is enough
    watcher.stop()
    watcher.stop()
    assert not set(threading.enumerate()) - before
    count = hints.count
    (root / "birds").mkdir()
    assert hints.count == count


def test_a_directory_that_is_a_link_is_watched_where_it_leads(root: Path, hints: Hints, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(root)
    watcher = Watcher(link, hints, "inotify")
    watcher.ensure()
    try:
        assert hints.come_after((root / "birds").mkdir)
        assert hints.come_after(lambda: (root / "flowers" / "new.pt").write_bytes(b"x"))
        other = tmp_path / "other"
        other.mkdir()
        link.unlink()
        link.symlink_to(other)
        watcher.ensure()
        assert hints.come_after((other / "birds").mkdir)
    finally:
        watcher.stop()
