"""Whole models that are measured, and what trains them."""
