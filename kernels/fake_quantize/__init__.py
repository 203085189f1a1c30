"""Rounding to a grid of integers in float, with gradients that pass straight through."""
