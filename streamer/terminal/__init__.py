"""For people: readable lines, tables and the status line."""
