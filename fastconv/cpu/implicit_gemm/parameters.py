"""The parameters of the bodies, and of those that share them: `small_planes`, `channels_last` and Winograd's."""

from __future__ import annotations

from .. import tasks
from ..records import Integer, Integers, PointerTo, Reals, Record


class Strides(Record):
    """How far apart neighbours are in an array, in elements."""

    n: Integer
    c: Integer
    d: Integer
    h: Integer
    w: Integer


class Shape(Record):
    """Pixels of a plane in each dimension."""

    d: Integer
    h: Integer
    w: Integer


class SlabDepth(Record):
    """How output positions and taps read the input in depth: see `plan.Axis`."""

    source: Integers
    stride: Integer
    dilation: Integer
    taps: Integer


class SlabHeight(Record):
    source: Integers
    stride: Integer
    span: Integer  # rows from the first tap of a position to behind the last


class SlabWidth(Record):
    source: Integers
    padded: Integer  # padded coordinates there are
    stride: Integer
    before: Integer  # padded coordinate of the first element of the input
    elements: Integer  # of an input row


class Slab(Record):
    """The copy of the input rows that a task needs, with their border, and which rows these are."""

    depth: SlabDepth
    height: SlabHeight
    width: SlabWidth
    fill_body: Integer  # address of the body that fills it: see `Fill`
    only_zeros: Integer  # is everything around the input zero?
    in_place: Integer  # is there no slab, since the input is read in place?
    elements: Integer
    segment_rows: Integer  # rows of one (batch, depth, depth tap)
    row_pitch: Integer  # elements from row to row,
    phase_pitch: Integer  # from phase to phase of the stride in a row, and
    channel_pitch: Integer  # from channel to channel
    row_length: Integer  # padded coordinates that a row holds
    pixel_pitch: Integer  # elements from pixel to pixel, where channels are neighbours in the slab
    pixel_step: Integer  # from one output pixel of a row to the next


class Common(tasks.Parameters):
    """What all passes share."""

    input: Strides
    output: Strides  # of the output, or of its gradient
    out: Shape
    pixels: Integer  # of all samples
    plane: Integer  # pixels of a plane of the output if they are neighbours in memory, otherwise 0
    row_channels: Integer  # channels of the output in a group
    channels: Integer  # of the input in a group
    taps: Integer
    chunk: Integer  # pixels of a part of a long row that is a task, or samples of `small_planes`
    chunks: Integer  # such parts of a row, or 0
    slab: Slab
    padded: Integer  # does any window reach outside the input?
    table_bytes: Integer  # at the end of the scratch memory: tables of integers, among them
    row_table: Integer  # that of `slab.find_rows` here


class Fill(Record):
    """What a body tells one of those that fill its slab."""

    parameters: PointerTo[Common]
    slab: Reals
    source: Reals  # the first channel of the input
    channels: Integer
    rows: Integers  # the table of `slab.find_rows`, and
    count: Integer  # how many rows
    first: Integer  # padded coordinate that the slab's rows begin with
    places: Integers  # room for four integers


class Phase(Record):
    """A product whose weights are some of the taps of the filter."""

    place: Integer  # where in the packed weights its own begin
    taps: Integer
    block_channels: Integer
    block_taps: Integer


class Tap(Record):
    """A tap of the filter, and where in the blocks of its phase it belongs."""

    place: Integer  # in the filter
    phase: Integer
    first: Integer  # of the taps of its block,
    count: Integer  # which are so many
    row: Integer  # its number among them


class Window(Record):
    """Taps within a vector of one another."""

    first: Integer
    end: Integer
    lowest: Integer  # place of the one that comes first in memory


class WeightArray(Record):
    """Weights that are not packed, which differ from call to call."""

    w: Reals
    begin: Integer  # the address of the first byte of all elements,
    end: Integer  # and the one behind the last


class WeightPacking(tasks.Parameters):
    """Those of packing weights into panels of rows."""

    operands: WeightArray
    packed: Reals
    not_finite: Integer  # how many times weights were not finite, if that is checked
    pack_rows: Integer  # address of the body: see `PackRows`
    group_step: Integer  # elements from group to group, row to row, channel to channel
    row_step: Integer
    channel_step: Integer
    offsets: Integers  # where each tap is
    consecutive: Integer  # are the taps of a kernel neighbours in memory,
    joined_channels: Integer  # and so the channels?
    rows: Integer
    channels: Integer
    taps: Integer
    block_channels: Integer
    block_taps: Integer
    panels: Integer
    tasks: Integer  # of a group
    check_finite: Integer
    # several phases at once
    phases: Integer
    phase_table: PointerTo[Phase]
    tap_table: PointerTo[Tap]
    windows: Integer
    window_table: PointerTo[Window]
    ascending: Integer  # are the taps of each phase listed in the order of their places in it?
    target_bytes: Integer  # of the table of where each tap is to be written


class PackRows(Record):
    """The parameters of the body `pack_rows`: panels of rows for one block of the reduction."""

    packing: PointerTo[WeightPacking]
    packed: Reals
    group: Integer
    first_panel: Integer
    last_panel: Integer
    first_channel: Integer
    channels: Integer
    first_tap: Integer
    last_tap: Integer
    block: Reals  # room for lanes x lanes elements


class Operands(Record):
    """What differs from call to call."""

    x: Reals
    w: Reals  # packed, unless the tasks do that
    y: Reals
    bias: Reals
    has_bias: Integer
    relu: Integer
    add: Integer


class Correlation(Common):
    """Those of the forward pass and the input gradient."""

    operands: Operands
    packing: PointerTo[WeightPacking]  # of the weights, if the tasks pack them,
    pack_rows: Integer  # by the body at this address; otherwise both are 0
    input_group: Integer  # elements from group to group
    output_group: Integer
    extent: Integer  # elements of the input, from its first to behind its last
    row_panels: Integer  # panels of output channels in a group
    block_channels: Integer  # the blocks of the reduction
    block_taps: Integer
    tap_offset: Integers  # where in the slab, or the input, each tap finds its element
    depth_offset: Integers  # the same for each channel and tap of a block
    row_tasks: Integer  # tasks by output channels
    pixel_tasks: Integer  # and by pixels
    group: Integer  # panels of pixels that are packed before they are multiplied
    weight_panels: Integer  # panels of rows that each of them is multiplied with before the next
    weights_stay: Integer  # do all weights of a block that a task packs stay in its memory?
    panel_elements: Integer  # parts of the scratch memory, in elements
    weight_elements: Integer
    run_table: Integer  # a part of the tables
    ahead: Integer  # elements from a panel that is packed to the one that is prefetched meanwhile
    kernels: Integers  # addresses of the microkernels by rows and vectors: see `plan.microkernels`


class WeightStrides(Record):
    """How far apart neighbours are in the gradient of the weights."""

    group: Integer
    o: Integer
    c: Integer


class GradientOperands(Record):
    """What differs from call to call."""

    x: Reals
    dy: Reals
    dw: Reals
    add: Integer
    partial: Reals  # sums of parts of the pixels, if there are several


class WeightGradient(Common):
    """Those of the weight gradient."""

    operands: GradientOperands
    dw: WeightStrides
    tap_offset: Integers  # of each tap in the gradient of a kernel
    consecutive: Integer  # do the gradients (channel, tap) of an output channel follow one another in memory?
    row_offset: Integers  # where each row (channel, tap) of a block reads the input
    by_tap: Integer  # channels of a block if those of one tap are multiplied together, otherwise 0
    unit_rows: Integer  # rows of output pixels of a unit
    units: Integer
    splits: Integer  # parts of the units, each with sums of its own
    channel_blocks: Integer
    out_blocks: Integer
    vectors: Integer  # of output channels
    vector_panels: Integer
    packed: Integer  # is the gradient of the output a packed panel in memory already?
    prefetch: Integer  # is the gradient of the output prefetched?
    panel_elements: Integer  # parts of the scratch memory, in elements
    tile_elements: Integer
