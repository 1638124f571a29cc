"""Auto-Rubric: labelled pairs (or captions alone) -> generate -> verify -> refine -> structure ->
select -> a rubric. Judge and writer stay frozen (arXiv 2605.08354, eq. 5 to 10).

Importing this package imports neither torch nor transformers.
"""
