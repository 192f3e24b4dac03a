"""`octavo bench`: speed, held against the machine's limits, and never without its gate."""
