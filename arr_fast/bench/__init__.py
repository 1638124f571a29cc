"""Benchmarks: workloads, the engines to compare against, and checkpoints to run them on."""
