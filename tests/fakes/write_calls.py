"""What every call of the write API's fake has in common: routing, planned faults, its end."""

import re
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote_plus

import grpc

from tests.fakes.faults import Delay, Hang
from tests.fakes.write_faults import EndCall
from tests.fakes.write_messages import status_message
from tests.fakes.write_streams import MalformedError

if TYPE_CHECKING:
    from tests.fakes.faults import FaultPlan

ROUTING_HEADER = "x-goog-request-params"
# Where gRPC carries the google.rpc.Status with the StorageError of a call that ends.
DETAILS_TRAILER = "grpc-status-details-bin"

_ENCODED = re.compile(r"([A-Za-z0-9_.~/+-]|%[0-9A-Fa-f]{2})*")
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class EndOfCallError(Exception):
    """The call ends.

    Attributes:
        status: With what, as a google.rpc.Status.
    """

    def __init__(self, status: Any) -> None:  # noqa: ANN401 - protobuf's class
        super().__init__(status.message)
        self.status = status


def cut_off(details: str = "Socket closed") -> EndOfCallError:
    """Return the end that a client sees when its connection breaks."""
    return EndOfCallError(status_message("UNAVAILABLE", details))


def end_call(context: grpc.ServicerContext, status: Any) -> NoReturn:  # noqa: ANN401 - protobuf's class
    """End the call with a google.rpc.Status, whose details go where gRPC's clients look."""
    if status.details:
        context.set_trailing_metadata(((DETAILS_TRAILER, status.SerializeToString()),))
    context.abort(_CODES[status.code], status.message)
    raise AssertionError("abort raises")


def meet_fault(faults: "FaultPlan", fault: object, context: grpc.ServicerContext) -> None:
    """Let happen what a fault wants before the request is carried out."""
    if isinstance(fault, EndCall):
        raise EndOfCallError(status_message(fault.code.name, fault.details, fault.kind))
    if isinstance(fault, (Hang, Delay)):
        context.add_callback(faults.wake)
        delay_s = fault.delay_s if isinstance(fault, Delay) else None
        if not faults.hold(delay_s, lambda: not context.is_active()):
            raise cut_off("The fake let go of a held request.")


def check_routing(context: grpc.ServicerContext, parameter: str, value: str) -> None:
    """Raise MalformedError unless the routing header says ``parameter=value``, percent-encoded.

    What is neither a letter, a digit, one of ``_.-~`` nor a slash has to be encoded. Google's
    generated client adds an empty header to the one that its caller gives to AppendRows.
    """
    said = [
        found
        for key, header in context.invocation_metadata()
        if key == ROUTING_HEADER
        for name, _, found in (part.partition("=") for part in header.split("&"))
        if name == parameter
    ]
    if not all(map(_ENCODED.fullmatch, said)) or list(map(unquote_plus, said)) != [value]:
        text = f"The header {ROUTING_HEADER} says {parameter}={said}, the request {value!r}."
        raise MalformedError(text)
