"""What every operator owes torch and the user: argument checks, layouts, registration, limits of the CUDA kernels."""
