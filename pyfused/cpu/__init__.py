"""What backend ``cpu`` does in Python, around the C++ kernels of csrc/cpu/."""
