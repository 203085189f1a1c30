"""Softmax attention that computes only the blocks of a table, with the tokens in any order."""
