"""The sum of two tensors on different grids of integers, on a third grid: a residual connection."""
