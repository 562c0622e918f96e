"""CPU kernels, compiled by Numba: one file per operation, under the same names as in ``fastconv.cuda_kernels``."""
