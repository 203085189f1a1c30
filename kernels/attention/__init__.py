"""Dense softmax attention, with keys cut off by length."""
