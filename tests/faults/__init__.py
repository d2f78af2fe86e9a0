"""The project as its most hostile user, in its worst week on a cluster: `python -m tests.faults` runs the campaigns."""
