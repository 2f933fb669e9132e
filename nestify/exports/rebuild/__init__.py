"""A narrower or shallower level as a model that timm's own constructor builds."""

from nestify.exports.rebuild.arguments import without_weights
from nestify.exports.rebuild.rebuilt import Rebuilt, rebuild

__all__ = ["Rebuilt", "rebuild", "without_weights"]
