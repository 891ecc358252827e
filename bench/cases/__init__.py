"""What is measured: each operator's shapes, their tensors and least work, and who is timed at them."""
