"""A linear layer whose weight is stored in four bits, with a scale for each group of columns."""
