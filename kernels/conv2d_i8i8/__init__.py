"""A convolution of integers alone: int8 times int8, summed in int32, scaled by dyadic numbers."""
