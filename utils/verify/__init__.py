"""Whether this machine can run the experiment: small versions of the real work, each compared with what must come out."""
