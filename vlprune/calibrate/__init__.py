"""What a pruner can learn from a model once, offline: the mathematics on recorded tensors, and how to record them."""

from vlprune.calibrate.entropy import EntropyCurve, entropy_collapse, entropy_collapse_layer, matrix_entropy
from vlprune.calibrate.focal import FocalLayers, focal_layers, focal_layers_of
from vlprune.calibrate.shift import change_point, shift_layers
from vlprune.calibrate.trend import PositionalTrend, Trend, fit_trend, positional_trend

__all__ = [
    "EntropyCurve",
    "FocalLayers",
    "PositionalTrend",
    "Trend",
    "change_point",
    "entropy_collapse",
    "entropy_collapse_layer",
    "fit_trend",
    "focal_layers",
    "focal_layers_of",
    "matrix_entropy",
    "positional_trend",
    "shift_layers",
]
