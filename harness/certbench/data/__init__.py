"""Data sets as uint8 tensors: what they are, where their files lie, and batches of pixels on a device."""
