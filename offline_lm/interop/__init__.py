"""Other libraries' formats and algorithms; each module is imported only by what uses it."""
