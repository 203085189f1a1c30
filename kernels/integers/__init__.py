"""Between real numbers and eight-bit integers: quantize, dequantize, requantize."""
