"""Machinery of the compiled CPU kernels.

    emit.py      LLVM vector code from Python: the pieces that micro-kernels are made of
    compile.py   operations compiled by numba, kept in a cache on disk, chosen by instruction set
    team.py      a team of threads that runs a whole forward pass as one compiled call

An operation is a compiled function `op(args, state, tid, num_threads)` over raw addresses. A program
is a table of operations; the team walks it together, each ending when its work is done, so that a step
costs one call from Python and no thread is ever woken inside it. The kernels themselves lie in
`polybatch/kernels/<operation>/cpu.py`, beside their references.
"""
