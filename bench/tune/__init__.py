"""The launch configurations and the backend that are fastest on the GPU at hand."""
