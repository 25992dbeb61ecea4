"""Why a run stops."""


class InputError(ValueError):
    """A value that the user gave cannot be used; the command line prints it and exits with status 2.

    `argument` is the option it came from, e.g. "--data"; `str(error)` is "--data: ...".
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.argument = argument


class TrainingError(RuntimeError):
    """The loss is not finite: training failed, although every argument is valid."""


class OutOfTime(Exception):
    """The time given is over; the checkpoint holds everything."""


OUT_OF_TIME = 3
"""Exit status of a run or a sweep that stopped because its time was over; the same command continues it."""
