"""Store fewer bytes: grid x scale x rounding x packing, named by a short string.

`spec.py` is the grammar of names and the layout of the bytes; it knows no array library. `np.py`
encodes, decodes and searches with numpy alone. Every other backend obeys the same layout, bit for
bit, so that what one side stored the other side reads.
"""

from memwise.codec.spec import Grid, Packing, Rounding, Scale, Spec, parse

__all__ = ["Grid", "Packing", "Rounding", "Scale", "Spec", "parse"]
