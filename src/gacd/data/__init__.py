"""Data sets as bytes on the device, their splits, and the batches of an epoch."""
