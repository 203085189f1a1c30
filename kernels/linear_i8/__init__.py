"""A linear layer whose weight is stored in eight bits."""
