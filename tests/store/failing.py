"""Stand-ins that fail at a chosen call: a module os, and a connection to a database."""

import os


class Failing:
    """The module os, whose function ``call`` fails with ``code`` the ``nth`` time."""

    def __init__(self, call, nth, code):
        self._call, self._left, self._code = call, nth, code

    def __getattr__(self, name):
        return self._fail if name == self._call else getattr(os, name)

    def _fail(self, *args, **kwargs):
        self._left -= 1
        if self._left == 0:
            raise OSError(self._code, os.strerror(self._code))
        return getattr(os, self._call)(*args, **kwargs)


class FailingConnection:
    """A connection that raises ``error`` instead of a statement that begins with ``statement``, or after it."""

    def __init__(self, connection, statement, error, after=False):
        self.connection, self.statement, self.error, self.after = connection, statement, error, after

    def execute(self, statement, *values):
        if not statement.startswith(self.statement):
            return self.connection.execute(statement, *values)
        if self.after:
            self.connection.execute(statement, *values)
        raise self.error
