"""The error of a bad input: a message that names the argument it is about."""


class InputError(ValueError):
    """A value that the user gave cannot be used; the command line prints it and exits with status 2.

    `argument` is the option it came from, e.g. "--data"; `str(error)` is "--data: ...".
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.argument = argument
