"""Derives the Python side from the definitions in `bpf/`: `python -m tools.gen`.

In come the compiled objects, whose BTF holds the structs, enums and tags; out go `events/kinds.py`,
`kernel/objects.py`, `schemas/`, `docs/events.md` and, from the settings, `docs/configuration.md`.
"""
