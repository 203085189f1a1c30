"""Average pooling of integers: sums in int32, divided by a dyadic number."""
