"""Submission to SLURM: what to submit, the queue, the run's frozen code, and what a job does about its own end."""
