"""Products of two int8 activations, summed in int32 and requantized."""
