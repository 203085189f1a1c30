"""Between real numbers and integers, and between grids of integers: quantize, dequantize, requantize."""
