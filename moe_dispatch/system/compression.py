"""The content of ``.xz`` files, which are read up to a size only: a small file may hold a very large one."""

import errno
from pathlib import Path
from typing import Final

from moe_dispatch.system import files

_DICTIONARY_BYTES: Final = 1 << 20  # A reader needs as much memory; files of this package are hardly larger.
_MEMORY_BYTES: Final = 128 << 20  # Twice of what `xz -9` makes a reader need.


def compressed(text: str) -> bytes:
    """Text as the content of an ``.xz`` file; the same text gives the same bytes."""
    import lzma

    # pb: text repeats at any position, not at multiples of four bytes.
    preset = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0, "dict_size": _DICTIONARY_BYTES}
    return lzma.compress(text.encode(), filters=[preset])


def read_bytes(path: Path, *, limit: int) -> bytes:
    """The content of a regular file, decompressed if its name ends with ``.xz``.

    Raises:
        OSError: As `files.read_bytes` and `decompressed`.
        ValueError: As `decompressed`.
    """
    content = files.read_bytes(path, limit=limit)
    return decompressed(content, limit=limit) if path.suffix == ".xz" else content


def decompressed(content: bytes, *, limit: int) -> bytes:
    """The bytes that an ``.xz`` file's content stands for.

    Args:
        content: One xz stream; what follows it is passed over.
        limit: The most bytes that the result may have.

    Raises:
        OSError: This Python was built where liblzma's headers were missing. Only what needs such a file goes without.
        ValueError: The content is damaged, cut off, or has more than `limit` bytes when decompressed.
    """
    try:
        import lzma
    except ImportError as error:
        raise OSError(errno.ENOSYS, "this Python was built without lzma, which decompresses .xz files") from error
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)
    try:
        text = decompressor.decompress(content, limit + 1)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from error
    if len(text) > limit:
        raise ValueError(f"it has more than {limit:,} bytes when decompressed")
    if not decompressor.eof:
        raise ValueError("it is cut off")
    return text
