# mypy: disable-error-code="no-untyped-def"
"""The two Triton kernels: gather and multiply, output row by output row; and the gradient of the weights."""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

VERSION: str = triton.__version__

COUNTS = ["num_in", "num_out"]
"""Arguments that change with every voxel set: kernels are not compiled anew for their divisors."""


@triton.jit(do_not_specialize=COUNTS)
def gather_multiply(
    features,
    weight,
    bias,
    out,
    table,
    order,
    offsets_of_tile,
    offsets_in_tile,
    num_in,
    num_out,
    num_offsets,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FLIPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of the output: ROWS output rows (of the sorted order) by COLUMNS output channels.

    The reduction runs over the kernel offsets that occur in the tile, and within an offset over blocks of DEPTH input
    channels. Input rows go from memory straight into the product; the sum is float32 and stored once.
    """
    tile = tl.program_id(0)
    lanes = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depths = tl.arange(0, DEPTH)
    live = lanes < num_out
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    blocks: tl.constexpr = (IN_CHANNELS + DEPTH - 1) // DEPTH
    for step in range(tl.load(offsets_in_tile + tile) * blocks):
        offset = tl.load(offsets_of_tile + tile * num_offsets + step // blocks)
        if WIDE:
            offset = offset.to(tl.int64)
        row = tl.load(table + offset * num_out + lanes, mask=live, other=num_in)
        present = row < num_in
        if WIDE:
            row = row.to(tl.int64)
        channels = (step % blocks) * DEPTH + depths
        gathered = tl.load(
            features + row[:, None] * IN_CHANNELS + channels[None, :],
            mask=present[:, None] & (channels < IN_CHANNELS)[None, :],
            other=0.0,
        )
        weight_offset = num_offsets - 1 - offset if FLIPPED else offset
        part = tl.load(
            weight + (weight_offset * IN_CHANNELS + channels[:, None]) * OUT_CHANNELS + columns[None, :],
            mask=(channels < IN_CHANNELS)[:, None] & (columns < OUT_CHANNELS)[None, :],
            other=0.0,
        )
        if WIDEN:
            gathered = gathered.to(tl.float32)
            part = part.to(tl.float32)
        total = tl.dot(gathered, part, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < OUT_CHANNELS, other=0.0).to(tl.float32)[None, :]
    place = tl.load(order + lanes, mask=live, other=0)
    if WIDE:
        place = place.to(tl.int64)
    tl.store(
        out + place[:, None] * OUT_CHANNELS + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=live[:, None] & (columns < OUT_CHANNELS)[None, :],
    )


@triton.jit(do_not_specialize=[*COUNTS, "num_tiles", "splits"])
def weight_gradient(
    features,
    grad,
    parts,
    table,
    order,
    tiles_of_offset,
    tiles_in_offset,
    num_in,
    num_out,
    num_offsets,
    num_tiles,
    splits,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One split's part of one offset's gradient: DEPTH input channels by COLUMNS output channels.

    The tiles of rows in which an offset occurs are dealt to the splits in consecutive runs; every program writes its
    own float32 sum into ``parts`` (splits, offsets, in, out), and the caller adds the splits in a fixed order.
    """
    offset = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    if WIDE:
        offset = offset.to(tl.int64)
    channels = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    count = tl.load(tiles_in_offset + offset)
    first = split * (count // splits) + tl.minimum(split, count % splits)  # of counts * splits beyond 2^31 too
    last = first + count // splits + (split < count % splits).to(tl.int32)
    total = tl.zeros((DEPTH, COLUMNS), dtype=tl.float32)
    for number in range(first, last):
        lanes = tl.load(tiles_of_offset + offset * num_tiles + number) * ROWS + tl.arange(0, ROWS)
        live = lanes < num_out
        row = tl.load(table + offset * num_out + lanes, mask=live, other=num_in)
        place = tl.load(order + lanes, mask=live, other=0)
        present = row < num_in
        if WIDE:
            row = row.to(tl.int64)
            place = place.to(tl.int64)
        gathered = tl.load(
            features + row[None, :] * IN_CHANNELS + channels[:, None],
            mask=present[None, :] & (channels < IN_CHANNELS)[:, None],
            other=0.0,
        )
        arrived = tl.load(
            grad + place[:, None] * OUT_CHANNELS + columns[None, :],
            mask=present[:, None] & (columns < OUT_CHANNELS)[None, :],
            other=0.0,
        )
        if WIDEN:
            gathered = gathered.to(tl.float32)
            arrived = arrived.to(tl.float32)
        total = tl.dot(gathered, arrived, total, input_precision=PRECISION)
    base = (split * num_offsets + offset) * IN_CHANNELS
    tl.store(
        parts + (base + channels[:, None]) * OUT_CHANNELS + columns[None, :],
        total,
        mask=(channels < IN_CHANNELS)[:, None] & (columns < OUT_CHANNELS)[None, :],
    )


INTERPRETED = isinstance(gather_multiply, InterpretedFunction)
"""Whether Triton runs these kernels in Python, on any device: TRITON_INTERPRET=1 was set when they were loaded."""
