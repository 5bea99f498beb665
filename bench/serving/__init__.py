"""Benchmarks of servers that learn."""
