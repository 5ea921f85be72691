"""C kernels for the CPU, built by the system compiler at first start and cached."""
