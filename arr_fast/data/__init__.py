"""Preference data: what is read from files."""
