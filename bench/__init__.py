"""Benchmarks: every figure that is claimed anywhere comes from one of these."""
