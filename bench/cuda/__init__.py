"""Benchmarks on a CUDA GPU, unattended: ``python -m bench.cuda`` in a checkout, ``make bench-cuda``.

Every kernel is first checked on small odd shapes: against fastconv.reference, and the matrix products in every tile
against sums in float64. Then the layers of shapes/, at the batch of a GPU, are checked and timed beside torch (cuDNN),
CuPy and Liger-Kernel, whichever are installed, and the rows go to measured/<gpu>.csv like those of the CPU. Needs
numba-cuda and one of torch and CuPy; nothing has to be installed of fastconv itself.

Nothing ends the run before its time but the machine: an error is told and counted, and the next job begins. Jobs run in
a process of their own; where it dies, loses the device or hangs, another goes on with the job after the one it was at.

How a call is timed. The device is first made to sleep, until the host has queued a sample of calls: no time of the host
is in the result, and the time that a call costs the host is measured apart. Before each call the second-level cache is
overwritten. A sample is the time between two events around one call; peers take turns.

How a result is checked. All of it: poisoned with nan before the call, and without nan after it; where torch is
installed, close to torch's own float32 result. Some elements, corners among them: against the sum in float64 on the
host, within what rounding may do.

The peaks that rates are compared with are measured in the same run: a copy far larger than the caches, multiply-adds
in registers for float32 and float64, torch's product of two large matrices for what the tensor cores compute.

arrays, peers, checks, clock: what a measurement needs; run: one run; jobs: what it does; command: its options and its
processes.
"""
