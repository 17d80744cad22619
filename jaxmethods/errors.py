"""The one exception that a user's mistake raises."""


class InputError(ValueError):
  """Bad input: a key, file, client or value that cannot be used.

  The entry points print its message as one line and exit with status 2; it must name what is wrong
  (which key, file, client, value) and what was expected.
  """
