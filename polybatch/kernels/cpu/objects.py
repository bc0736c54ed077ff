"""Keep a compiled operation as a file, and map it back into memory without a compiler.

numba and LLVM take half a second and over 100 MiB to import, and a start whose kernels are on disk needs
neither. A file holds the ELF object that LLVM made (x86-64, System V), the symbol to call, and a SHA-256 over
both. Loading it is the classic work of a linker on one file: lay out the sections, write addresses
where relocations ask for them, make the memory executable and no longer writable. Nothing in
the file is data of Python; a damaged one is refused.

Source: System V ABI, AMD64 supplement, chapters 4 and 5.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from polybatch.errors import EngineError

MAGIC = b"polybatch kernel 1\n"
_HEADER = struct.Struct("<32sHI")
"""SHA-256 of what follows it, bytes of the symbol, bytes of the object."""

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_PROGBITS, _RELA, _NOBITS, _SYMTAB = 1, 4, 8, 2
_WRITABLE, _ALLOCATED = 1, 2
_UNDEFINED, _ABSOLUTE, _COMMON = 0, 0xFFF1, 0xFFF2
_R_64, _R_PC32, _R_PLT32, _R_PC64 = 1, 2, 4, 24
# What numba's wrapper calls when a kernel raises: Python's interface and its own helpers. A kernel raises
# only where one of our own laws is broken, and would leave the other threads waiting for ever.
_ON_ERROR = ("Py", "_Py", "numba_", "NRT_")

_code: list[mmap.mmap] = []
"""Mapped operations, kept until the process ends."""


class ObjectFileError(EngineError):
    """A file that is damaged, or holds something that this loader does not link."""


def is_supported() -> bool:
    """Whether objects can be mapped on this system."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 2**32


def save(path: Path, symbol: str, code: bytes) -> None:
    """Write an object so that a reader sees all of it or nothing."""
    body = symbol.encode() + code
    header = _HEADER.pack(hashlib.sha256(body).digest(), len(symbol.encode()), len(code))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
        file.write(MAGIC + header + body)
    os.replace(file.name, path)


def load(path: Path) -> int:
    """Address of the operation that a file holds, valid until the process ends.

    Raises FileNotFoundError, and ObjectFileError for a file that is damaged or cannot be linked.
    """
    data = path.read_bytes()
    start = len(MAGIC) + _HEADER.size
    if len(data) < start or not data.startswith(MAGIC):
        raise ObjectFileError(f"{path} is no compiled operation of this version")
    digest, name_bytes, code_bytes = _HEADER.unpack_from(data, len(MAGIC))
    body = data[start:]
    if len(body) != name_bytes + code_bytes or hashlib.sha256(body).digest() != digest:
        raise ObjectFileError(f"{path} is damaged: its SHA-256 is not the one it was written with")
    return _Image(body[name_bytes:]).link(body[:name_bytes])


@dataclass(frozen=True, slots=True)
class _Section:
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


class _Image:
    """An ELF object on its way into memory."""

    def __init__(self, code: bytes) -> None:
        if code[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<HH", code, 16) != (1, 62):
            raise ObjectFileError("not a relocatable ELF object for x86-64")
        self.code = code
        offset = struct.unpack_from("<Q", code, 40)[0]
        size, count = struct.unpack_from("<HH", code, 58)
        self.sections = []
        for i in range(count):
            _, kind, flags, _, at, length, link, info, align, _ = _SECTION.unpack_from(
                code, offset + i * size
            )
            self.sections.append(_Section(kind, flags, at, length, link, info, max(1, align)))
        self.places: dict[int, int] = {}
        tables = [s for s in self.sections if s.kind == _SYMTAB]
        if len(tables) != 1:
            raise ObjectFileError(f"the object has {len(tables)} symbol tables, not one")
        table = tables[0]
        self.symbols = [
            _SYMBOL.unpack_from(code, table.offset + at) for at in range(0, table.size, _SYMBOL.size)
        ]
        self.names = self.sections[table.link].offset

    def link(self, entry: bytes) -> int:
        """Lay out, relocate, make executable; the address of the symbol `entry`."""
        size = 0
        for index, section in enumerate(self.sections):
            if section.flags & _ALLOCATED:
                if section.flags & _WRITABLE and section.size:
                    raise ObjectFileError("the object has variables, which memory for code cannot hold")
                size = -(-size // section.align) * section.align
                self.places[index] = size
                size += section.size
        # Common symbols, zeroed variables of numba's environment, lie behind the sections.
        commons = {}
        for index, (_, _, _, home, align, length) in enumerate(self.symbols):
            if home == _COMMON:
                size = -(-size // max(1, align)) * max(1, align)
                commons[index] = size
                size += length
        area = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for index, place in self.places.items():
            section = self.sections[index]
            if section.kind != _NOBITS:
                area[place : place + section.size] = self._bytes(section)
        addresses: dict[int, int] = {index: base + place for index, place in commons.items()}
        for section in self.sections:
            # Unwind tables and debug sections are of no use without a linker that registers them.
            target = self.sections[section.info] if section.kind == _RELA else None
            if target is not None and target.kind == _PROGBITS and section.info in self.places:
                self._relocate(section, area, base, addresses)
        _protect(base, len(area))
        _code.append(area)
        for index, symbol in enumerate(self.symbols):
            if self._name(symbol[0]) == entry and symbol[3] != _UNDEFINED:
                return self._address(index, base, addresses)
        raise ObjectFileError(f"the object does not define {entry.decode(errors='replace')}")

    def _bytes(self, section: _Section) -> bytes:
        return self.code[section.offset : section.offset + section.size]

    def _name(self, offset: int) -> bytes:
        start = self.names + offset
        return self.code[start : self.code.index(b"\0", start)]

    def _address(self, index: int, base: int, known: dict[int, int]) -> int:
        if index not in known:
            name, _, _, home, value, _ = self.symbols[index]
            if home == _UNDEFINED:
                known[index] = _external(self._name(name).decode())
            elif home == _ABSOLUTE:
                known[index] = value
            else:
                known[index] = base + self.places[home] + value
        return known[index]

    def _relocate(self, table: _Section, area: mmap.mmap, base: int, known: dict[int, int]) -> None:
        place = self.places[table.info]
        for at in range(0, table.size, _RELOCATION.size):
            offset, info, addend = _RELOCATION.unpack_from(self.code, table.offset + at)
            kind, target = info & 0xFFFFFFFF, place + offset
            value = self._address(info >> 32, base, known) + addend
            if kind == _R_64:
                struct.pack_into("<Q", area, target, value & 0xFFFFFFFFFFFFFFFF)
            elif kind == _R_PC64:
                struct.pack_into("<q", area, target, value - base - target)
            elif kind in (_R_PC32, _R_PLT32) and -(2**31) <= value - base - target < 2**31:
                struct.pack_into("<i", area, target, value - base - target)
            else:
                raise ObjectFileError(f"the object asks for relocation {kind}, which is not linked here")


def _external(name: str) -> int:
    """Address of a C library's function; `abort` for what only a kernel that fails would call."""
    library = ctypes.CDLL(None)
    wanted = "abort" if name.startswith(_ON_ERROR) else name
    try:
        return ctypes.cast(getattr(library, wanted), ctypes.c_void_p).value or 0
    except AttributeError:
        raise ObjectFileError(f"the object calls {name}, which this process does not have") from None


def _protect(base: int, size: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    if library.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(pages), mmap.PROT_READ | mmap.PROT_EXEC):
        raise ObjectFileError(f"memory cannot be made executable: {os.strerror(ctypes.get_errno())}")
