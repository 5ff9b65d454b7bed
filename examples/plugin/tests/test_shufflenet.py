"""What a plugin needs to test: that Backboned finds its backbone, and that the backbone conforms."""

from backboned.registry import Catalogue, assert_conformant


def test_the_backbone_is_found_by_its_entry_point() -> None:
    """Needs the package to be installed."""
    catalogue = Catalogue.from_entry_points()
    assert catalogue.origin("shufflenet_v2_x1_0").startswith("backboned-shufflenet ")
    assert [plugin for plugin in catalogue.broken if plugin.name == "shufflenet"] == []


def test_the_backbone_conforms() -> None:
    """Fails with a line for each thing that training or serving could trip over."""
    assert_conformant(Catalogue.from_entry_points().get("shufflenet_v2_x1_0"))
