"""Loading, feed-forward adapters, the monotone constraint, conversion and certificate."""
