"""Errors a user can cause and mend. The commands turn each `InputError` into one line on stderr and exit code 2."""


class InputError(ValueError):
    """Bad input: a file, a value or a combination of options. The message names what was given, where, and what was
    expected.
    """


class DataError(InputError):
    """An interaction log or a history file that cannot be read as one."""


class ConfigError(InputError):
    """An unknown configuration key, or a value outside what its field allows."""


class CheckpointError(InputError):
    """A file that is no checkpoint of ours, is damaged, or was written by a newer version."""


class BackendError(InputError):
    """A backend asked for by name that cannot run here, with the reason."""


class Overloaded(RuntimeError):
    """A request that came while as many as may wait were waiting; nothing was done for it, and later it may pass."""


class Closed(RuntimeError):
    """A request to something that was closed, or that waited there when it was."""


class FailedElsewhere(InputError):
    """An `InputError` of another of several ranks, which says it."""


class RankLost(RuntimeError):
    """Another rank of a distributed group ended or hangs; the group is of no more use."""
