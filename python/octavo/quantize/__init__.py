"""`octavo quantize`: choosing formats, calibrating, and writing quantized checkpoints."""
