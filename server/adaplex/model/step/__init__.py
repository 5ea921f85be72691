"""One step as its layers see it: rows, tiles, and which kernels are launched."""
