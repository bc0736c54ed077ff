"""scatter_rows: an adapter's rows, from the dense buffer in which they were sent, to their places in pages.

Contract, for every variant; the arena is changed in place:

    scatter_rows(table, data, page_ids, arena, unit)

    table: [R, 4] int32, per row
        source: its start in data, in units
        length: in units
        layer
        place: where it goes among the adapter's pages laid end to end, in 64 bytes; it stays within a page
    data: [N], any integer dtype; arena: [layers, pages, elements of a page], the same dtype
    page_ids: [P] int32, the adapter's pages, < pages
    unit: elements, for what `source` and `length` count

Rows do not overlap where they go. Reads 16 bytes a row beside the rows, which are read and written once.
"""

from polybatch.kernels.scatter_rows.reference import scatter_rows

__all__ = ["scatter_rows"]
