import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.training.datasets import Access, Dataset, Store, read_dataset
from backboned.server.training.options import TrainingOptions

Read = Callable[..., Dataset]
Refusal = Callable[..., str]

Members = Mapping[str, bytes]
Write = Callable[..., Path]


@pytest.fixture
def photos() -> dict[str, bytes]:
    """Two classes of four files each, images by name only."""
    return {f"{name}/{i}.jpg": f"{name} {i}".encode() for name in ("daisy", "rose") for i in range(4)}


@pytest.fixture
def write_zip() -> Write:
    def write(file: Path, members: Members) -> Path:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return file

    return write


@pytest.fixture
def write_tar() -> Write:
    """Writes, or with mode `a` appends to, a tar; `w:gz` and the like compress it."""

    def write(file: Path, members: Members, mode: str = "w") -> Path:
        with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]  # a mode is any string here
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return file

    return write


@pytest.fixture
def contents() -> Callable[[Dataset], dict[str, bytes]]:
    """All images of a dataset by path, as they are read."""
    return lambda dataset: {s.path: dataset.read(s) for s in (*dataset.train, *dataset.validation, *dataset.test)}


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access([tmp_path], store=Store(tmp_path / ".fetched"))


@pytest.fixture
def read(access: Access) -> Read:
    """Reads a dataset with options."""
    return lambda location, **options: read_dataset(location, TrainingOptions(**options), access)


@pytest.fixture
def refusal(read: Read) -> Refusal:
    """Why a dataset is refused."""

    def why(location: Path | str, **options: object) -> str:
        with pytest.raises(BackbonedError) as caught:
            read(location, **options)
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
        assert caught.value.field == "dataset"
        assert str(location) in caught.value.message
        return caught.value.message

    return why
