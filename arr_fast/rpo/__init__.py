"""Rubric Policy Optimization: rollouts, judged pairs, and the compiled training step."""
