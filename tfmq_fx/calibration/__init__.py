"""Rows to learn from: recorded, read, preset; and the stage that observes them."""
