"""Preference data: one record, many formats, and the checks that a file must pass."""
