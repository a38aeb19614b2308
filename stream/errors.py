"""Errors, named by what the worker does about them.

| class | the worker |
|---|---|
| BadEvent | writes the record to the dead letters with the reason and goes on |
| Retryable | drops the attempt, backs off within bounds and tries again |
| Rebalanced | drops the attempt, keeps its producer after an abort and polls for its new share |
| Fenced | stops clean: another process owns this slot or partition now |
| Corrupt | stops and writes nothing: what is stored cannot be trusted |
| LostPosition | stops like a ConfigError, or goes on where worker.lost_positions says |
| ConfigError | exits with 2 before anything starts; the message names the key and what to do |
"""


class DriftlineError(Exception):
    """Any error that this project raises on purpose."""


class BadEvent(DriftlineError):
    """One record cannot be used. `reason` is a short stable code for counters, the message says what was wrong."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Retryable(DriftlineError):
    """The attempt failed, its outcome may be unknown; a fresh attempt may work."""


class Rebalanced(Retryable):
    """The consumer group moved on since the batch was polled: the attempt is void, the member itself may live on."""


class Fenced(DriftlineError):
    """Another process has taken over this slot; whatever this one has not committed is void."""


class Corrupt(DriftlineError):
    """Stored bytes fail their checksum, their format or their invariants."""


class ConfigError(DriftlineError):
    """The configuration, the topics or the arguments cannot work; says which key and what to do about it."""


class LostPosition(ConfigError):
    """The position to read on from is not in the log any more: retention was faster, or the topic was made anew."""
