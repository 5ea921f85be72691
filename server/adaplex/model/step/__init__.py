"""One step as the layers of a model see it: rows, tiles, and which kernels are launched."""
