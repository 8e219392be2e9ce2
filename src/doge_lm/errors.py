"""The one exception that the command line shows without a traceback."""


class UserError(Exception):
    """Something the user can mend: a file, a line, a key, a flag.

    The message names the culprit and says what to do. `doge_lm.cli.main` prints it as
    `error: <message>` and exits with status 1; everything else is a bug and keeps its traceback.
    """
