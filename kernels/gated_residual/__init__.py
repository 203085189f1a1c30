"""A residual sum whose second term passes a gate."""
