"""The kernels that `triton_launch` launches: what one program computes for its tile of output pixels and its group of channels.

Pixel shuffle, scope, gain, base grid and clamping are index arithmetic in registers, done once a tile; a loop over the
group's channels follows. A tile is (channels, pixels), or (pixels, channels) for channels_last, so that its last axis, along
which neighbouring threads lie, is the one that is contiguous in memory. Arithmetic is float32 whatever the dtypes.

Arguments of both kernels: sizes and strides in elements; step and centre of the base grid, see `triton_launch._axis`;

    CELLS_Y, CELLS_X, SCOPE, GAIN, NEAREST   the Scheme
    CHANNELS_LAST                            the layout of x and of the result; the field may have any
    VECTOR                                   elements to which every pixel's first channel is aligned, for channels_last
    PIXELS, COLUMNS, CHANNELS                output pixels of a tile, the width of that tile, channels at a time
    WHOLE                                    whether CHANNELS divides the number of channels of a group
    OF_X, OF_FIELD                           the gradients that are wanted
    FIXED_POINT                              whether gradients of x are summed as 64-bit integers, in units of 1 / scale
"""
# Arguments of a kernel are Triton's own values.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

# Sizes and strides change from call to call in a detector, and triton would compile anew for every combination of "is 1"
# and "is a multiple of 16" among them. What loads have to know of strides is in CHANNELS_LAST and VECTOR.
_VARYING = [
    *("groups", "per_group", "height", "width", "target_height", "target_width"),
    *(f"{tensor}_{axis}" for tensor in ("x", "field") for axis in ("batch", "channel", "row", "column")),
]


@triton.jit
def _pixels(value, CHANNELS_LAST: tl.constexpr):
    """A value of each pixel, as the pixel axis of a tile."""
    return value[:, None] if CHANNELS_LAST else value[None, :]


@triton.jit
def _channels(value, CHANNELS_LAST: tl.constexpr):
    """A value of each channel, as the channel axis of a tile."""
    return value[None, :] if CHANNELS_LAST else value[:, None]


@triton.jit
def _read(pointer, mask, MASKED: tl.constexpr = True):
    value = tl.load(pointer, mask=mask, other=0.0) if MASKED else tl.load(pointer)
    return value.to(tl.float32)


@triton.jit
def _base(index, step, centre, size, NEAREST: tl.constexpr):
    """`sampling.positions` of output indices, along an axis of `size` source pixels."""
    position = (index.to(tl.float32) + centre) * step
    if NEAREST:
        position = tl.minimum(tl.floor(position), (size - 1).to(tl.float32))
    else:
        position -= centre
    return position


@triton.jit
def _taps(position, size):
    """The two pixels read along an axis, the weight of the second, and whether the sample moves with the position.

    On the border itself it does not: torch's `clip_coordinates_set_grad` counts 0 and size - 1 as clamped.
    """
    last = (size - 1).to(tl.float32)
    free = (position > 0) & (position < last)
    # Of a number and a NaN both give the number, so that no position leads outside of x.
    position = tl.minimum(tl.maximum(position, 0.0), last)
    low = position.to(tl.int32)
    return low, tl.minimum(low + 1, size - 1), position - low.to(tl.float32), free


@triton.jit
def _points(
    field,
    groups, per_group, height, width, target_height, target_width,
    x_batch, x_channel, x_row, x_column, field_batch, field_channel, field_row, field_column,
    step_y, step_x, centre_y, centre_x,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, SCOPE: tl.constexpr, GAIN: tl.constexpr, NEAREST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, PIXELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The output pixels of this program.

    Returns:
        the index of its group among those of all images, and where it starts in x and in the result;
        where the pixels lie in the result from there, and which of them exist;
        where the four pixels that each reads lie in x, and the weights of the right two and of the lower two;
        where its horizontal offset lies in the field, and how much further the vertical one;
        offsets, sigmoids of their scopes, and whether the sample moves with them: each horizontal, then vertical.
    """
    rows: tl.constexpr = PIXELS // COLUMNS
    across = tl.cdiv(target_width, COLUMNS)
    tiles = across * tl.cdiv(target_height, rows)
    plane = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    # Only within one image are 32 bits enough: see `triton_launch.supports`.
    batch = (plane // groups).to(tl.int64)
    group = plane % groups
    pixel = tl.arange(0, PIXELS)
    row = tile // across * rows + pixel // COLUMNS
    column = tile % across * COLUMNS + pixel % COLUMNS
    inside = (row < target_height) & (column < target_width)

    # The field's channels are (offset or scope, axis, group, sub-pixel).
    cell = (group * CELLS_Y + row % CELLS_Y) * CELLS_X + column % CELLS_X
    axis = groups * CELLS_Y * CELLS_X * field_channel
    field_at = batch * field_batch
    field_at += cell * field_channel + row // CELLS_Y * field_row + column // CELLS_X * field_column
    move_x = _read(field + field_at, inside)
    move_y = _read(field + (field_at + axis), inside)
    sigmoid_x = 1.0
    sigmoid_y = 1.0
    if SCOPE:
        sigmoid_x = tl.sigmoid(_read(field + (field_at + 2 * axis), inside))
        sigmoid_y = tl.sigmoid(_read(field + (field_at + 3 * axis), inside))
    position_x = _base(column, step_x, centre_x, width, NEAREST) + GAIN * sigmoid_x * move_x
    position_y = _base(row, step_y, centre_y, height, NEAREST) + GAIN * sigmoid_y * move_y
    left, right, weight_x, free_x = _taps(position_x, width)
    top, bottom, weight_y, free_y = _taps(position_y, height)

    x_at = tl.multiple_of(batch * x_batch + group * per_group * x_channel, VECTOR)
    top_left = tl.multiple_of(top * x_row + left * x_column, VECTOR)
    top_right = tl.multiple_of(top * x_row + right * x_column, VECTOR)
    bottom_left = tl.multiple_of(bottom * x_row + left * x_column, VECTOR)
    bottom_right = tl.multiple_of(bottom * x_row + right * x_column, VECTOR)
    channels = groups * per_group
    result_at = batch * channels * target_height * target_width
    place = row * target_width + column
    if CHANNELS_LAST:
        result_at = tl.multiple_of(result_at + group * per_group, VECTOR)
        place = tl.multiple_of(place * channels, VECTOR)
    else:
        result_at += group * per_group * target_height * target_width
    return (
        plane, x_at, result_at, _pixels(place, CHANNELS_LAST), _pixels(inside, CHANNELS_LAST),
        _pixels(top_left, CHANNELS_LAST), _pixels(top_right, CHANNELS_LAST),
        _pixels(bottom_left, CHANNELS_LAST), _pixels(bottom_right, CHANNELS_LAST),
        _pixels(weight_x, CHANNELS_LAST), _pixels(weight_y, CHANNELS_LAST),
        field_at, axis, inside, move_x, move_y, sigmoid_x, sigmoid_y, free_x, free_y,
    )  # fmt: skip


@triton.jit
def _part(
    first, inside, per_group, x_channel, target_height, target_width,
    CHANNELS_LAST: tl.constexpr, CHANNELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Channels from `first`: how far they lie from the group's first in x and in the result, and what exists in each."""
    channel = first + tl.arange(0, CHANNELS)
    if CHANNELS_LAST:
        x_at = channel
        result_at = channel
    else:
        x_at = channel * x_channel
        result_at = channel * (target_height * target_width)
    known = _channels(channel < per_group, CHANNELS_LAST)
    return (
        _channels(x_at, CHANNELS_LAST), _channels(result_at, CHANNELS_LAST), known, inside if WHOLE else inside & known,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    x, field, out,
    groups, per_group, height, width, target_height, target_width,
    x_batch, x_channel, x_row, x_column, field_batch, field_channel, field_row, field_column,
    step_y, step_x, centre_y, centre_x,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, SCOPE: tl.constexpr, GAIN: tl.constexpr, NEAREST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    PIXELS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the tile's part of `out`, dense (B, C, h, w) in x's layout."""
    (
        _, x_at, out_at, place, inside, top_left, top_right, bottom_left, bottom_right, weight_x, weight_y,
        _, _, _, _, _, _, _, _, _,
    ) = _points(
        field, groups, per_group, height, width, target_height, target_width,
        x_batch, x_channel, x_row, x_column, field_batch, field_channel, field_row, field_column,
        step_y, step_x, centre_y, centre_x,
        CELLS_Y, CELLS_X, SCOPE, GAIN, NEAREST, CHANNELS_LAST, VECTOR, PIXELS, COLUMNS,
    )  # fmt: skip
    # Pointers, and in the loop one number added to all of them, make a third fewer instructions than offsets.
    top_left, top_right = x + x_at + top_left, x + x_at + top_right
    bottom_left, bottom_right = x + x_at + bottom_left, x + x_at + bottom_right
    out_here = out + out_at + place
    for first in range(0, per_group, CHANNELS):
        step, out_step, known, mask = _part(
            first, inside, per_group, x_channel, target_height, target_width, CHANNELS_LAST, CHANNELS, WHOLE
        )
        # A clamped position lies in x, also that of a pixel which does not exist: only channels need a mask.
        corner = _read(top_left + step, known, not WHOLE)
        beside = _read(top_right + step, known, not WHOLE)
        below = _read(bottom_left + step, known, not WHOLE)
        across = _read(bottom_right + step, known, not WHOLE)
        # In the order in which torch's bilinear resize adds them.
        upper = (1 - weight_x) * corner + weight_x * beside
        lower = (1 - weight_x) * below + weight_x * across
        value = (1 - weight_y) * upper + weight_y * lower
        tl.store(out_here + out_step, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add(pointer, value, mask, FIXED_POINT: tl.constexpr):
    """Add to gradients of x, to which other points add as well."""
    tl.atomic_add(pointer, value.to(tl.int64) if FIXED_POINT else value, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=_VARYING)
def backward_kernel(
    grad, x, field, grad_x, grad_field, scale,
    groups, per_group, height, width, target_height, target_width,
    x_batch, x_channel, x_row, x_column, field_batch, field_channel, field_row, field_column,
    step_y, step_x, centre_y, centre_x,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, SCOPE: tl.constexpr, GAIN: tl.constexpr, NEAREST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    PIXELS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WHOLE: tl.constexpr,
    OF_X: tl.constexpr, OF_FIELD: tl.constexpr, FIXED_POINT: tl.constexpr,
):  # fmt: skip
    """Add to `grad_x` and write `grad_field`, which have the strides of x and field, from `grad`, which is as `out` was."""
    (
        plane, x_at, grad_at, place, inside, top_left, top_right, bottom_left, bottom_right, weight_x, weight_y,
        field_at, axis, exists, move_x, move_y, sigmoid_x, sigmoid_y, free_x, free_y,
    ) = _points(
        field, groups, per_group, height, width, target_height, target_width,
        x_batch, x_channel, x_row, x_column, field_batch, field_channel, field_row, field_column,
        step_y, step_x, centre_y, centre_x,
        CELLS_Y, CELLS_X, SCOPE, GAIN, NEAREST, CHANNELS_LAST, VECTOR, PIXELS, COLUMNS,
    )  # fmt: skip
    grad_here = grad + grad_at + place
    # Summed over channels after the loop: threads that share a pixel then meet once.
    slope_x = tl.zeros((PIXELS, CHANNELS) if CHANNELS_LAST else (CHANNELS, PIXELS), tl.float32)
    slope_y = slope_x
    for first in range(0, per_group, CHANNELS):
        step, grad_step, known, mask = _part(
            first, inside, per_group, x_channel, target_height, target_width, CHANNELS_LAST, CHANNELS, WHOLE
        )
        value = _read(grad_here + grad_step, mask)
        if OF_FIELD:
            corner = _read(x + x_at + top_left + step, known, not WHOLE)
            beside = _read(x + x_at + top_right + step, known, not WHOLE)
            below = _read(x + x_at + bottom_left + step, known, not WHOLE)
            across = _read(x + x_at + bottom_right + step, known, not WHOLE)
            slope_x += value * ((1 - weight_y) * (beside - corner) + weight_y * (across - below))
            slope_y += value * ((1 - weight_x) * (below - corner) + weight_x * (across - beside))
        if OF_X:
            if FIXED_POINT:
                # No finite gradient is that large in these units; of others only the scale, then NaN, is to tell.
                value = tl.minimum(tl.maximum(value * tl.load(scale + plane), -4.6e18), 4.6e18)
            upper = (1 - weight_y) * value
            lower = weight_y * value
            _add(grad_x + x_at + top_left + step, (1 - weight_x) * upper, mask, FIXED_POINT)
            _add(grad_x + x_at + top_right + step, weight_x * upper, mask, FIXED_POINT)
            _add(grad_x + x_at + bottom_left + step, (1 - weight_x) * lower, mask, FIXED_POINT)
            _add(grad_x + x_at + bottom_right + step, weight_x * lower, mask, FIXED_POINT)
    if OF_FIELD:
        channel_axis: tl.constexpr = 1 if CHANNELS_LAST else 0
        slope_x = tl.where(free_x, GAIN * tl.sum(slope_x, axis=channel_axis), 0.0)
        slope_y = tl.where(free_y, GAIN * tl.sum(slope_y, axis=channel_axis), 0.0)
        kind = grad_field.dtype.element_ty
        tl.store(grad_field + field_at, (slope_x * sigmoid_x).to(kind), mask=exists)
        tl.store(grad_field + (field_at + axis), (slope_y * sigmoid_y).to(kind), mask=exists)
        if SCOPE:
            slope_x = slope_x * move_x * sigmoid_x * (1 - sigmoid_x)
            slope_y = slope_y * move_y * sigmoid_y * (1 - sigmoid_y)
            tl.store(grad_field + (field_at + 2 * axis), slope_x.to(kind), mask=exists)
            tl.store(grad_field + (field_at + 3 * axis), slope_y.to(kind), mask=exists)
