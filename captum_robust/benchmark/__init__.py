"""Comparison of attribution methods over a data set."""
