"""Bodies of the quantization ops of the ``hal`` domain: what blocked ``DequantizeLinear`` lacks.

Quantized weights are standard ONNX. Two things are not there: activations rounded to 8 bits with a
scale found from the data for each token or block (``DynamicQuantizeLinear`` has one scale for the
whole tensor), and codes of three bits.
"""

from __future__ import annotations

from collections.abc import Mapping

from hal.errors import GraphError
from hal.ir.graph import OPSET

ROUND_ACTIVATIONS = "RoundActivations"
UNPACK_BITS = "UnpackBits"

ROUND_DEFAULTS = {"bits": "8", "block_size": "0"}
UNPACK_DEFAULTS = {"bits": "3", "signed": "0"}

ROUND_DOC = (
    "y = round(x / s) * s, with s = max |x| / (2**(bits - 1) - 1) over each block of block_size"
    " elements of the last axis (0: over the whole axis, one scale per token), ties to even; zeros"
    " stay zeros. The last axis is a multiple of block_size. It says that the product behind it may"
    " run on integers."
)

UNPACK_DOC = (
    "Codes of three bits, one to a byte: packed uint8 [.., K * 3 / 8] -> codes uint8 [.., K], or,"
    " with signed = 1, int8 and less by 4; K is a multiple of 8. A row is two planes: K / 4 bytes"
    " with the low two bits of four codes each (the first in the lowest bits), then K / 8 bytes"
    " with the third bit of eight codes each."
)

_ROUND = """
<domain: "hal", opset_import: ["" : {opset}]>
RoundActivations (x) => (y)
{{
    last = Constant <value_ints = [-1]> ()
    limit_f = Constant <value_float = {limit}> ()
    zero_f = Constant <value_float = 0.0> ()
    one_f = Constant <value_float = 1.0> ()
    limit = CastLike (limit_f, x)
    zero = CastLike (zero_f, x)
    one = CastLike (one_f, x)
    shape = Shape (x)
    {blocks}
    size = Abs (rows)
    largest = ReduceMax <keepdims = 1> (size, last)
    scale = Div (largest, limit)
    empty = Equal (scale, zero)
    safe = Where (empty, one, scale)
    ratio = Div (rows, safe)
    codes = Round (ratio)
    rounded = Mul (codes, scale)
    y = Reshape (rounded, shape)
}}
"""

_BLOCKS = """blocks = Constant <value_ints = [-1, {block_size}]> ()
    rows = Reshape (x, blocks)"""

_UNPACK = """
<domain: "hal", opset_import: ["" : {opset}]>
UnpackBits (packed) => (codes)
{{
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    two_1d = Constant <value_ints = [2]> ()
    three_1d = Constant <value_ints = [3]> ()
    low_i = Constant <value_ints = [0, 2, 4, 6]> ()
    high_i = Constant <value_ints = [0, 1, 2, 3, 4, 5, 6, 7]> ()
    one_i = Constant <value_int = 1> ()
    two_i = Constant <value_int = 2> ()
    three_i = Constant <value_int = 3> ()
    low_shifts = Cast <to = 2> (low_i)
    high_shifts = Cast <to = 2> (high_i)
    one = Cast <to = 2> (one_i)
    two = Cast <to = 2> (two_i)
    three = Cast <to = 2> (three_i)
    bytes = Shape <start = -1> (packed)
    rest = Shape <end = -1> (packed)
    flat = Concat <axis = 0> (rest, last)
    eighth = Div (bytes, three_1d)
    middle = Mul (eighth, two_1d)
    low = Slice (packed, first, middle, last)
    high = Slice (packed, middle, bytes, last)
    low_each = Unsqueeze (low, last)
    high_each = Unsqueeze (high, last)
    low_moved = BitShift <direction = "RIGHT"> (low_each, low_shifts)
    high_moved = BitShift <direction = "RIGHT"> (high_each, high_shifts)
    low_bits = BitwiseAnd (low_moved, three)
    high_bit = BitwiseAnd (high_moved, one)
    high_part = BitShift <direction = "LEFT"> (high_bit, two)
    low_codes = Reshape (low_bits, flat)
    high_codes = Reshape (high_part, flat)
    plain = BitwiseOr (low_codes, high_codes)
    {result}
}}
"""

_PLAIN = "codes = Identity (plain)"
_SIGNED = """four = Constant <value_int = 4> ()
    middle_code = Cast <to = 3> (four)
    as_signed = Cast <to = 3> (plain)
    codes = Sub (as_signed, middle_code)"""


def round_body(attributes: Mapping[str, str]) -> str:
    """The body of ``RoundActivations`` as ONNX text."""
    bits, block_size = int(attributes["bits"]), int(attributes["block_size"])
    if not 2 <= bits <= 8 or block_size < 0:
        raise GraphError(
            f"hal::{ROUND_ACTIVATIONS} with bits={bits} and block_size={block_size}",
            "bits are 2 to 8, and the block size is not negative",
        )
    blocks = _BLOCKS.format(block_size=block_size) if block_size else "rows = Identity (x)"
    return _ROUND.format(opset=OPSET, limit=f"{2 ** (bits - 1) - 1}.0", blocks=blocks)


def unpack_body(attributes: Mapping[str, str]) -> str:
    """The body of ``UnpackBits`` as ONNX text."""
    if attributes["bits"] != "3":
        raise GraphError(
            f"hal::{UNPACK_BITS} with bits={attributes['bits']}",
            "only three bits need it: ONNX has dtypes of 2, 4 and 8",
        )
    return _UNPACK.format(opset=OPSET, result=_SIGNED if int(attributes["signed"]) else _PLAIN)
