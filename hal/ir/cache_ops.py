"""Bodies of the cache ops of the ``hal`` domain: writing to and attending over a pool of pages.

A *pool* ``[pages, heads, page, channels]`` holds the cache of many rows. A row's *block table*
lists its pages in order, so position ``p`` of row ``b`` lies in page ``table[b, p // page]`` at
slot ``p % page``. One page per row, as long as the row may grow, is the contiguous layout; many
short pages are the paged one. The ops do not know the difference.
"""

from __future__ import annotations

from collections.abc import Mapping

from hal.ir.graph import OPSET

CACHE_WRITE = "CacheWrite"
CACHED_ATTENTION = "CachedAttention"

WRITE_DEFAULTS: dict[str, str] = {}
ATTENTION_DEFAULTS = {
    "scale": "1.0",
    "softcap": "0.0",
    "window": "0",
    "value_size": "0",
    "bits": "0",
}

WRITE_DOC = (
    "Store update[b,:,s,:] at position lengths[b] + s of row b. Inputs: pool [P,H,L,C], update"
    " [B,H,S,C] of the pool's dtype, block_table int32 [B,N], lengths int64 [B] (positions that the"
    " row holds already). Output: the pool with the new positions; a target may write in place. The"
    " table must have room for all S positions of every row."
)

ATTENTION_DOC = (
    "Causal attention of the S newest positions of each row over all its positions. Inputs: q"
    " [B,Hq,S,C], key_pool [P,H,L,C], value_pool [P,H,L,Cv] (both hold the new positions already),"
    " block_table int32 [B,N], lengths int64 [B] (positions before the new ones), key_scale and"
    " value_scale [P,H,L,1] with bits = 8 or 4. Query s of row b sees positions"
    " max(0, p - window + 1)..p, p = lengths[b] + s (window 0: no limit). Output [B,Hq,S,Cv]."
    " value_size > 0: values are the first value_size channels of the keys. bits = 8: pools are"
    " int8; bits = 4: uint8, channel c in the low and channel c + C/2 in the high nibble of byte c,"
    " less 8. softcap as in ONNX Attention."
)

_WRITE = """
<domain: "hal", opset_import: ["" : {opset}]>
CacheWrite (pool, update, block_table, lengths) => (written)
{{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axes_page = Constant <value_ints = [1, 3]> ()
    axes_head = Constant <value_ints = [0, 2, 3]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    page_1d = Shape <start = 2, end = 3> (pool)
    heads_1d = Shape <start = 1, end = 2> (pool)
    heads = Squeeze (heads_1d, axis0)
    batch_1d = Shape <start = 0, end = 1> (update)
    new_1d = Shape <start = 2, end = 3> (update)
    new = Squeeze (new_1d, axis0)
    steps = Range (zero, new, one)
    start = Unsqueeze (lengths, axis1)
    position = Add (start, steps)
    block = Div (position, page_1d)
    slot = Mod (position, page_1d)
    table = Cast <to = 7> (block_table)
    page = GatherElements <axis = 1> (table, block)
    page4 = Unsqueeze (page, axes_page)
    slot4 = Unsqueeze (slot, axes_page)
    head = Range (zero, heads, one)
    head4 = Unsqueeze (head, axes_head)
    one_1d = Constant <value_ints = [1]> ()
    full = Concat <axis = 0> (batch_1d, heads_1d, new_1d, one_1d)
    page_all = Expand (page4, full)
    slot_all = Expand (slot4, full)
    head_all = Expand (head4, full)
    index = Concat <axis = 3> (page_all, head_all, slot_all)
    written = ScatterND (pool, index, update)
}}
"""

_ATTENTION = """
<domain: "hal", opset_import: ["" : {opset}]>
CachedAttention <scale, softcap, window, value_size, bits>
    (q, key_pool, value_pool, block_table, lengths, key_scale, value_scale) => (y)
{{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axes_b = Constant <value_ints = [1, 2, 3]> ()
    axes_q = Constant <value_ints = [0, 1, 3]> ()
    axes_k = Constant <value_ints = [0, 1, 2]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    joined = Constant <value_ints = [0, 0, -1]> ()
    table = Cast <to = 7> (block_table)
    {keys}
    {values}
    new_1d = Shape <start = 2, end = 3> (q)
    new = Squeeze (new_1d, axis0)
    room_1d = Shape <start = 2, end = 3> (keys)
    room = Squeeze (room_1d, axis0)
    steps = Range (zero, new, one)
    slots = Range (zero, room, one)
    steps4 = Unsqueeze (steps, axes_q)
    slots4 = Unsqueeze (slots, axes_k)
    start4 = Unsqueeze (lengths, axes_b)
    position = Add (start4, steps4)
    causal = LessOrEqual (slots4, position)
    {mask}
    y = Attention <scale = {scale}, softcap = {softcap}> (q, keys, values, mask)
}}
"""

# Pages of a row side by side: [B,N,H,L,C] to [B,H,N*L,C].
_ROWS = """
    {out}_paged = Gather <axis = 0> ({pool}, table)
    {out}_turned = Transpose <perm = [0, 2, 1, 3, 4]> ({out}_paged)
    {out}_width = Shape <start = 4, end = 5> ({out}_turned)
    {out}_shape = Concat <axis = 0> (joined, {out}_width)
    {out} = Reshape ({out}_turned, {out}_shape)
"""

_DEQUANTIZE = {
    "8": """
    {out}_float = Cast <to = 1> ({out}_stored)
""",
    "4": """
    {out}_mask = Constant <value = uint8 {{15}}> ()
    {out}_four = Constant <value = uint8 {{4}}> ()
    {out}_low = BitwiseAnd ({out}_stored, {out}_mask)
    {out}_high = BitShift <direction = "RIGHT"> ({out}_stored, {out}_four)
    {out}_codes = Concat <axis = 3> ({out}_low, {out}_high)
    {out}_wide = Cast <to = 1> ({out}_codes)
    {out}_eight = Constant <value_float = 8.0> ()
    {out}_float = Sub ({out}_wide, {out}_eight)
""",
}

_PREFIX = """
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [{size}]> ()
    channels = Constant <value_ints = [3]> ()
    values = Slice (keys, first, last, channels)
"""

_WINDOW = """
    window = Constant <value_int = {window}> ()
    oldest = Sub (position, window)
    near = Greater (slots4, oldest)
    mask = And (causal, near)
"""


def write_body(attributes: Mapping[str, str]) -> str:
    """The body of ``CacheWrite`` as text."""
    return _WRITE.format(opset=OPSET)


def attention_body(attributes: Mapping[str, str]) -> str:
    """The body of ``CachedAttention`` for given attribute values, as text."""
    bits, size, window = (attributes[k] for k in ("bits", "value_size", "window"))
    values = _PREFIX.format(size=size) if int(size) else _read("values", "value", bits)
    return _ATTENTION.format(
        opset=OPSET,
        keys=_read("keys", "key", bits),
        values=values,
        mask=_WINDOW.format(window=window) if int(window) else "mask = Identity (causal)",
        scale=float(attributes["scale"]),
        softcap=float(attributes["softcap"]),
    )


def _read(out: str, side: str, bits: str) -> str:
    if bits == "0":
        return _ROWS.format(out=out, pool=f"{side}_pool")
    return (
        _ROWS.format(out=f"{out}_stored", pool=f"{side}_pool")
        + _ROWS.format(out=f"{out}_scale", pool=f"{side}_scale")
        + _DEQUANTIZE[bits].format(out=out)
        + f"    {out} = Mul ({out}_float, {out}_scale)\n"
    )
