"""The project as its most hostile user and its worst week on a cluster. `python -m tests.faults` runs it and prints the figures."""
