"""A program of WebAssembly made by hand: ``y = x + w``, four float32 each, as ``runtime.c`` has it.

It stands in for a linked one where no compiler for WebAssembly is at hand.
"""

from __future__ import annotations

from collections.abc import Iterable

RECORD = {"inputs": [["x", "FLOAT", [1, 4]]], "outputs": [["y", "FLOAT", [1, 4]]]}
WEIGHTS, INPUT, OUTPUT, TEXT = 1024, 2048, 4096, 512

_I32, _FUNCTION, _MEMORY = 0x7F, 0, 2
_NOTHING, _GIVES, _TAKES_GIVES, _TAKES, _WRITES = range(5)
_TYPES = [([], []), ([], [_I32]), ([_I32], [_I32]), ([_I32], []), ([_I32] * 4, [_I32])]


def program(failure: str = "") -> bytes:
    """The module; with ``failure``, ``hal_run`` writes that on stderr and ends the program."""
    imports = [("fd_write", _WRITES), ("proc_exit", _TAKES), ("fd_close", _TAKES_GIVES)]
    run = bytes([
        *_constant(OUTPUT), *_constant(INPUT), 0xFD, 0, 0, 0, *_constant(WEIGHTS), 0xFD, 0, 0, 0,
        0xFD, 0xE4, 1, 0xFD, 11, 0, 0,
    ])  # fmt: skip
    if failure:
        written = [*_constant(2), *_constant(TEXT), *_constant(1), *_constant(TEXT + 8)]
        run = bytes([*written, 0x10, 0, 0x1A, *_constant(1), 0x10, 1])
    functions = [
        ("hal_start", _NOTHING, b""),
        ("hal_weights", _GIVES, _constant(WEIGHTS)),
        ("hal_input", _TAKES_GIVES, _constant(INPUT)),
        ("hal_output", _TAKES_GIVES, _constant(OUTPUT)),
        ("hal_run", _NOTHING, run),
    ]
    first = len(imports)
    text = failure.encode()
    data = (TEXT + 16).to_bytes(4, "little") + len(text).to_bytes(4, "little") + bytes(8) + text
    exports = [_name(n) + bytes([_FUNCTION, first + i]) for i, (n, _, _) in enumerate(functions)]
    return b"\0asm\1\0\0\0" + b"".join(
        [
            _section(1, [bytes([0x60, len(a), *a, len(b), *b]) for a, b in _TYPES]),
            _section(
                2, [_name("wasi_snapshot_preview1") + _name(n) + bytes([0, t]) for n, t in imports]
            ),
            _section(3, [bytes([kind]) for _, kind, _ in functions]),
            _section(5, [bytes([0, 1])]),
            _section(7, [_name("memory") + bytes([_MEMORY, 0]), *exports]),
            _section(10, [_sized(b"\0" + code + b"\x0b") for _, _, code in functions]),
            _section(11, [b"\0" + _constant(TEXT) + b"\x0b" + _sized(data)]),
        ]
    )


def _unsigned(number: int) -> bytes:
    found = []
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _constant(number: int) -> bytes:
    """``i32.const``; signed, so the highest bit of the last seven is a sign."""
    found = []
    while number > 0x3F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([0x41, *found, number])


def _sized(content: bytes) -> bytes:
    return _unsigned(len(content)) + content


def _name(text: str) -> bytes:
    return _sized(text.encode())


def _section(number: int, entries: Iterable[bytes]) -> bytes:
    listed = list(entries)
    return bytes([number]) + _sized(_unsigned(len(listed)) + b"".join(listed))
