"""The record batches of one partition that are numbered and not acknowledged yet.

Pure decisions: what may be sent now, and what follows from an answer. No I/O and no clock: time
is handed in, in seconds, and jitter, from 0 to 1, is asked for.

What keeps the order, and each event in the log once:

- A broker takes a batch only if its sequence number follows the last one that it has of this
  producer id and epoch, and knows a repetition by its number. So up to five batches can be under
  way at once, the five that a broker remembers, and one that fails fails all behind it.
- A broker that has nothing of a producer takes any number. So a batch that may meet such a one
  goes alone: the first of an epoch, the first after a failure, and the first after a pause.
- After a failure nothing is sent until all that is under way is answered. Then the first batch
  that failed says what to do, for those behind it failed because of it.
- What may be written already is sent again with its number. A batch that was refused for good is
  not written, nor is any behind it: what is left of them is numbered anew from there.
- A request without an answer may still lie before the broker, and be taken at any time that its
  numbers fit. So they are not given to others: what has to be numbered anew then gets an epoch.
- A batch whose times are refused is sent again with the time of that in their place, once.
- When a broker does not know the numbers, the epoch is raised and numbers begin at 0. Only then
  can an event be written twice: one that was written and whose acknowledgement was lost.
- When it has a later epoch of this producer id, that is another one's: there is a new id then. In
  the next epoch a batch could have the numbers of one of that other's, and would count as written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from streamer.sinks.encoded import EncodedBatch, halves, number_of, size_of, take_out
from streamer.sinks.kafka.errors import INVALID_TIME, NETWORK, Verdict, reason_of_code, verdict_of
from streamer.sinks.kafka.record_batch import Payload

MOST_IN_FLIGHT = 5
"""The batches of a producer that a broker remembers, to know a repetition."""

SEQUENCES = 1 << 31
LAST_EPOCH = (1 << 15) - 1

PAUSE_SECONDS = 60.0
"""After so long without an acknowledgement a broker may have nothing of this producer."""

UNKNOWN_TRIES = 5
"""How often a batch meets an error without a meaning before it counts as refused."""

MOST_THROTTLE_SECONDS = 60.0
"""The longest that a broker's wish to get nothing for a while is believed."""


def backoff(attempt: int, *, permanent: bool, jitter: float) -> float:
    """Seconds before the next attempt after `attempt` (from 0) failed ones, with `jitter` 0-1."""
    # Not longer than that all is as before 5 s after a broker is back.
    first, most = (5.0, 60.0) if permanent else (0.1, 3.0)
    return min(most, first * 2.0 ** min(attempt, 16)) * (0.5 + 0.5 * jitter)


class Answer(NamedTuple):
    """What a broker said about a batch, or that none was heard of: `code` is Kafka's.

    `bad` are the records that the broker named, by their index, each with its message. `offset`
    is where the batch lies in the partition, -1 where that was not said. `throttle`: for so many
    seconds the broker wants nothing more.
    """

    code: int
    reason: str = ""
    bad: Mapping[int, str] = {}
    offset: int = -1
    throttle: float = 0.0

    @classmethod
    def of_code(cls, code: int, message: str | None = None, bad: Mapping[int, str] = {}) -> Answer:
        """An answer with the reason in words."""
        return cls(code, reason_of_code(code, message), bad)

    @classmethod
    def lost(cls, reason: str) -> Answer:
        """There was no answer: the batch may be written or not."""
        return cls(NETWORK, reason)


class Numbered:
    """A record batch in the window. `sequence` is the number of its first record."""

    __slots__ = ("answer", "as_now", "batches", "count", "in_flight", "lost", "overtaken",
                 "payload", "sent_at", "sequence", "tries")  # fmt: skip

    def __init__(self, batches: list[EncodedBatch], sequence: int) -> None:
        """Not sent yet. `payload` is set by whoever compresses it."""
        self.batches = batches
        self.count = number_of(batches)
        self.sequence = sequence
        self.payload: Payload | None = None
        self.in_flight = False
        self.answer: Answer | None = None
        self.overtaken = False
        self.as_now = False  # its own times were refused: it bears that of its sending
        self.lost = False  # a request with these numbers was never answered
        self.sent_at = 0.0
        self.tries = 0

    @property
    def size(self) -> int:
        """Bytes of the records, uncompressed."""
        return size_of(self.batches)

    @property
    def next_sequence(self) -> int:
        """The number that follows its last."""
        return (self.sequence + self.count) % SEQUENCES


class Outcome(NamedTuple):
    """What follows from an answer, for whoever does the accounting.

    `failed` is what keeps the topic from being written to; `divided` a batch of several events
    that was too large, or had one that is not taken, and is two now; `elsewhere`: ask who leads.
    `anew`: the partition is another than the one before, which was deleted, or left for another.
    """

    delivered: list[EncodedBatch]
    dropped: list[tuple[EncodedBatch, str]]
    failed: Answer | None = None
    divided: Numbered | None = None
    elsewhere: bool = False
    anew: bool = False


class Window:
    """What is numbered for one partition, in order."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        """Empty, and without a producer id: see `identify`."""
        self.producer_id: int | None = None
        self.last_producer_id: int | None = None
        self.epoch = 0
        self.entries: list[Numbered] = []
        self.retry_at = 0.0
        self.attempts = 0
        self._jitter = jitter
        self._next = 0
        self._known_at: float | None = None  # when the broker last showed that it has our numbers
        self._failing = False
        self._raised = False
        self._offset = -1  # of the last batch that was written
        self._moved = False

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self.entries)

    @property
    def in_flight(self) -> int:
        """How many batches were sent and are not answered."""
        return sum(entry.in_flight for entry in self.entries)

    def identify(self, producer_id: int) -> None:
        """Begin with a new producer id; nothing may be in flight."""
        self.producer_id = self.last_producer_id = producer_id
        self.epoch = 0
        self._begin_at(0)

    def move(self) -> None:
        """Begin anew, because the events go to another partition; nothing may be in flight."""
        self._raise_epoch()
        self._moved = True

    def add(self, batches: list[EncodedBatch]) -> None:
        """Number a record batch behind the others."""
        entry = Numbered(batches, self._next)
        self._next = entry.next_sequence
        self.entries.append(entry)

    def may_send(self, now: float) -> bool:
        """Whether a batch, one that is here or a new one, may be sent now."""
        if self._failing or now < self.retry_at:
            return False
        return self.in_flight < (1 if self._goes_alone(now) else MOST_IN_FLIGHT)

    def next(self) -> Numbered | None:
        """The first batch that is not under way."""
        return next((entry for entry in self.entries if not entry.in_flight), None)

    def _goes_alone(self, now: float) -> bool:
        if self._known_at is None or now - self._known_at >= PAUSE_SECONDS:
            return True
        # With more behind what came after it, the broker would no longer remember it.
        return bool(self.entries) and self.entries[0].overtaken

    def split(self, entry: Numbered) -> None:
        """Put two batches in the place of one of several events that is not in flight."""
        at = self.entries.index(entry)
        first, second = halves(entry.batches)
        one = Numbered(first, entry.sequence)
        two = Numbered(second, one.next_sequence)
        self.entries[at : at + 1] = [_tried_as(entry, one), _tried_as(entry, two)]

    def sent(self, entry: Numbered, now: float) -> None:
        """Note that a batch, the one that is `next`, is under way."""
        entry.in_flight = True
        entry.sent_at = now
        entry.tries += 1

    def fail(self, permanent: bool, now: float) -> None:
        """Wait before anything is sent: the partition's leader is not known or not reached."""
        wait = backoff(self.attempts, permanent=permanent, jitter=self._jitter())
        self.retry_at = max(self.retry_at, now + wait)
        self.attempts += 1

    def answered(self, entry: Numbered, answer: Answer, now: float) -> Outcome:
        """Take the answer to a batch in flight."""
        entry.in_flight = False
        outcome = Outcome([], [])
        if answer.throttle > 0:
            self.retry_at = max(self.retry_at, now + min(answer.throttle, MOST_THROTTLE_SECONDS))
        if verdict_of(answer.code) is Verdict.WRITTEN:
            outcome = outcome._replace(anew=self._is_anew(entry, answer))
            self._acknowledge(entry, now)
            outcome.delivered.extend(entry.batches)
        else:
            entry.answer = answer
            entry.lost = entry.lost or answer.code == NETWORK
            self._failing = True
        if self._failing and not self.in_flight:
            return self._recover(outcome, now)
        return outcome

    def clear_unsent(self) -> list[EncodedBatch]:
        """Let go of the batches that were never sent, and return what they hold."""
        unsent = [entry for entry in self.entries if not entry.tries]
        for entry in unsent:
            self.entries.remove(entry)
        if unsent:
            self._next = unsent[0].sequence
        return [batch for entry in unsent for batch in entry.batches]

    def clear(self) -> list[EncodedBatch]:
        """Let go of everything, and return it."""
        batches = [batch for entry in self.entries for batch in entry.batches]
        self.entries.clear()
        return batches

    def oldest_sent(self) -> float | None:
        """When the batch was sent that waits longest for its answer."""
        return min((entry.sent_at for entry in self.entries if entry.in_flight), default=None)

    def _is_anew(self, entry: Numbered, answer: Answer) -> bool:
        """Whether what was written before is not in this partition any more.

        Offsets only grow, for as long as a topic is not deleted and made again. One that was
        overtaken lies before what overtook it.
        """
        moved, self._moved = self._moved, False
        if answer.offset < 0 or entry.overtaken:
            return moved
        back, self._offset = answer.offset <= self._offset, answer.offset
        return moved or back

    # Recovery

    def _acknowledge(self, entry: Numbered, now: float) -> None:
        at = self.entries.index(entry)
        for before in self.entries[:at]:
            before.overtaken = True
        del self.entries[at]
        self.attempts = 0
        self._raised = False
        if not self._failing:
            self._known_at = now

    def _recover(self, outcome: Outcome, now: float) -> Outcome:
        """Everything is answered, and something failed: the first failure says what to do."""
        self._failing = False
        self._known_at = None
        if not self.entries:
            return outcome
        first = self.entries[0]
        answer = first.answer
        for entry in self.entries:
            entry.answer = None
        if answer is None:  # what failed behind it is answered for by what goes first
            return outcome
        verdict = verdict_of(answer.code)
        if verdict is Verdict.UNKNOWN:
            again = first.tries < UNKNOWN_TRIES
            verdict = Verdict.AGAIN if again else Verdict.REFUSED
        if verdict in (Verdict.NUMBERS, Verdict.FENCED):
            if self._raised:  # not even the new ones
                self.fail(False, now)
            self._raise_epoch(fenced=verdict is Verdict.FENCED)
            return outcome._replace(failed=answer)
        if answer.code == INVALID_TIME and not first.as_now:
            for entry in self.entries:
                entry.as_now, entry.payload = True, None
            return outcome
        if verdict is Verdict.REFUSED:
            return self._refuse(first, answer, outcome)
        self.fail(verdict is Verdict.DENIED, now)
        return outcome._replace(failed=answer, elsewhere=verdict is Verdict.ELSEWHERE)

    def _refuse(self, entry: Numbered, answer: Answer, outcome: Outcome) -> Outcome:
        """Drop the events that are why, or divide the batch where they are not known."""
        bad = {index: text for index, text in answer.bad.items() if 0 <= index < entry.count}
        if not bad and entry.count > 1:
            self.split(entry)
            outcome = outcome._replace(divided=entry)
        else:
            left, out = take_out(entry.batches, bad or {0: ""})
            outcome.dropped.extend((event, bad.get(i) or answer.reason) for i, event in out.items())
            rest = [_tried_as(entry, Numbered(left, entry.sequence))] if left else []
            self.entries[:1] = rest
        if entry.overtaken or entry.lost or any(each.lost for each in self.entries):
            self._raise_epoch()
        else:
            self._begin_at(entry.sequence)
        return outcome

    def _raise_epoch(self, *, fenced: bool = False) -> None:
        """Numbers begin at 0 again, in an epoch of which no broker has any.

        Not twice without an acknowledgement: then it is the producer id that is not taken. Nor
        where it is `fenced`: later epochs are not its own.
        """
        if self._raised or fenced or self.epoch >= LAST_EPOCH:
            self.producer_id = None
        else:
            self.epoch += 1
        self._raised = True
        self._begin_at(0)

    def _begin_at(self, sequence: int) -> None:
        self._known_at = None
        for entry in self.entries:
            entry.sequence = sequence
            entry.overtaken = entry.lost = False
            sequence = entry.next_sequence
        self._next = sequence


def _tried_as(whole: Numbered, part: Numbered) -> Numbered:
    """A part of a batch, of which the same is known.

    What was tried with the whole need not be tried as often with each part.
    """
    part.tries = min(whole.tries, UNKNOWN_TRIES - 2)
    part.lost = whole.lost
    part.as_now = whole.as_now
    return part
