"""Rows cut by top-k, top-p or min-p, without sorting the vocabulary.

Order a row best first, equals by id. Each cut keeps a beginning of that order, and so the draw is a search
for the place where a running sum (of ones for top-k, of weights otherwise) passes a target. The value at that
place is found by narrowing an interval of float32 bit patterns, read as integers that order like the numbers,
three probes a pass; among equals, place and weight follow by arithmetic. Nothing is sorted and every sum has
a fixed order, so a row's token depends on that row alone.

Passes run over few candidates where possible: a row's k best columns lie in the k spans with the best maxima.
Those columns, or the best 64 and then 512 for top-p and min-p, are gathered first. Where they turn out to
hold less than the nucleus, or more than fit, the passes run over the whole row, about 20 µs each.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

CANDIDATES = 4096
"""Columns gathered per row at most, and columns per pass of a program."""

FIRST_SPANS = 64
"""Spans looked at first where top-k does not say how many are needed."""


def truncate(
    logits: torch.Tensor,
    best: torch.Tensor,
    sums: torch.Tensor,
    spans: torch.Tensor,
    values: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    tokens: torch.Tensor,
    finite: torch.Tensor,
    *,
    span: int,
) -> None:
    """Overwrite the tokens of finite rows that are drawn and cut; other rows' programs end at once.

    logits: [L, V]. best, sums: [L, spans] float32, of `_measure_spans`. spans, values, ids: workspace,
    [L, spans] int32, [L, CANDIDATES] float32 and int32. The others as in the package's docstring.
    """
    rows, vocab = logits.shape
    num_spans = best.shape[1]
    chunk = min(CANDIDATES, max(span, triton.next_power_of_2(vocab)))
    _truncate[(rows,)](
        logits, logits.stride(0), vocab, num_spans, best, sums, spans, values, ids,
        temperature, top_k, top_p, min_p, uniform, tokens, finite,
        BLOCK=triton.next_power_of_2(num_spans), SPAN=span, SPANS=chunk // span, FIRST=FIRST_SPANS,
        CHUNK=chunk, num_warps=8,
    )  # fmt: skip


@triton.jit
def _key(x):
    """Integer that orders like the float32 scalar x, int64."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _number(key):
    """The float32 of a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(low, high, key_1, key_2, key_3, ok_1, ok_2, ok_3):
    """The part of [low, high) that probes leave: they pass up to the place and not beyond."""
    new_low = tl.where(ok_3, key_3, tl.where(ok_2, key_2, tl.where(ok_1, key_1, low)))
    new_high = tl.where(ok_3, high, tl.where(ok_2, key_3, tl.where(ok_1, key_2, key_1)))
    return new_low, new_high


@triton.jit
def _probes(low, high):
    """Three keys in (low, high), ascending; the interval holds at least two."""
    width = high - low
    return low + tl.maximum(width // 4, 1), low + width // 2, low + width * 3 // 4


@triton.jit
def _scaled(values, at, count, heat):
    """values / temperature, -inf beyond count."""
    return tl.div_rn(tl.load(values + at, mask=at < count, other=-float("inf")).to(tl.float32), heat)


@triton.jit
def _weight(x, top, floor):
    """exp(x - top), or 0 below min_p."""
    weight = tl.exp(x - top)
    return tl.where(weight >= floor, weight, 0.0)


@triton.jit
def _sums_from(
    values, count, heat, top, floor, key_1, key_2, key_3, COUNT: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Sums over x >= each of three keys: of ones where COUNT, else of weights; float64."""
    sum_1 = tl.zeros([CHUNK], tl.float32)
    sum_2 = tl.zeros([CHUNK], tl.float32)
    sum_3 = tl.zeros([CHUNK], tl.float32)
    bound_1, bound_2, bound_3 = _number(key_1), _number(key_2), _number(key_3)
    start = count * 0
    while start < count:
        x = _scaled(values, start + tl.arange(0, CHUNK), count, heat)
        if COUNT:
            weight = tl.full([CHUNK], 1.0, tl.float32)
        else:
            weight = _weight(x, top, floor)
        sum_1 += tl.where(x >= bound_1, weight, 0.0)
        sum_2 += tl.where(x >= bound_2, weight, 0.0)
        sum_3 += tl.where(x >= bound_3, weight, 0.0)
        start += CHUNK
    return tl.sum(sum_1.to(tl.float64)), tl.sum(sum_2.to(tl.float64)), tl.sum(sum_3.to(tl.float64))


@triton.jit
def _place(
    values, count, heat, top, floor, target, low,
    COUNT: tl.constexpr, PAST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Largest key from low on whose sum, of x >= key, reaches target, or passes it where PAST; the sum above.

    low is taken to reach it whatever its sum, so rounding cannot leave the order.
    """
    high = _key(top) + 1
    above = target * 0.0
    while high - low > 1:
        key_1, key_2, key_3 = _probes(low, high)
        sum_1, sum_2, sum_3 = _sums_from(
            values, count, heat, top, floor, key_1, key_2, key_3, COUNT, CHUNK
        )  # fmt: skip
        if PAST:
            ok_1, ok_2, ok_3 = sum_1 > target, sum_2 > target, sum_3 > target
        else:
            ok_1, ok_2, ok_3 = sum_1 >= target, sum_2 >= target, sum_3 >= target
        above = tl.where(ok_3, above, tl.where(ok_2, sum_3, tl.where(ok_1, sum_2, sum_1)))
        low, high = _narrow(low, high, key_1, key_2, key_3, ok_1, ok_2, ok_3)
    return low, above


@triton.jit
def _draw(
    values, ids, count, heat, top, least, total, k, p, floor, number,
    HAS_IDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Token drawn from values[:count] / heat, whose ids ascend (and are ids[:count] where HAS_IDS).

    top, least: best and least of them; the cuts lie between. Without top-k and top-p, least is too
    light to be kept. total: weight of the whole row relative to its best.
    """
    off = floor * 0.0
    # Kept are all above this key, and so many of those at it.
    last = _key(least)
    at_last = count.to(tl.float64)
    if k > 0:
        last, above = _place(values, count, heat, top, off, k.to(tl.float64), last, True, False, CHUNK)
        at_last = k - above
        key = last + 1
        mass, _1, _2 = _sums_from(values, count, heat, top, off, key, key, key, False, CHUNK)
        total = mass + at_last * tl.exp(_number(last) - top)
    if p < 1:
        cut, above = _place(values, count, heat, top, off, p * total, last, False, False, CHUNK)
        weight = tl.exp(_number(cut) - top).to(tl.float64)
        fitting = tl.where(weight > 0, tl.ceil((p * total - above) / weight), at_last)
        # Rounding must not take the best token away.
        fitting = tl.maximum(fitting, 1.0)
        at_last = tl.where(cut == last, tl.minimum(fitting, at_last), fitting)
        last = cut
    key = last + 1
    mass, _1, _2 = _sums_from(values, count, heat, top, floor, key, key, key, False, CHUNK)
    mass += at_last * _weight(_number(last), top, floor)
    # A product rounded up to the total would pass no running sum.
    target = tl.minimum(number * mass, mass * (1.0 - 2.0**-52))
    drawn, above = _place(values, count, heat, top, floor, target, last, False, True, CHUNK)
    weight = tl.exp(_number(drawn) - top).to(tl.float64)
    turn = tl.where(weight > 0, tl.floor((target - above) / weight), 0.0)
    turn = tl.where(drawn == last, tl.minimum(turn, at_last - 1.0), turn)
    turn = tl.maximum(turn, 0.0)
    # The last of the equals up to that turn: there may be one fewer than the sums say.
    bound = _number(drawn)
    seen = count * 0
    token = count * 0
    start = count * 0
    while start < count:
        at = start + tl.arange(0, CHUNK)
        equal = (_scaled(values, at, count, heat) == bound) & (at < count)
        rank = seen + tl.cumsum(equal.to(tl.int32), 0) - 1
        taken = tl.where(equal & (rank.to(tl.float64) <= turn), at, -1)
        token = tl.maximum(token, tl.max(taken))
        seen += tl.sum(equal.to(tl.int32))
        start += CHUNK
    if HAS_IDS:
        token = tl.load(ids + token)
    return token


@triton.jit
def _best_spans(most, wanted):
    """Value of the wanted-th best of spans, most: [spans], -inf where there is none."""
    low = _key(tl.max(most) * 0.0 - float("inf"))
    high = _key(tl.max(most)) + 1
    while high - low > 1:
        key_1, key_2, key_3 = _probes(low, high)
        ok_1 = tl.sum((most >= _number(key_1)).to(tl.int32)) >= wanted
        ok_2 = tl.sum((most >= _number(key_2)).to(tl.int32)) >= wanted
        ok_3 = tl.sum((most >= _number(key_3)).to(tl.int32)) >= wanted
        low, high = _narrow(low, high, key_1, key_2, key_3, ok_1, ok_2, ok_3)
    return _number(low)


@triton.jit
def _gather(
    logits, vocab, heat, top, most, num_spans, bound, spans, values, ids,
    SPAN: tl.constexpr, SPANS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write columns with x >= bound, ascending; returns how many there are and their weight."""
    index = tl.arange(0, most.shape[0])
    active = (most >= bound) & (index < num_spans)
    tl.store(spans + tl.cumsum(active.to(tl.int32), 0) - 1, index, mask=active)
    num_active = tl.sum(active.to(tl.int32))
    tl.debug_barrier()
    count = num_active * 0
    mass = tl.zeros([CHUNK], tl.float32)
    start = num_active * 0
    while start < num_active:
        turn = start + tl.arange(0, SPANS)
        span = tl.load(spans + turn, mask=turn < num_active, other=num_spans)
        column = tl.reshape(span[:, None] * SPAN + tl.arange(0, SPAN)[None, :], [CHUNK])
        x = _scaled(logits, column, vocab, heat)
        taken = (x >= bound) & (column < vocab)
        place = count + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(values + place, x, mask=taken & (place < CHUNK))
        tl.store(ids + place, column, mask=taken & (place < CHUNK))
        mass += tl.where(taken, tl.exp(x - top), 0.0)
        count += tl.sum(taken.to(tl.int32))
        start += SPANS
    tl.debug_barrier()
    return count, tl.sum(mass.to(tl.float64))


@triton.jit
def _truncate(
    logits, stride, vocab, num_spans, best, sums, spans, values, ids,
    temperature, top_k, top_p, min_p, uniform, tokens, finite,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, FIRST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    if heat <= 0:
        return
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    floor = tl.load(min_p + row).to(tl.float32)
    # Rows that are not finite keep the token they have.
    if ((k <= 0) & (p >= 1) & (floor <= 0)) | (tl.load(finite + row) == 0):
        return
    index = tl.arange(0, BLOCK)
    inside = index < num_spans
    most = tl.load(best + row * num_spans + index, mask=inside, other=-float("inf"))
    most = tl.div_rn(most, heat)
    top = tl.max(most)
    mass = tl.load(sums + row * num_spans + index, mask=inside, other=0.0) * tl.exp(most - top)
    total = tl.sum(mass.to(tl.float64))

    logits += row * stride
    values += row * CHUNK
    ids += row * CHUNK
    wanted = tl.where(k > 0, k, FIRST)
    is_covered = k < 0
    count = k * 0
    bound = heat * 0.0 - float("inf")
    while (wanted <= num_spans) & (count <= CHUNK) & (is_covered == 0):
        bound = _best_spans(most, wanted)
        count, held = _gather(
            logits, vocab, heat, top, most, num_spans, bound, spans + row * num_spans, values, ids,
            SPAN, SPANS, CHUNK,
        )  # fmt: skip
        is_enough = (k > 0) | ((p < 1) & (held >= p * total)) | (tl.exp(bound - top) < floor)
        is_covered = (count <= CHUNK) & is_enough
        wanted *= 8
    number = tl.load(uniform + row)
    if is_covered:
        token = _draw(
            values, ids, count, heat * 0.0 + 1.0, top, bound, total, k, p, floor, number, True, CHUNK
        )  # fmt: skip
    else:
        bound = heat * 0.0 - float("inf")
        token = _draw(logits, ids, vocab, heat, top, bound, total, k, p, floor, number, False, CHUNK)
    tl.store(tokens + row, token)
