"""The library that the numbered stages share."""
