"""gatefit's compiled kernels: the C++ sources, their build, and their binary interface."""
