"""Functions of one integer, by a table."""
