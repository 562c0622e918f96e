"""GPU kernels (``@cuda.jit``), installed as ``fastconv.cuda_kernels``: one file per operation, named as in ``fastconv.cpu``."""
