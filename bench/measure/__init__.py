"""How it is measured: clocks and rounds, memory, and the distance from float64."""
