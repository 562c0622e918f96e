"""Vector kernels: what plain loops of Numba cannot say, written as loops over vectors and compiled by LLVM.

    tile.py      the vectors of this machine, and how many of them the kernels hold in registers
    emit.py      the language: typed values with operators; two kinds of loop, written out and run by the machine
    call.py      `vector_function`, which makes of a kernel in that language a function that compiled code calls
    memory.py    pointers in compiled code: offsets, addresses, atomics

and the kernels, each with a sibling of plain loops beside it that says what it computes:

    gemm.py      products of packed weights and pixels, and the weight gradient's
    depthwise_rows.py, depthwise_channels.py, depthwise_planes.py
                 one filter and one plane, with rows or channels in the lanes
    winograd.py, spectra.py
                 transforms of tiles, and products in the frequency domain
    softmax.py   maxima, exponentials and sums of rows and columns of classes
    move.py      copies, by strides and by transposes
"""
