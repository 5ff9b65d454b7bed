"""Whether a job can be done at all: what is found out in the call that asks for it."""

from dataclasses import replace

from backboned.registry.catalogue import Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import invalid
from backboned.registry.manifest import check_name
from backboned.registry.weights import WeightStore
from backboned.server.training.datasets import Access, check_dataset, resolve_dataset
from backboned.server.training.jobs import JobRequest
from backboned.server.training.settings import TrainingSettings
from backboned.server.training.starting_point import warm_start
from backboned.server.training.uploads import find_upload, is_upload_id

MAX_REQUEST_ID = 128


class Submission:
    """Checks requests. Reads names and manifests only; may be called from any thread."""

    def __init__(
        self, directory: CheckpointDirectory, catalogue: Catalogue, weights: WeightStore, settings: TrainingSettings
    ) -> None:
        self._directory = directory
        self._catalogue = catalogue
        self._weights = weights
        self._settings = settings

    def check(self, request: JobRequest) -> str:
        """The real path of the dataset, or its URI, if the job can start. Raises `BackbonedError` saying what to do."""
        check_name(request.model)
        if len(request.request_id) > MAX_REQUEST_ID:
            raise invalid(
                f"request_id has {len(request.request_id)} characters, at most {MAX_REQUEST_ID} are allowed",
                field="request_id",
            )
        backbone = self._catalogue.get(request.backbone)
        options = request.options.validated(backbone)
        self._weights.check(backbone.name)
        if options.warm_start_version is not None:
            warm_start(self._directory, request.model, options.warm_start_version, backbone)
        access = Access(self._settings.data_roots, self._settings.remote_data)
        location = self._location(request.dataset, access)
        check_dataset(location, options, replace(access, roots=self._settings.roots_for(location)))
        return location

    def _location(self, dataset: str, access: Access) -> str:
        uploads = self._settings.uploads
        if uploads is not None and is_upload_id(dataset):
            return str(find_upload(uploads, dataset, field="dataset"))
        return resolve_dataset(dataset, access.roots, access.remote)
