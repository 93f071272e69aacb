"""Calibration data, recorded from a pipeline or read from tensors, and the stage that observes it."""
