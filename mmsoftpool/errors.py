"""The error that the commands print in one line."""


class UserError(ValueError):
    """A mistake that the user can correct: in an argument, a config, a file or a data set.

    The commands print its message and exit with status 2, as they do for an OSError. Every other
    exception is a bug, of mmsoftpool or of a module in the user's config, and keeps its traceback.
    """
