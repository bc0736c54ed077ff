"""Wide items of ragged attention for Hopper GPUs, in Gluon: copies, products and softmax at the same time.

A program fills a multiprocessor. One warpgroup copies keys and values, which lie in pages, into a ring in
shared memory; two others take half of the query rows each. While a turn's weights are computed, the products
with the values of the turn before run, and so do the other warpgroup's, which keeps its own time. Items,
masks and results are those of `cuda.py`, whose kernel does the same everywhere else.

Keys and values of a shared prefix were written before the step: they are sent for before the kernel before
has ended. Queries, and keys of chunks, are read after its end.

Source: FlashAttention-3 (Shah et al. 2024).
"""

# Gluon's own types know nothing of kernels.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Of a warpgroup. Registers of a thread: at the start, then where products are made and where copies are.
WARPS = gl.constexpr(4)
MAX_REGISTERS = 168
PRODUCT_REGISTERS, COPY_REGISTERS = gl.constexpr(224), gl.constexpr(56)


@gluon.jit
def _await(barriers, turn, STAGES: gl.constexpr):
    """Wait until the ring's slot of a turn is filled, by ordinary writes, for products to read."""
    mbarrier.wait(barriers.index(turn % STAGES), turn // STAGES & 1)
    fence_async_shared()


@gluon.jit
def _softmax(
    scores, m, total, key, position, end, scale, KEYS: gl.constexpr, S: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """A turn of the online softmax: (largest score, sum of weights, what earlier sums shrink by, weights)."""
    if MASKED:
        keys = key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S))
        seen = (keys[None, :] <= position[:, None]) & (keys < end)[None, :]
        scores = gl.where(seen, scores, float("-inf"))
    top = gl.maximum(m, gl.max(scores, 1) * scale)
    # A row that has seen nothing yet keeps -inf; its exponents use 0 instead.
    base = gl.where(top == float("-inf"), 0.0, top)
    weights = gl.exp2(scores * scale - base[:, None])
    correction = gl.exp2(m - base)
    return top, total * correction + gl.sum(weights, 1), correction, weights


@gluon.jit
def _turn(
    turn, key, end, position, m, total, acc, weights, q, ring, scale,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """This turn's scores, last turn's weighted values, then this turn's weights while those are added."""
    k_ring, v_ring, k_filled, v_filled, k_free, v_free = ring
    _await(k_filled, turn, STAGES)
    scores = warpgroup_mma(
        q, k_ring.index(turn % STAGES).permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, layout=S),
        use_acc=False, is_async=True,
    )  # fmt: skip
    _await(v_filled, turn - 1, STAGES)
    acc = warpgroup_mma(weights, v_ring.index((turn - 1) % STAGES), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_free.index(turn % STAGES))
    m, total, correction, exact = _softmax(scores, m, total, key, position, end, scale, KEYS, S, MASKED)
    weights = gl.convert_layout(exact.to(weights.dtype), weights.type.layout)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index((turn - 1) % STAGES))
    acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, acc.type.layout))[:, None]
    return m, total, acc, weights


@gluon.jit
def _rows_of(
    first, num_tokens, is_group, tokens_ptr, kv_head, G: gl.constexpr, FIRST: gl.constexpr,
    ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Each row's token and head, and whether it has one."""
    row = FIRST + gl.arange(0, ROWS, layout=LAYOUT)
    held = row // G < num_tokens
    token = first + row // G
    if is_group:
        token = gl.load(tokens_ptr + token, mask=held, other=0)
    return token, kv_head * G + row % G, held


@gluon.jit
def _attend(
    q_ptr, q_stride, out_ptr, out_stride, lse_ptr, num_items, items_ptr, tokens_ptr, parts_ptr, partial_ptr,
    partial_lse_ptr, scale, q_shared, ring,
    HALF: gl.constexpr, H: gl.constexpr, KH: gl.constexpr, D: gl.constexpr, HAS_LSE: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, IS_DEPENDENT: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of the rows of every item of this program."""
    G: gl.constexpr = H // KH
    FIRST: gl.constexpr = HALF * ROWS
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    k_ring, v_ring, k_filled, v_filled, k_free, v_free = ring
    turn = 0
    for program in range(gl.program_id(0), num_items * KH, gl.num_programs(0)):
        kv_head = program % KH
        item = items_ptr + program // KH * 8
        first, num_tokens = gl.load(item), gl.load(item + 1)
        begin, end, part = gl.load(item + 3), gl.load(item + 4), gl.load(item + 5)
        flags, first_position = gl.load(item + 6), gl.load(item + 7)
        is_part, is_group = flags % 2 == 1, flags >= 2
        turns = gl.maximum((end - begin + KEYS - 1) // KEYS, 1)
        token, head, held = _rows_of(
            first, num_tokens, is_group, tokens_ptr, kv_head, G, FIRST, ROWS, gl.SliceLayout(1, COPY)
        )
        d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
        q_at = q_ptr + (token.to(gl.int64) * q_stride + head * D)[:, None] + d[None, :]
        if IS_DEPENDENT:
            gdc_wait()
            if HALF == 0:
                gdc_launch_dependents()
        async_copy.async_copy_global_to_shared(q_shared, q_at, mask=held[:, None])
        async_copy.commit_group()
        token, head, held = _rows_of(
            first, num_tokens, is_group, tokens_ptr, kv_head, G, FIRST, ROWS, OUT_ROWS
        )
        first_part = gl.load(parts_ptr + 2 * token, mask=held & is_part, other=0)
        position = first_position + (FIRST + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))) // G
        async_copy.wait_group(0)
        gl.thread_barrier()
        q = q_shared

        _await(k_filled, turn, STAGES)
        scores = warpgroup_mma(
            q, k_ring.index(turn % STAGES).permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, layout=S),
            use_acc=False, is_async=True,
        )  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(turn % STAGES))
        m = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S))
        m, total, _, exact = _softmax(scores, m, total, begin, position, end, scale, KEYS, S, True)
        weights = gl.convert_layout(exact.to(dtype), WEIGHTS)
        acc = gl.zeros([ROWS, D], gl.float32, layout=OUT)
        # Turns whose keys every row sees need no masks.
        unmasked = gl.maximum((gl.minimum(first_position + 1, end) - begin) // KEYS, 1)
        for j in range(1, unmasked):
            m, total, acc, weights = _turn(
                turn + j, begin + j * KEYS, end, position, m, total, acc, weights, q, ring, scale,
                ROWS, KEYS, STAGES, S, False,
            )  # fmt: skip
        for j in range(unmasked, turns):
            m, total, acc, weights = _turn(
                turn + j, begin + j * KEYS, end, position, m, total, acc, weights, q, ring, scale,
                ROWS, KEYS, STAGES, S, True,
            )  # fmt: skip
        turn += turns
        _await(v_filled, turn - 1, STAGES)
        acc = warpgroup_mma(weights, v_ring.index((turn - 1) % STAGES), acc, is_async=True)
        log_sum = gl.where(total > 0, m + gl.log2(gl.where(total > 0, total, 1.0)), float("-inf"))
        log_sum = gl.convert_layout(log_sum, OUT_ROWS)
        total = gl.convert_layout(total, OUT_ROWS)
        d = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))[None, :]
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index((turn - 1) % STAGES))
        out = acc / gl.where(total > 0, total, 1.0)[:, None]
        if is_part:
            place = (first_part + part).to(gl.int64) * H + head
            gl.store(partial_ptr + place[:, None] * D + d, out, mask=held[:, None])
            gl.store(partial_lse_ptr + place, log_sum, mask=held)
        else:
            place = token.to(gl.int64) * out_stride + head * D
            gl.store(out_ptr + place[:, None] + d, out.to(out_ptr.dtype.element_ty), mask=held[:, None])
            if HAS_LSE:
                gl.store(lse_ptr + token * H + head, log_sum * 0.6931471805599453, mask=held)


@gluon.jit
def _copy(
    pool_ptr, page_stride, table_ptr, table_stride, num_items, items_ptr, ring,
    KH: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    IS_DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Keys and values of every item of this program, each turn's as soon as a slot of the ring is free."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    k_ring, v_ring, k_filled, v_filled, k_free, v_free = ring
    d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    offset = gl.arange(0, KEYS, layout=gl.SliceLayout(1, COPY))
    turn = 0
    for program in range(gl.program_id(0), num_items * KH, gl.num_programs(0)):
        item = items_ptr + program // KH * 8
        row, begin, end, flags = gl.load(item + 2), gl.load(item + 3), gl.load(item + 4), gl.load(item + 6)
        if IS_DEPENDENT:  # noqa: SIM102 the outer condition is known when compiling
            if flags < 2:
                gdc_wait()
        pool = pool_ptr + program % KH * PAGE * D
        table = table_ptr + row.to(gl.int64) * table_stride
        for j in range(gl.maximum((end - begin + KEYS - 1) // KEYS, 1)):
            key = begin + j * KEYS + offset
            page = gl.load(table + key // PAGE, mask=key < end, other=0)
            at = pool + (page.to(gl.int64) * page_stride + (key % PAGE) * D)[:, None] + d[None, :]
            # Slots past the end may hold NaN, which a weight of zero would not silence: zeros instead.
            held = (key < end)[:, None]
            slot, lap = turn % STAGES, turn // STAGES & 1 ^ 1
            mbarrier.wait(k_free.index(slot), lap)
            async_copy.async_copy_global_to_shared(k_ring.index(slot), at, mask=held)
            async_copy.mbarrier_arrive(k_filled.index(slot), increment_count=False)
            mbarrier.wait(v_free.index(slot), lap)
            async_copy.async_copy_global_to_shared(v_ring.index(slot), at + KH * PAGE * D, mask=held)
            async_copy.mbarrier_arrive(v_filled.index(slot), increment_count=False)
            turn += 1


# The step's arrays lie anywhere in one buffer: their alignment must not decide what is compiled.
@gluon.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "num_items_ptr", "items_ptr", "tokens_ptr", "parts_ptr"],
)
def wide_attention_kernel(
    q_ptr, q_stride, out_ptr, out_stride, lse_ptr, pool_ptr, page_stride, table_ptr, table_stride,
    num_items_ptr, items_ptr, tokens_ptr, parts_ptr, partial_ptr, partial_lse_ptr, scale,
    H: gl.constexpr, KH: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, HAS_LSE: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, IS_DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs. Parts are left for `merge_parts_kernel`; there is no window.

    D is 64 or 128, of 16-bit numbers. Launch with num_warps=WARPS and maxnreg=MAX_REGISTERS.
    """
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    HALF: gl.constexpr = ROWS // 2
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], dtype)
    KV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], dtype)
    q_shared = gl.allocate_shared_memory(dtype, [2, HALF, D], Q)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], KV)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], KV)
    k_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_filled.index(i), count=32 * WARPS)  # every thread that copies arrives
        mbarrier.init(v_filled.index(i), count=32 * WARPS)
        mbarrier.init(k_free.index(i), count=2)  # both warpgroups that read
        mbarrier.init(v_free.index(i), count=2)
    gl.thread_barrier()
    ring = (k_ring, v_ring, k_filled, v_filled, k_free, v_free)
    num_items = gl.load(num_items_ptr)
    # Programs with work wait, and one program always: whoever starts next relies on it.
    if IS_DEPENDENT:  # noqa: SIM102 the outer condition is known when compiling
        if (num_items == 0) & (gl.program_id(0) == 0):
            gdc_wait()
    gl.warp_specialize(
        [
            (_attend, (
                q_ptr, q_stride, out_ptr, out_stride, lse_ptr, num_items, items_ptr, tokens_ptr, parts_ptr,
                partial_ptr, partial_lse_ptr, scale, q_shared.index(0), ring,
                0, H, KH, D, HAS_LSE, HALF, KEYS, STAGES, IS_DEPENDENT,
            )),
            (_attend, (
                q_ptr, q_stride, out_ptr, out_stride, lse_ptr, num_items, items_ptr, tokens_ptr, parts_ptr,
                partial_ptr, partial_lse_ptr, scale, q_shared.index(1), ring,
                1, H, KH, D, HAS_LSE, HALF, KEYS, STAGES, IS_DEPENDENT,
            )),
            (_copy, (
                pool_ptr, page_stride, table_ptr, table_stride, num_items, items_ptr, ring,
                KH, D, PAGE, KEYS, STAGES, IS_DEPENDENT,
            )),
        ],
        [WARPS, WARPS], [PRODUCT_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
