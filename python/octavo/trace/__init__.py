"""Tools that read the log of scheduling decisions: explain, replay, Perfetto."""
