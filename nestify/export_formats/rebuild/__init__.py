"""A narrower or shallower level as a model that timm's own constructor builds."""

from nestify.export_formats.rebuild.arguments import without_weights
from nestify.export_formats.rebuild.rebuilt import Rebuilt, rebuild

__all__ = ["Rebuilt", "rebuild", "without_weights"]
