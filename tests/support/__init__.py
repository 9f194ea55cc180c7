"""Slow and plain implementations that the tests hold the library against."""
