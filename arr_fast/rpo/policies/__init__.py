"""Generators behind one protocol (`base.Policy`)."""
