"""Softmax and norms of integers: multiplications, additions and shifts."""
