"""Bodies of the cache ops of the ``hal`` domain: writing to and attending over a pool of pages.

A *pool* ``[pages, heads, page, channels]`` holds the cache of many rows. A row's *block table*
lists its pages in order, so position ``p`` of row ``b`` lies in page ``table[b, p // page]`` at
slot ``p % page``. One page per row, as long as the row may grow, is the contiguous layout; many
short pages are the paged one. The ops do not know the difference.
"""

from __future__ import annotations

from collections.abc import Mapping

from hal.ir import dense_cache
from hal.ir.graph import OPSET

CACHE_WRITE = "CacheWrite"
CACHED_ATTENTION = "CachedAttention"

WRITE_DEFAULTS = {"dense": "0"}
ATTENTION_DEFAULTS = {
    "scale": "1.0",
    "softcap": "0.0",
    "window": "0",
    "value_size": "0",
    "bits": "0",
    "recent": "0",
    "dense": "0",
}

WRITE_DOC = (
    "Store update[b,:,s,:] at position lengths[b] + s of row b. Inputs: pool [P,H,L,C], update"
    " [B,H,S,C] of the pool's dtype, block_table int32 [B,N], lengths int64 [B] (positions that the"
    " row holds already). Output: the pool with the new positions; a target may write in place. The"
    " table must have room for all S positions of every row. dense = 1: the pool is float32,"
    " and row b has page b and no other, whatever the table says."
)

ATTENTION_DOC = (
    "Causal attention of the S newest positions of each row over all its positions. Inputs: q"
    " [B,Hq,S,C], key_pool [P,H,L,C], value_pool [P,H,L,Cv] (both hold the new positions already),"
    " block_table int32 [B,N], lengths int64 [B] (positions before the new ones), key_scale and"
    " value_scale float16 [P,H,L,C/n] with bits = 8 or 4: one for each n channels in a row. Query s"
    " of row b sees positions max(0, p - window + 1)..p, p = lengths[b] + s (window 0: no limit)."
    " Output [B,Hq,S,Cv]. value_size > 0: values are the first value_size channels of the keys."
    " bits = 8: pools are int8; bits = 4: uint8, channel c in the low and channel c + C/2 in the"
    " high nibble of byte c, less 8. recent = n > 0: the newest n positions that a query sees are"
    " read from the float32 pools recent_keys and recent_values by recent_table, where row b holds"
    " recent_lengths[b] positions before the new ones. softcap as in ONNX Attention. dense as in"
    " CacheWrite; not with bits."
)

_WRITE = """
<domain: "hal", opset_import: ["" : {opset}]>
CacheWrite <dense> (pool, update, block_table, lengths) => (written)
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
CachedAttention <scale, softcap, window, value_size, bits, recent, dense>
    (q, key_pool, value_pool, block_table, lengths, key_scale, value_scale,
     recent_keys, recent_values, recent_table, recent_lengths) => (y)
{{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axes_b = Constant <value_ints = [1, 2, 3]> ()
    axes_q = Constant <value_ints = [0, 1, 3]> ()
    axes_k = Constant <value_ints = [0, 1, 2]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    joined = Constant <value_ints = [0, 0, -1]> ()
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
    {recent}
    y = Attention <scale = {scale}, softcap = {softcap}> (q, {seen})
}}
"""

# The newest positions come from pools of their own, so the others are masked there and here.
_RECENT = """
    recent = Constant <value_int = {recent}> ()
    border = Sub (position, recent)
    old = LessOrEqual (slots4, border)
    mask_old = And (mask, old)
    {keys}
    {values}
    room2_1d = Shape <start = 2, end = 3> (late_keys)
    room2 = Squeeze (room2_1d, axis0)
    slots2 = Range (zero, room2, one)
    slots2_4 = Unsqueeze (slots2, axes_k)
    late_start4 = Unsqueeze (recent_lengths, axes_b)
    shift = Sub (start4, late_start4)
    place = Add (slots2_4, shift)
    late_causal = LessOrEqual (place, position)
    late_near = Greater (place, border)
    mask_late = And (late_causal, late_near)
    all_keys = Concat <axis = 2> (keys, late_keys)
    all_values = Concat <axis = 2> (values, late_values)
    all_mask = Concat <axis = -1> (mask_old, mask_late)
"""

# Pages of a row side by side: [B,N,H,L,C] to [B,H,N*L,C].
_ROWS = """
    {out}_table = Cast <to = 7> ({table})
    {out}_paged = Gather <axis = 0> ({pool}, {out}_table)
    {out}_turned = Transpose <perm = [0, 2, 1, 3, 4]> ({out}_paged)
    {out}_width = Shape <start = 4, end = 5> ({out}_turned)
    {out}_shape = Concat <axis = 0> (joined, {out}_width)
    {out} = Reshape ({out}_turned, {out}_shape)
"""

_DEQUANTIZE = {
    "8": """
    {out}_plain = Cast <to = 1> ({out}_stored)
""",
    "4": """
    {out}_mask = Constant <value = uint8 {{15}}> ()
    {out}_four = Constant <value = uint8 {{4}}> ()
    {out}_low = BitwiseAnd ({out}_stored, {out}_mask)
    {out}_high = BitShift <direction = "RIGHT"> ({out}_stored, {out}_four)
    {out}_codes = Concat <axis = 3> ({out}_low, {out}_high)
    {out}_wide = Cast <to = 1> ({out}_codes)
    {out}_eight = Constant <value_float = 8.0> ()
    {out}_plain = Sub ({out}_wide, {out}_eight)
""",
}

# A scale for each block of channels: the blocks get an axis of their own.
_SCALE = """
    {out}_ratio = Cast <to = 1> ({out}_scale)
    {out}_last = Constant <value_ints = [-1]> ()
    {out}_ratio5 = Unsqueeze ({out}_ratio, {out}_last)
    {out}_extents = Shape <start = 0, end = 4> ({out}_ratio)
    {out}_split = Concat <axis = 0> ({out}_extents, {out}_last)
    {out}_blocks = Reshape ({out}_plain, {out}_split)
    {out}_scaled = Mul ({out}_blocks, {out}_ratio5)
    {out}_joined = Constant <value_ints = [0, 0, 0, -1]> ()
    {out} = Reshape ({out}_scaled, {out}_joined)
"""

_PREFIX = """
    {out}_first = Constant <value_ints = [0]> ()
    {out}_last = Constant <value_ints = [{size}]> ()
    {out}_channels = Constant <value_ints = [3]> ()
    {out} = Slice ({keys}, {out}_first, {out}_last, {out}_channels)
"""

_WINDOW = """
    window = Constant <value_int = {window}> ()
    oldest = Sub (position, window)
    near = Greater (slots4, oldest)
    mask = And (causal, near)
"""


def write_body(attributes: Mapping[str, str]) -> str:
    """The body of ``CacheWrite`` as text."""
    if int(attributes["dense"]):
        return dense_cache.write_body(attributes)
    return _WRITE.format(opset=OPSET)


def attention_body(attributes: Mapping[str, str]) -> str:
    """The body of ``CachedAttention`` for given attribute values, as text."""
    if int(attributes["dense"]):
        return dense_cache.attention_body(attributes)
    bits, size, window, recent = (attributes[k] for k in ("bits", "value_size", "window", "recent"))
    late = ""
    if int(recent):
        late = _RECENT.format(
            recent=recent,
            keys=_rows("late_keys", "recent_keys", "recent_table"),
            values=_values(size, "late_values", "late_keys")
            or _rows("late_values", "recent_values", "recent_table"),
        )
    return _ATTENTION.format(
        opset=OPSET,
        keys=_read("keys", "key", bits),
        values=_values(size, "values", "keys") or _read("values", "value", bits),
        mask=_WINDOW.format(window=window) if int(window) else "mask = Identity (causal)",
        recent=late,
        seen="all_keys, all_values, all_mask" if late else "keys, values, mask",
        scale=float(attributes["scale"]),
        softcap=float(attributes["softcap"]),
    )


def _values(size: str, out: str, keys: str) -> str:
    return _PREFIX.format(size=size, out=out, keys=keys) if int(size) else ""


def _rows(out: str, pool: str, table: str = "block_table") -> str:
    return _ROWS.format(out=out, pool=pool, table=table)


def _read(out: str, side: str, bits: str) -> str:
    if bits == "0":
        return _rows(out, f"{side}_pool")
    return (
        _rows(f"{out}_stored", f"{side}_pool")
        + _rows(f"{out}_scale", f"{side}_scale")
        + _DEQUANTIZE[bits].format(out=out)
        + _SCALE.format(out=out)
    )
