"""Loading a library that does not belong to this package."""

import pytest

from kt_async.errors import NativeError
from kt_async.ffi import lib, structs

load = lib.load.__wrapped__  # not the cached one


def test_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lib._SIGNATURES, "kt_from_the_future", ())
    with pytest.raises(
        NativeError, match="lacks kt_from_the_future; rebuild it with 'make native'"
    ):
        load()


def test_other_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structs, "KT_ABI_VERSION", 999)
    with pytest.raises(NativeError, match=r"has ABI \d+, this package needs 999"):
        load()
