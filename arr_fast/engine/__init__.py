"""The engine: prefix trees packed into one ragged forward over transformers' own layers."""
