"""The error classes and their one table of gRPC status codes."""

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest

from specpool import errors


def kinds() -> list[type[errors.SpecPoolError]]:
    return list(dict.fromkeys(errors._all_kinds(errors.SpecPoolError)))


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_real_status_code_and_its_own_reason(kind: type[errors.SpecPoolError]) -> None:
    assert kind in errors.STATUS_CODE_NAMES
    assert grpc.StatusCode[errors.STATUS_CODE_NAMES[kind]] is not grpc.StatusCode.OK
    if kind is not errors.Internal:
        assert "default_reason" in vars(kind)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_an_error_survives_the_wire(kind: type[errors.SpecPoolError]) -> None:
    sent = kind("what happened", metadata={"blocks": 3})
    received = errors.error_from_reason(sent.reason, sent.message, sent.metadata)
    assert type(received) is kind
    assert (str(received), received.metadata) == ("what happened", {"blocks": "3"})


def test_reasons_are_unique() -> None:
    reasons = [kind.default_reason for kind in kinds()]
    assert len(set(reasons)) == len(reasons)


def test_foreign_errors_are_internal_and_unknown_reasons_keep_their_word() -> None:
    assert errors.status_code_name(ValueError("x")) == "INTERNAL"
    received = errors.error_from_reason("FROM_THE_FUTURE", "m")
    assert (type(received), received.reason) == (errors.SpecPoolError, "FROM_THE_FUTURE")


def test_the_module_needs_no_torch() -> None:
    code = "import sys, specpool.errors; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
