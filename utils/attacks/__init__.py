"""Universal triggers, HotFlip and their controls."""
