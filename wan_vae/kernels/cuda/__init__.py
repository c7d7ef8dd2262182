"""CUDA C++ kernels, compiled at run time for the card in the machine; no compiler is installed."""
