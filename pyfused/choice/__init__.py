"""Given an operator, a device, dtypes and sizes: the backends in order, and why."""
