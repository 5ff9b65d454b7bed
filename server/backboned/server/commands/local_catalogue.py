"""The backbones that are installed here, for commands that need no daemon. It brings torch."""

from pathlib import Path

from backboned.registry import Catalogue, ConformanceReport
from backboned.registry import check_backbone as check
from backboned.registry.weights import WeightStore
from backboned.server.config import load_config
from backboned.v1 import model_service_pb2 as pb


def list_backbones(config_file: Path | None) -> pb.ListBackbonesResponse:
    """What a daemon with this configuration would list."""
    config = load_config(file=config_file).config
    catalogue = Catalogue.installed(config.plugin)
    weights = WeightStore(catalogue, config.weights)
    return pb.ListBackbonesResponse(
        backbones=[
            pb.Backbone(
                name=backbone.name,
                description=backbone.description,
                stages=backbone.stage_names,
                feature_size=backbone.feature_size,
                input_size=backbone.preprocessing.crop_size,
                origin=catalogue.origin(backbone.name),
                weights=weights.source(backbone.name),
            )
            for backbone in catalogue
        ],
        broken=[pb.BrokenPlugin(name=b.name, origin=b.origin, reason=b.reason) for b in catalogue.broken],
        families=[family.prefix for family in catalogue.families],
    )


def check_backbone(name: str, config_file: Path | None) -> ConformanceReport:
    """The conformance report of an installed backbone. Raises `BackbonedError` for an unknown name."""
    return check(Catalogue.installed(load_config(file=config_file).config.plugin).get(name))
