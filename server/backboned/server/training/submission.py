"""Whether a job can be done at all: what is found out in the call that asks for it."""

from backboned.registry.catalogue import Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import invalid
from backboned.registry.manifest import check_name
from backboned.registry.weights import WeightStore
from backboned.server.training.datasets import Access, check_dataset, resolve_dataset
from backboned.server.training.jobs import JobRequest
from backboned.server.training.settings import TrainingSettings
from backboned.server.training.starting_point import warm_start

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
        location = resolve_dataset(request.dataset, access.roots, access.remote)
        check_dataset(location, options, access)
        return location
