import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.training.datasets import Access, Dataset, Store, check_dataset, read_dataset
from backboned.server.training.datasets import remote as remote_module
from backboned.server.training.datasets.data_roots import resolve_dataset
from backboned.server.training.datasets.remote import permits
from backboned.server.training.options import TrainingOptions

Members = dict[str, bytes]
Write = Callable[..., Path]
Contents = Callable[[Dataset], Members]


class Site:
    """A web site on the loopback interface: files by path, where paths redirect to, and what was asked for."""

    def __init__(self) -> None:
        self.files: Members = {}
        self.redirects: dict[str, str] = {}
        self.cut: set[str] = set()
        self.marks: dict[str, str] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                site.asked.append(self.path)
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                content = site.files.get(self.path)
                if target := site.redirects.get(self.path):
                    self.send_response(302)
                    self.send_header("Location", target)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                elif content is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    if mark := site.marks.get(self.path, "1"):
                        self.send_header("ETag", mark)
                    self.end_headers()
                    if with_body:
                        self.wfile.write(content[: len(content) // 2] if self.path in site.cut else content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, daemon=True)
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()
    thread.join()


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access([tmp_path], ["http"], Store(tmp_path / ".fetched"))


def read(uri: str, access: Access) -> Dataset:
    location = resolve_dataset(uri, access.roots, access.remote)
    check_dataset(location, TrainingOptions(), access)
    return read_dataset(location, TrainingOptions(), access)


def refusal(uri: str, access: Access) -> BackbonedError:
    with pytest.raises(BackbonedError) as caught:
        read(uri, access)
    assert caught.value.field == "dataset"
    return caught.value


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_is_fetched_once_while_it_stays_the_same(  # noqa: PLR0917 - fixtures
    site: Site, access: Access, tmp_path: Path, photos: Members, write_zip: Write, write_tar: Write, contents: Contents,
    kind: str,
) -> None:  # fmt: skip
    write = write_zip if kind == "zip" else write_tar
    modes = {"tar.gz": ["w:gz"]}.get(kind, [])
    site.files[f"/a.{kind}"] = write(tmp_path / "a", photos, *modes).read_bytes()
    uri = f"{site.url}/a.{kind}?signature=secret"
    site.files[f"/a.{kind}?signature=secret"] = site.files[f"/a.{kind}"]
    dataset = read(uri, access)
    assert contents(dataset) == photos
    assert dataset.location == f"{site.url}/a.{kind}"
    fetched = site.asked.count(f"/a.{kind}?signature=secret")
    assert read(uri, access).fingerprint == dataset.fingerprint
    assert site.asked.count(f"/a.{kind}?signature=secret") == fetched == 1
    site.files[f"/a.{kind}?signature=secret"] = write(
        tmp_path / "a", {**photos, "rose/9.jpg": b"new"}, *modes
    ).read_bytes()
    site.marks[f"/a.{kind}?signature=secret"] = "2"
    assert contents(read(uri, access))["rose/9.jpg"] == b"new"


def test_a_manifest_names_files_beside_it(site: Site, access: Access, contents: Contents) -> None:
    files = {f"img/{i} x.jpg": f"{i}".encode() for i in range(6)}
    site.files = {f"/d/{name.replace(' ', '%20')}": content for name, content in files.items()}
    rows = "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(files))
    site.files["/d/labels.csv"] = f"file,labels\n{rows}img/gone.jpg,a\n".encode()
    read(f"{site.url}/d/labels.csv", access)
    dataset = read(f"{site.url}/d/labels.csv", access)
    samples = {s.path: s for s in (*dataset.train, *dataset.validation)}
    gone = samples.pop("img/gone.jpg")
    assert {path: dataset.read(s) for path, s in samples.items()} == files
    with pytest.raises(BackbonedError, match="can't be fetched: there is no such file"):
        dataset.read(gone)
    assert site.asked.count("/d/img/1%20x.jpg") == 1


def test_shards_are_fetched_with_the_classes_beside_them(
    site: Site, access: Access, tmp_path: Path, write_tar: Write
) -> None:
    for i in range(2):
        members = {"a.jpg": b"", "a.cls": b"0", "b.jpg": b"", "b.cls": b"1"}
        site.files[f"/s-{i}.tar"] = write_tar(tmp_path / "s", members).read_bytes()
    site.files["/classes.txt"] = b"zebra\napple"
    dataset = read(f"{site.url}/s-{{0..1}}.tar", access)
    assert dataset.classes == ("zebra", "apple")
    assert len(dataset.train) + len(dataset.validation) == 4


def test_what_breaks_off_leaves_nothing_and_the_next_try_works(
    site: Site, access: Access, tmp_path: Path, photos: Members, write_zip: Write
) -> None:
    site.files["/a.zip"] = write_zip(tmp_path / "a.zip", photos).read_bytes()
    site.cut.add("/a.zip")
    assert "can't be fetched" in refusal(f"{site.url}/a.zip", access).message
    assert [f for f in (tmp_path / ".fetched").rglob("*") if f.is_file()] == []
    site.cut.clear()
    assert read(f"{site.url}/a.zip", access).classes == ("daisy", "rose")


def test_what_has_no_mark_is_fetched_each_time(
    site: Site, access: Access, tmp_path: Path, photos: Members, write_zip: Write
) -> None:
    site.files["/a.zip"] = write_zip(tmp_path / "a.zip", photos).read_bytes()
    site.marks["/a.zip"] = ""
    for _ in range(2):
        read(f"{site.url}/a.zip", access)
    assert site.asked.count("/a.zip") == 2


def test_a_file_that_is_not_there_is_not_found(site: Site, access: Access) -> None:
    error = refusal(f"{site.url}/absent.zip", access)
    assert error.kind is ErrorKind.NOT_FOUND
    assert "there is no such file" in error.message


def test_a_server_that_is_not_there_is_told(access: Access) -> None:
    assert "Cannot connect to host 127.0.0.1:9" in refusal("http://127.0.0.1:9/a.zip", access).message


def test_what_leaves_no_room_is_not_fetched(site: Site, access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files["/a.zip"] = bytes(1000)
    monkeypatch.setattr(Store, "room_bytes", lambda _: 999)
    assert refusal(f"{site.url}/a.zip", access).kind is ErrorKind.RESOURCE_EXHAUSTED
    assert site.asked == []


def test_a_job_that_is_cancelled_stops_fetching(site: Site, tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError("cancelled")

    site.files["/a.zip"] = bytes(1000)
    access = Access([tmp_path], ["http"], Store(tmp_path / ".fetched"), stop)
    with pytest.raises(BackbonedError, match="can't be read") as caught:
        read(f"{site.url}/a.zip", access)
    assert isinstance(caught.value.__cause__, InterruptedError)


def test_a_folder_is_refused_over_http(site: Site, access: Access) -> None:
    assert "files can't be listed over http: give an archive" in refusal(f"{site.url}/photos", access).message


def test_a_redirect_is_followed_only_to_where_the_daemon_may_fetch(
    site: Site, access: Access, tmp_path: Path, photos: Members, write_zip: Write
) -> None:
    site.files["/open/a.zip"] = site.files["/inside/a.zip"] = write_zip(tmp_path / "a.zip", photos).read_bytes()
    site.redirects = {"/open/b.zip": "/open/a.zip", "/open/c.zip": "/inside/a.zip"}
    limited = Access(access.roots, [f"{site.url}/open/"], access.store)
    assert read(f"{site.url}/open/b.zip", limited).classes == ("daisy", "rose")
    assert "it redirects to" in refusal(f"{site.url}/open/c.zip", limited).message
    assert "/inside/a.zip" not in site.asked


def test_nothing_is_fetched_unless_the_daemon_is_told(tmp_path: Path) -> None:
    error = refusal("s3://bucket/photos", Access([tmp_path]))
    assert error.kind is ErrorKind.PERMISSION_DENIED
    assert "--remote-data s3" in error.message


def test_a_missing_driver_is_told_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "find_spec", lambda _: None)
    error = refusal("gs://bucket/photos", Access([tmp_path], ["gs"]))
    assert error.kind is ErrorKind.FAILED_PRECONDITION
    assert "pip install 'backboned[server,remote]'" in error.message


@pytest.mark.parametrize(
    ("uri", "allowed", "expected"),
    [
        ("s3://bucket/a", ["s3"], True),
        ("gs://bucket/a", ["s3"], False),
        ("http://host/a", ["https"], False),
        ("HTTPS://host/a", ["https"], True),
        ("https://host/data/a.zip", ["https://host/data"], True),
        ("https://HOST/data/a.zip", ["https://host/data/"], True),
        ("https://host/database/a.zip", ["https://host/data"], False),
        ("https://host.evil.org/data/a.zip", ["https://host/data"], False),
        ("https://host:444/data/a.zip", ["https://host/data"], False),
        ("s3://bucket/a", ["s3://bucket"], True),
        ("s3://bucket2/a", ["s3://bucket"], False),
    ],
)
def test_permission_is_by_scheme_or_by_the_beginning(uri: str, allowed: list[str], expected: bool) -> None:
    assert permits(allowed, uri) is expected


@pytest.mark.parametrize(
    "uri",
    [
        "https://host/data/../secret.zip",
        "https://host/data/%2e%2e/secret.zip",
        "https://user:password@host/a.zip",
        "https://host:port/a.zip",
        "https:///a.zip",
        "s3://bucket/a{.tar",
    ],
)
def test_a_uri_that_may_mean_another_place_is_refused(uri: str, tmp_path: Path) -> None:
    error = refusal(uri, Access([tmp_path], ["https", "s3"]))
    assert error.kind is ErrorKind.INVALID_ARGUMENT
    assert "password@" not in error.message


@pytest.mark.parametrize("uri", ["file::s3://bucket/a.zip", "simplecache::https://host/a.zip", "zip://a::file:///etc"])
def test_chained_uris_are_not_understood(uri: str, tmp_path: Path) -> None:
    assert refusal(uri, Access([tmp_path], ["https", "s3"])).kind is ErrorKind.INVALID_ARGUMENT
