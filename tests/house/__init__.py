"""The pure ring: no thread, no I/O, no clock of its own."""
