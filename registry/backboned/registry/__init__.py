"""What a backbone, a checkpoint and a model are, by name and on disk.

Plugin authors need `register`, `Backbone`, `Stage`, `Head`, `Preprocessing` and `check_backbone`.
"""

from backboned.registry.backbone import Backbone, Head, Preprocessing, Stage
from backboned.registry.catalogue import BackboneFamily, Catalogue, register
from backboned.registry.conformance import Check, ConformanceReport, assert_conformant, check_backbone
from backboned.registry.errors import BackbonedError, ErrorKind

__all__ = [
    "Backbone",
    "BackboneFamily",
    "BackbonedError",
    "Catalogue",
    "Check",
    "ConformanceReport",
    "ErrorKind",
    "Head",
    "Preprocessing",
    "Stage",
    "assert_conformant",
    "check_backbone",
    "register",
]
