"""Given an operator, a device, dtypes and sizes: the backend and the plan of each direction, and why."""
