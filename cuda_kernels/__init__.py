"""GPU kernels (``@cuda.jit``), installed as ``fastconv.cuda_kernels``: one file per operation, named as on the CPU.

Nothing is imported here: what needs `numba.cuda` is imported when a CUDA call asks for it.
"""
