"""The content of ``.gz`` files, which are read up to a size only: a small file may hold a very large one."""

import gzip
import zlib
from typing import Final

_GZIP: Final = 16 + zlib.MAX_WBITS  # For zlib: the data has gzip's head and check sum.


def compressed(text: str) -> bytes:
    """Text as the content of a ``.gz`` file; the same text gives the same bytes."""
    return gzip.compress(text.encode(), mtime=0)


def decompressed(content: bytes, *, limit: int) -> bytes:
    """The bytes that a ``.gz`` file's content stands for.

    Args:
        content: One gzip member; what follows it is passed over.
        limit: The most bytes that the result may have.

    Raises:
        ValueError: The content is damaged, cut off, or has more than `limit` bytes when decompressed.
    """
    decompressor = zlib.decompressobj(_GZIP)
    try:
        text = decompressor.decompress(content, limit)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if decompressor.unconsumed_tail:
        raise ValueError(f"it has more than {limit:,} bytes when decompressed")
    if not decompressor.eof:
        raise ValueError("it is cut off")
    return text
