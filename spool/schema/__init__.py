"""The SQL of the files' formats, one script per step from a format to the next."""
