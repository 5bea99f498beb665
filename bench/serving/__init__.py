"""Measurements of servers that learn."""
