"""What errors mean: the codes of Kafka's protocol, and what connecting can end with."""

from __future__ import annotations

import enum
import os
import ssl

import aiokafka.errors as errors  # type: ignore[import-untyped]

from streamer.errors import ConfigError


class DeliveryError(Exception):
    """Why nothing is delivered at the moment, in one line that never contains a secret.

    `permanent` is what waiting does not mend, such as a wrong password. What passes by itself as
    a rule, such as a leader that changes, need not be told before it has lasted `grace` seconds.
    `own`: it is about one topic, and says nothing of the brokers. `vague`: it is that there was no
    answer, and not why.
    """

    def __init__(
        self,
        reason: str,
        *,
        permanent: bool = False,
        grace: float = 0.0,
        own: bool = False,
        vague: bool = False,
    ) -> None:
        """See the class."""
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent
        self.grace = grace
        self.own = own
        self.vague = vague


class Verdict(enum.Enum):
    """What to do about a record batch after the broker's answer."""

    WRITTEN = "it is there"
    AGAIN = "send it again"
    ELSEWHERE = "ask who leads the partition, and send it again"
    NUMBERS = "the broker does not know the producer's numbers: begin with new ones"
    FENCED = "another writes as this producer, in a later epoch: become another producer"
    REFUSED = "it will never be taken: find the events that are why"
    DENIED = "the topic may not be written to: wait"
    UNKNOWN = "an error without a meaning of its own: again, but not for ever"


_VERDICTS = {
    0: Verdict.WRITTEN,
    2: Verdict.UNKNOWN,  # corrupt: on the way, or by a defect
    3: Verdict.ELSEWHERE,  # unknown topic or partition
    5: Verdict.ELSEWHERE,  # leader not available
    6: Verdict.ELSEWHERE,  # not leader or follower
    7: Verdict.AGAIN,  # request timed out
    8: Verdict.ELSEWHERE,  # broker not available
    9: Verdict.ELSEWHERE,  # replica not available
    10: Verdict.REFUSED,  # message too large
    13: Verdict.ELSEWHERE,  # network exception
    17: Verdict.DENIED,  # invalid topic
    18: Verdict.REFUSED,  # record list too large
    19: Verdict.AGAIN,  # not enough replicas
    20: Verdict.AGAIN,  # not enough replicas after append
    29: Verdict.DENIED,  # topic authorization failed
    31: Verdict.DENIED,  # cluster authorization failed
    32: Verdict.REFUSED,  # invalid timestamp
    35: Verdict.DENIED,  # unsupported version
    43: Verdict.DENIED,  # unsupported for message format
    45: Verdict.NUMBERS,  # out of order sequence number
    46: Verdict.WRITTEN,  # duplicate sequence number
    47: Verdict.FENCED,  # invalid producer epoch
    54: Verdict.DENIED,  # security disabled
    56: Verdict.ELSEWHERE,  # storage error
    59: Verdict.NUMBERS,  # unknown producer id
    74: Verdict.ELSEWHERE,  # fenced leader epoch
    75: Verdict.ELSEWHERE,  # unknown leader epoch
    76: Verdict.DENIED,  # unsupported compression type
    87: Verdict.REFUSED,  # invalid record
    89: Verdict.AGAIN,  # throttling quota exceeded
    90: Verdict.FENCED,  # producer fenced
}
TOO_LARGE = frozenset({10, 18})
TIMED_OUT = 7
NETWORK = 13
INVALID_TIME = 32
NOT_AUTHORISED = 29
UNKNOWN_TOPIC = 3

_REASONS = {
    3: "the topic does not exist",
    10: "the broker refused a record as too large",
    18: "the broker refused a record as too large",
    19: "too few replicas are in sync",
    20: "too few replicas are in sync",
    32: "the broker refuses the times of the events: is a clock wrong?",
    76: "the broker does not know this compression",
    87: "the broker refused a record as invalid",
}


def verdict_of(code: int) -> Verdict:
    """What an error code of a produce response means for the record batch."""
    return _VERDICTS.get(code, Verdict.UNKNOWN)


def reason_of_code(code: int, message: str | None = None) -> str:
    """An error code in words; `message` is what the broker said."""
    named = errors.kafka_errors.get(code)
    name = getattr(named, "message", None) or f"error {code}"
    reason = _REASONS.get(code) or f"the broker says {name.lower().replace('_', ' ')}"
    return f"{reason} ({_printable(message)})" if message else reason


def _printable(text: str) -> str:
    """A broker's text in one line of bounded length."""
    return "".join(char if char.isprintable() else "?" for char in text)[:300]


def delivery_error_of(error: BaseException, where: str = "") -> DeliveryError:
    """What an exception of aiokafka, a socket or TLS means, as `where: reason`."""
    if isinstance(error, DeliveryError):
        return error
    reason, permanent = _reason(error)
    return DeliveryError(f"{where}: {reason}" if where else reason, permanent=permanent)


def error_of_code(code: int) -> BaseException:
    """The exception that aiokafka has for an error code."""
    exception: BaseException = errors.for_code(code)()
    return exception


def _reason(error: BaseException) -> tuple[str, bool]:
    match error:
        case ConfigError():
            return str(error), True
        case errors.SaslAuthenticationFailed():
            return f"SASL authentication failed: {_first(error)}", True
        case errors.UnsupportedSaslMechanismError():
            return "the listener does not offer this SASL mechanism", True
        case errors.IllegalSaslStateError():
            return "the listener does not use SASL", True
        case errors.ClusterAuthorizationFailedError():
            # Brokers before 2.8 ask for IDEMPOTENT_WRITE on the cluster as well.
            return "not authorised: WRITE is needed on the topic", True
        case DeliveryError():
            return error.reason, error.permanent
        case errors.KafkaConnectionError(__cause__=DeliveryError() | ssl.SSLError() as cause):
            return _reason(cause)
        case errors.KafkaConnectionError(__cause__=None | EOFError() | ConnectionError()):
            expects = "TLS, a client certificate or SASL"
            return f"the broker closed the connection; does its listener expect {expects}?", False
        case errors.KafkaError():
            return _first(error) or type(error).__name__, False
        case ssl.SSLCertVerificationError():
            return f"TLS: {error.verify_message}", True
        case ssl.SSLError():
            return f"TLS: {(error.reason or 'handshake failed').replace('_', ' ').lower()}", True
        case TimeoutError():
            return "no answer in time", False
        case OSError(errno=int() as number) if number > 0:
            return os.strerror(number), False
        case OSError():
            return error.strerror or type(error).__name__, False
        case _:
            # Nothing is known about its text, which might quote a setting.
            return f"unexpected {type(error).__name__}", False


def _first(error: BaseException) -> str:
    return _printable(str(error.args[0]) if error.args else str(error))
