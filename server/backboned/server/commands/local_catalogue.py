"""The backbones that are installed here, for commands that need no daemon. It brings torch."""

from pathlib import Path

from backboned.registry import Catalogue, ConformanceReport
from backboned.registry import check_backbone as check
from backboned.registry.catalogue import load_plugin_module
from backboned.registry.errors import invalid
from backboned.registry.weights import WeightStore
from backboned.server.config import Config, load_config
from backboned.v1 import model_service_pb2 as pb


def local_catalogue(config: Config) -> Catalogue:
    """What installed distributions offer, and the modules that the configuration names.

    Raises `BackbonedError` for a module that can't be added.
    """
    catalogue = Catalogue.from_entry_points()
    for name in config.plugin:
        try:
            module = load_plugin_module(name)
        except ImportError as error:
            raise invalid(f"can't import the plugin {name!r}: {error}", field="plugin") from error
        catalogue.add(module, name)
    return catalogue


def list_backbones(config_file: Path | None) -> pb.ListBackbonesResponse:
    """What a daemon with this configuration would list."""
    config = load_config(file=config_file).config
    catalogue = local_catalogue(config)
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
    return check(local_catalogue(load_config(file=config_file).config).get(name))
