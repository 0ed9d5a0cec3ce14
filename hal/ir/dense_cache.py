"""Bodies of the cache ops where row ``b`` of a batch has page ``b`` of the pool, whole and alone.

A step of static shapes is so. Then nothing has to be looked up: new positions are put in their
places by a product with zeros and ones, and attention reads the pool as it lies. All that touches
the pool is arithmetic on floats, which chips have that have no scatter and no gather; what is
computed of positions is small, and the same in all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from hal.ir.graph import OPSET

HIDDEN = -30000.0
"""Added to scores that a query must not see: float16 holds it, and its exponential is zero."""

_HIT = """
    axes_row = Constant <value_ints = [1, 2]> ()
    steps_new = Shape <start = 2, end = 3> ({new})
    steps_end = Squeeze (steps_new)
    page_1d = Shape <start = 2, end = 3> ({pool})
    page = Squeeze (page_1d)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    steps = Range (zero, steps_end, one)
    slots = Range (zero, page, one)
    axis1 = Constant <value_ints = [1]> ()
    start = Unsqueeze (lengths, axis1)
    position = Add (start, steps)
"""

_WRITE = """
<domain: "hal", opset_import: ["" : {opset}]>
CacheWrite <dense> (pool, update, block_table, lengths) => (written)
{{
    {hit}
    position4 = Unsqueeze (position, axes_row)
    axes_slot = Constant <value_ints = [0, 1, 3]> ()
    slots4 = Unsqueeze (slots, axes_slot)
    hit = Equal (slots4, position4)
    place = Cast <to = 1> (hit)
    axis3 = Constant <value_ints = [3]> ()
    taken = ReduceMax <keepdims = 1> (place, axis3)
    all = Constant <value_float = 1.0> ()
    free = Sub (all, taken)
    old = Mul (pool, free)
    new = MatMul (place, update)
    written = Add (old, new)
}}
"""

_ATTENTION = """
<domain: "hal", opset_import: ["" : {opset}]>
CachedAttention <scale, softcap, window, value_size, bits, recent, dense>
    (q, key_pool, value_pool, block_table, lengths, key_scale, value_scale,
     recent_keys, recent_values, recent_table, recent_lengths) => (y)
{{
    {hit}
    axes_query = Constant <value_ints = [1, 3]> ()
    position4 = Unsqueeze (position, axes_query)
    axes_slot = Constant <value_ints = [0, 1, 2]> ()
    slots4 = Unsqueeze (slots, axes_slot)
    later = Greater (slots4, position4)
    {window}
    hides = Cast <to = 1> (hidden)
    far = Constant <value_float = {far}> ()
    bias = Mul (hides, far)
    batch_1d = Shape <start = 0, end = 1> (q)
    kv_heads = Shape <start = 1, end = 2> (key_pool)
    heads = Shape <start = 1, end = 2> (q)
    channels = Shape <start = 3, end = 4> (q)
    rest = Constant <value_ints = [-1]> ()
    scale_f = Constant <value_float = {scale}> ()
    scaled = Mul (q, scale_f)
    grouped = Concat <axis = 0> (batch_1d, kv_heads, rest, channels)
    queries = Reshape (scaled, grouped)
    turned = Transpose <perm = [0, 1, 3, 2]> (key_pool)
    products = MatMul (queries, turned)
    by_head = Concat <axis = 0> (batch_1d, heads, steps_new, page_1d)
    raw = Reshape (products, by_head)
    {softcap}
    seen = Add (scores, bias)
    weights = Softmax <axis = -1> (seen)
    by_group = Concat <axis = 0> (batch_1d, kv_heads, rest, page_1d)
    weights_of = Reshape (weights, by_group)
    {values}
    mixed = MatMul (weights_of, values)
    width = Shape <start = 3, end = 4> (values)
    split = Concat <axis = 0> (batch_1d, heads, steps_new, width)
    y = Reshape (mixed, split)
}}
"""

_WINDOW = """
    window = Constant <value_int = {window}> ()
    oldest = Sub (position4, window)
    past = LessOrEqual (slots4, oldest)
    hidden = Or (later, past)
"""

_SOFTCAP = """
    cap = Constant <value_float = {softcap}> ()
    capped = Div (raw, cap)
    bent = Tanh (capped)
    scores = Mul (bent, cap)
"""

_PREFIX = """
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [{size}]> ()
    channel = Constant <value_ints = [3]> ()
    values = Slice (key_pool, first, last, channel)
"""


def write_body(attributes: Mapping[str, str]) -> str:
    """The body of ``CacheWrite`` on a float32 pool, as text."""
    return _WRITE.format(opset=OPSET, hit=_HIT.format(new="update", pool="pool"))


def attention_body(attributes: Mapping[str, str]) -> str:
    """The body of ``CachedAttention`` on float32 pools (``bits`` 0), as text."""
    window, softcap, size = (attributes[k] for k in ("window", "softcap", "value_size"))
    return _ATTENTION.format(
        opset=OPSET,
        hit=_HIT.format(new="q", pool="key_pool"),
        window=_WINDOW.format(window=window) if int(window) else "hidden = Identity (later)",
        softcap=_SOFTCAP.format(softcap=float(softcap))
        if float(softcap)
        else "scores = Identity (raw)",
        values=_PREFIX.format(size=size) if int(size) else "values = Identity (value_pool)",
        scale=float(attributes["scale"]),
        far=HIDDEN,
    )
