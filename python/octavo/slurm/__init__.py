"""`octavo slurm`: jobs for a cluster, written, checked, run and collected."""
