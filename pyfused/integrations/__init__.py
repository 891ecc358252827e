"""Layers that other libraries made, which run on the operators and stay those libraries' own."""
