"""Benchmarks: random-weight models of real shapes, and how fast they decode. See docs/benchmarks.md."""
