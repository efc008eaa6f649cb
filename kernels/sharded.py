"""What a sharded step does between its exchanges, in one launch each where PyTorch's operations take ten.

`fave_fast/sharded.py` has the same as tensor operations, under the same names: the reference, and what a CPU runs.
"""

import triton
import triton.language as tl

_INT31 = tl.constexpr(0x7FFFFFFF)
MOST_MERGED = 4096  # keys of a row that one program of `merge` ranks


@triton.jit
def _local(number, first, rows):
    """Numbers among this rank's rows; 0 for items of other ranks."""
    local = number - (first - 1)
    return tl.where((local > 0) & (local < rows), local, 0)


@triton.jit(do_not_specialize=["first", "rows", "n"])
def _local_numbers(numbers, out, first, rows, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(numbers + place, mask=place < n, other=0)
    tl.store(out + place, _local(number, first, rows), mask=place < n)


@triton.jit(do_not_specialize=["first", "rows"])
def _stage(ids, offsets, table, staged, tokens, first, rows, WORDS: tl.constexpr, W: tl.constexpr):
    """One of a user's newest items: its row, as words, and where that is."""
    user, age, width = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    word = tl.arange(0, W)
    if user + age == 0:
        tl.store(staged + word, tl.zeros([W], tl.int32), mask=word < WORDS)
    place = tl.load(offsets + user + 1).to(tl.int64) - 1 - age
    present = place >= tl.load(offsets + user)
    number = tl.load(ids + tl.maximum(place, 0))
    row = tl.where(present, _local(number, first, rows), 0).to(tl.int64)
    found = tl.load(table + row * WORDS + word, mask=word < tl.where(row > 0, WORDS, 0), other=0)
    token = 1 + user * width + age
    tl.store(staged + token.to(tl.int64) * WORDS + word, found, mask=word < WORDS)
    if present:
        tl.store(tokens + place, token)


@triton.jit(do_not_specialize=["first", "n"])
def _pack_keys(scores, ids, keys, first, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + place, mask=place < n, other=0.0)
    number = tl.load(ids + place, mask=place < n, other=0)
    number = tl.where(number > 0, number + (first - 1), 0)
    bits = score.to(tl.int32, bitcast=True)
    negative_zero = (score == 0) & (bits < 0)
    bits = tl.where(score == 0, 0, bits)
    ordered = (bits ^ ((bits >> 31) & _INT31)).to(tl.int64)
    key = (ordered << 32) | ((_INT31 - number) << 1) | negative_zero.to(tl.int64)
    tl.store(keys + place, key, mask=place < n)


@triton.jit(do_not_specialize=["batch", "k", "n"])
def _merge(keys, scores, ids, batch, k, n, N: tl.constexpr):
    """The k largest of a row's keys [n / k, batch, k] in their order; of equal ones, which are alike, the first."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, N)
    at = keys + (lane // k * batch + row) * k + lane % k
    key = tl.load(at, mask=lane < n, other=-(1 << 63))
    rank = tl.zeros([N], tl.int32)
    for rank_of in range(0, n // k):
        for place in range(0, k):
            other = tl.load(keys + (rank_of * batch + row) * k + place)
            before = (other > key) | ((other == key) & (rank_of * k + place < lane))
            rank += before.to(tl.int32)
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & _INT31)
    bits = tl.where((key & 1) == 1, -(1 << 31), bits)
    number = _INT31 - ((key & 0xFFFFFFFF) >> 1)
    listed = (lane < n) & (rank < k)
    tl.store(scores + row * k + rank, bits.to(tl.float32, bitcast=True), mask=listed)
    tl.store(ids + row * k + rank, number, mask=listed)


def local_numbers(numbers, out, *, first, rows):
    """Of `numbers` [n] those among this rank's `rows`, of which item `first` is number 1, to `out`; 0 for others."""
    n = numbers.numel()
    if n > 0:
        _local_numbers[(triton.cdiv(n, 1024),)](numbers, out, first, rows, n, BLOCK=1024, num_warps=4)


def stage(ids, offsets, table, staged, tokens, *, first, width):
    """Rows of each history's newest items, and where they are.

    `table` int32 [n + 1, words], `staged` int32 [1 + B * width, words]: zeros first, then of each history the rows of
    its newest items, the newest first, zeros where an item is another rank's; `tokens` int32 [T]: the place of each of
    `ids` [T] there, not written where an item is older. There is at least one of `ids`.
    """
    words = table.shape[1]
    _stage[(len(offsets) - 1, width)](
        ids, offsets, table, staged, tokens, first, len(table),
        WORDS=words, W=triton.next_power_of_2(words), num_warps=1,
    )  # fmt: skip


def pack_keys(scores, ids, keys, *, first):
    """Keys int64 [B, k] of scores float32 and this rank's numbers int64, 0 where a list has ended."""
    n = keys.numel()
    if n > 0:
        _pack_keys[(triton.cdiv(n, 1024),)](scores, ids, keys, first, n, BLOCK=1024, num_warps=4)


def merge(keys, scores, ids):
    """Scores float32 [B, k] and numbers int64 of the k largest of keys [ranks, B, k], ranks * k up to `MOST_MERGED`."""
    ranks, batch, k = keys.shape
    n = ranks * k
    if batch > 0:
        size = max(128, triton.next_power_of_2(n))
        _merge[(batch,)](keys, scores, ids, batch, k, n, N=size, num_warps=4 if size <= 512 else 8)
