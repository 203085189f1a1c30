"""Patterns of sparse attention: what each head may attend to, as values of one small algebra."""
