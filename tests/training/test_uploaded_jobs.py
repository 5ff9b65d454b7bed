"""Jobs on uploaded datasets: found by id, read by their own job alone, and kept while a job needs them."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from backboned.registry import BackbonedError, Catalogue, ErrorKind
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.weights import WeightStore
from backboned.server.database import open_database
from backboned.server.training.events import JobState
from backboned.server.training.jobs import Job, JobStore
from backboned.server.training.options import TrainingOptions
from backboned.server.training.settings import TrainingSettings
from backboned.server.training.standby import Standby
from backboned.server.training.supervisor import JobSupervisor
from backboned.server.training.upload_declaration import Declaration, Entry
from backboned.server.training.upload_images import Writer
from backboned.server.training.uploads import UploadStore


class Telemetry:
    """Counts nothing: no job runs here."""

    def training_jobs(self, _: Mapping[JobState, int]) -> None:
        pass


@pytest.fixture
def uploads(tmp_path: Path) -> UploadStore:
    uploads = UploadStore(tmp_path / "uploads", 2**30)
    uploads.open()
    return uploads


@pytest.fixture
def dataset(uploads: UploadStore, paint: Callable[..., Path], tmp_path: Path) -> str:
    """The id of an uploaded dataset of red and blue pictures."""
    folder = paint(tmp_path / "source", {"red": 3, "blue": 3})
    declaration = Declaration()
    for file in folder.rglob("*.png"):
        data = file.read_bytes()
        path = file.relative_to(folder)
        entry = Entry(path.as_posix(), (path.parts[0],), hashlib.sha256(data).hexdigest(), len(data))
        declaration.append("", [entry])
        uploads.images.write(Writer(), entry, 0, data)
    return uploads.make(declaration).id


@pytest.fixture
def supervisor(
    tmp_path: Path, uploads: UploadStore, catalogue: Catalogue, weights_file: Path
) -> Iterator[JobSupervisor]:
    """One that was not started: what is submitted stays queued."""
    engine = open_database(tmp_path / "state.sqlite")
    (tmp_path / "checkpoints").mkdir()
    files = {"digits": weights_file}
    yield JobSupervisor(
        JobStore(engine),
        directory=CheckpointDirectory(tmp_path / "checkpoints"),
        catalogue=catalogue,
        weights=WeightStore(catalogue, files),
        settings=TrainingSettings(
            tmp_path / "work",
            tmp_path / "features",
            uploads=uploads.datasets_folder,
            weight_files=files,
            device="cpu",
        ),
        telemetry=Telemetry(),  # type: ignore[arg-type]
        standby=Standby((), enabled=False),
        before_success=lambda *_: asyncio.sleep(0),
    )
    engine.dispose()


async def submit(supervisor: JobSupervisor, dataset: str) -> Job:
    return await supervisor.submit(model="m", backbone="digits", dataset=dataset, options=TrainingOptions())


async def refused(awaitable: Any) -> BackbonedError:
    with pytest.raises(BackbonedError) as caught:
        await awaitable
    return caught.value


async def test_a_dataset_is_found_by_its_id_without_a_data_root(
    supervisor: JobSupervisor, uploads: UploadStore, dataset: str
) -> None:
    job = await submit(supervisor, dataset)
    assert (job.folder, job.request.dataset) == (str(uploads.datasets_folder / dataset), dataset)
    error = await refused(submit(supervisor, dataset[:-3] + "zzz"))
    assert error.kind is ErrorKind.PERMISSION_DENIED  # no id: a path
    error = await refused(submit(supervisor, dataset[:-3]))
    assert (error.kind, error.field) == (ErrorKind.NOT_FOUND, "dataset") and f"did you mean {dataset!r}?" in str(error)
    error = await refused(submit(supervisor, str(uploads.datasets_folder / dataset)))
    assert error.kind is ErrorKind.PERMISSION_DENIED


def test_a_job_may_read_its_own_dataset_and_no_other(uploads: UploadStore, tmp_path: Path) -> None:
    datasets, root = uploads.datasets_folder, tmp_path / "root"
    settings = TrainingSettings(tmp_path, tmp_path, (root,), uploads=datasets)
    assert settings.roots_for(str(datasets / "ds-1")) == (root, datasets / "ds-1")
    for folder in (root / "photos", datasets, datasets.parent, datasets / "ds-1" / "red"):
        assert settings.roots_for(str(folder)) == (root,)
    assert TrainingSettings(tmp_path, tmp_path, (root,)).roots_for(str(datasets / "ds-1")) == (root,)


async def test_a_dataset_is_kept_while_a_job_waits_for_it(
    supervisor: JobSupervisor, uploads: UploadStore, dataset: str
) -> None:
    folder = uploads.datasets_folder / dataset
    job = await submit(supervisor, dataset)
    error = await refused(supervisor.release(folder, lambda: uploads.detach(dataset)))
    assert error.kind is ErrorKind.FAILED_PRECONDITION and job.id in error.message and folder.is_dir()
    await supervisor.cancel(job.id)
    await supervisor.release(folder, lambda: uploads.detach(dataset))
    assert not folder.exists()


async def test_no_job_slips_in_while_its_dataset_goes(
    supervisor: JobSupervisor, uploads: UploadStore, dataset: str
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def remove() -> Path:
        began.set()
        assert go_on.wait(60)
        return uploads.detach(dataset)

    removing = asyncio.create_task(supervisor.release(uploads.datasets_folder / dataset, remove))
    await asyncio.to_thread(began.wait, 60)
    submitting = asyncio.create_task(submit(supervisor, dataset))
    await asyncio.sleep(0.2)  # the dataset is still there, and is found
    assert not submitting.done()
    go_on.set()
    await removing
    error = await refused(submitting)
    assert (error.kind, error.field) == (ErrorKind.NOT_FOUND, "dataset")
    assert await supervisor.list_jobs() == []
