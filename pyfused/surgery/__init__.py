"""Changing a model: finds, replaces, freezes and counts its modules; knows no method."""
