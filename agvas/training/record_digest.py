"""A digest of a source's records, by which a stopped run sees that its data are the same: annotations as read, not files and their times.

It covers all that training reads of an index: paths, classes, splits, texts, shapes. Pictures and masks are not opened. What many records
share, the names of a set's classes, is digested once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np


def digest_of(records: Sequence[Any]) -> str:
    """sha256 of records in their order: dataclasses of texts, numbers, paths, arrays and collections of these."""
    total, shared = hashlib.sha256(), dict[int, tuple[Any, bytes]]()
    for record in records:
        for part in _parts(record, shared):
            total.update(part)
            total.update(b"\0")
    return total.hexdigest()


def _parts(value: Any, shared: dict[int, tuple[Any, bytes]]) -> Iterator[bytes]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield field.name.encode()
            yield from _parts(getattr(value, field.name), shared)
    elif isinstance(value, (Mapping, AbstractSet)):
        if id(value) not in shared:  # with the value, so that no other gets its identity
            shared[id(value)] = value, _digest_of_collection(value, shared)
        yield shared[id(value)][1]
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, (list, tuple)):
        yield str(len(value)).encode()
        for item in value:
            yield from _parts(item, shared)
    else:
        kind = type(value).__name__ if isinstance(value, (str, bool, int, float)) else ""
        yield f"{kind} {value}".encode(errors="surrogateescape")  # names of files need not be Unicode


def _digest_of_collection(value: Mapping[Any, Any] | AbstractSet[Any], shared: dict[int, tuple[Any, bytes]]) -> bytes:
    items = value.items() if isinstance(value, Mapping) else ((item, None) for item in value)
    parts = sorted(b"\0".join([str(key).encode(), *_parts(item, shared)]) for key, item in items)  # a set has no order
    return hashlib.sha256(b"\0\0".join(parts)).digest()
