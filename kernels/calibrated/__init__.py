"""The identity that carries the range of its value, as calibration found it."""
