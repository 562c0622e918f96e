"""Vector kernels: what plain loops of Numba cannot say, written as loops over vectors and compiled by LLVM.

    tile.py    the vectors of this machine, and how many of them the kernels hold in registers
    emit.py    the language: typed values with operators; two kinds of loop, written out and run by the machine
    call.py    `vector_function`, which makes of a kernel in that language a function that compiled code calls
    memory.py  pointers in compiled code: offsets, addresses, atomics
"""
