"""How sure a model is of each pixel: spreads, calibrated intervals, the area of applicability."""
