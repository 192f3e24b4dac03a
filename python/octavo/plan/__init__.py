"""`octavo plan`: what a model needs on a device, and how fast it should run, by arithmetic."""
